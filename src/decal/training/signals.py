"""What a row of losses and gradient norms says: pure functions over numbers, each with its threshold and the reason.

They are made to stay silent on healthy runs. Losses of small batches have heavy tails (one hard row in a hundred), so
a single high loss means little; what counts is a level that stays, or a loss above anything that was seen before.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

WINDOW = 50  # steps that a running median is over: long enough for its spread, short enough to follow the learning
ENOUGH = 20  # of them, before anything is called unusual: a spread from fewer is a guess
STAYS = 5  # steps whose median must be high, so that two hard batches among them change nothing
SIGMAS = 6.0  # a median of 5 is that far off by chance never, even with a tail ten times heavier than normal
SHOCK_SIGMAS, SHOCK = 10.0, 3.0  # one step alone: 3 nats above the start is text the model finds 20 times as unlikely
LEAST_RISE = 0.2  # of the starting loss: smaller rises of a loss near zero are of no account
FIRST = 10  # steps whose highest loss is what a batch may have at the start
LONG = 10  # steps above that on end: divergence
BEFORE = 2  # first losses: with the default warm-up both are from before any weight moved
LEAST_START = 1.0  # nats: two losses of a model that knows its text say nothing of what a batch may have
LONGER = 20  # steps on end above the first two losses, by more than their own spread: divergence on a low level
CLEAR_SIGMAS = 4.0
WORSE_THAN_START = 1.1  # times the validation loss of step 0, on the same rows
BEST_LONG = 0.75  # of what was learnt is lost again over a whole window: divergence, too
NORM_SPIKE, NORM_ABOVE_MAX = 50.0, 10.0  # times the median and the largest of the window: norms vary tenfold by batch
NORM_CUT = 3.0  # times max_grad_norm: clipping makes a smaller spike harmless
CLIPPED, CLIP_WINDOW, CLIP_TIMES = 0.95, 100, 100.0  # share of steps, over so many, and how far: healthy runs reach 30
SKIPPED, SKIP_WINDOW = 0.25, 50  # a scaler that looks for its scale skips some ten steps of a run's first fifty
WORSE = 0.05  # of the best validation loss: evaluations on the same rows differ by less from step to step


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and a standard deviation from the median absolute deviation, which outliers do not move."""
    middle = median(values)
    return middle, 1.4826 * median([abs(value - middle) for value in values])


def spike(losses: Sequence[float], start: Sequence[float]) -> tuple[float, float] | None:
    """Return (level, usual level) if the last losses stand out for good, or the last one beyond all measure."""
    if len(losses) < ENOUGH + STAYS:
        return None
    before, last = losses[:-STAYS][-WINDOW:], losses[-STAYS:]
    usual, sigma = spread(before)
    level = median(last)
    rise = max(0.3 * usual, LEAST_RISE * fmean(start))
    if level > max(usual + SIGMAS * sigma, usual + rise, max(before)) and last[-1] > usual + rise:
        return level, usual
    earlier, one = losses[-WINDOW - 1 : -1], losses[-1]
    usual, sigma = spread(earlier)
    highest = max(start)
    if one > max(usual + SHOCK_SIGMAS * sigma, 2 * max(earlier), 1.5 * highest, highest + SHOCK):
        return one, usual
    return None


def blown(first: Sequence[float]) -> float:
    """Return the loss above which a step is worse than any that the run began with.

    The first ten steps may hold the blow-up itself; then the limit comes from the first three, of which at least one
    was before any weight moved, with room for the differences of batches.
    """
    by_three = 2 * fmean(first[:3]) + SHOCK
    return min(by_three, 1.1 * max(first) + LEAST_RISE) if len(first) >= FIRST else by_three


def above(losses: Sequence[float], first: Sequence[float]) -> bool:
    """Whether the last losses are all above the first two, and by more than batches differ among themselves."""
    last = losses[-LONGER:]
    if len(last) < LONGER:
        return False
    usual, sigma = spread(last)
    limit = over(first)
    return limit is not None and min(last) > limit and usual - max(first[:BEFORE]) > CLEAR_SIGMAS * sigma


def over(first: Sequence[float]) -> float | None:
    """Return the level that `above` means; None if the first losses are too low to mean anything."""
    start = max(first[:BEFORE])
    return 1.15 * start + LEAST_RISE if start >= LEAST_START else None


def worse_than_start(evaluations: Sequence[tuple[float, float]], began: float) -> bool:
    """Whether the last validation loss is clearly above that of step 0, and the training loss has not fallen either."""
    return evaluations[-1][0] > WORSE_THAN_START * began and evaluations[-1][1] > began


def returned(losses: Sequence[float], best: float, first: Sequence[float]) -> bool:
    """Whether most of what a run had learnt is gone again, over a whole window."""
    if len(losses) < WINDOW or len(first) < FIRST:
        return False
    now, sigma = spread(losses[-WINDOW:])
    began = median(first)
    return began - best > max(SIGMAS * sigma / 2, LEAST_RISE * began) and now > best + BEST_LONG * (began - best)


def norm_spike(norms: Sequence[float], limit: float) -> tuple[float, float] | None:
    """Return (norm, usual norm) if the last gradient is out of all proportion to those before."""
    before, one = norms[-WINDOW - 1 : -1], norms[-1]
    if len(before) < ENOUGH:
        return None
    usual = median(before)
    if one > max(NORM_SPIKE * usual, NORM_ABOVE_MAX * max(before), NORM_CUT * limit):
        return one, usual
    return None


def clipped(norms: Sequence[float], limit: float) -> float | None:
    """Return the usual norm if nearly every step is cut to a hundredth or less."""
    last = norms[-CLIP_WINDOW:]
    if len(last) < CLIP_WINDOW or sum(norm > limit for norm in last) < CLIPPED * CLIP_WINDOW:
        return None
    usual = median(last)
    return usual if usual > CLIP_TIMES * limit else None


def skipped(flags: Sequence[bool | int]) -> int | None:
    """Return how many of the last 50 steps were skipped, if that is more than a scaler's search."""
    count = sum(flags[-SKIP_WINDOW:])
    return count if len(flags) >= SKIP_WINDOW and count > SKIPPED * SKIP_WINDOW else None


def overfit(evaluations: Sequence[tuple[float, float]]) -> bool:
    """Whether (validation loss, mean training loss since the one before) say that only the training rows get better.

    Two rises on end, together clear of noise, while the training loss fell: one rise alone is common.
    """
    if len(evaluations) < 3:
        return False
    (a, train_a), (b, _), (c, train_c) = evaluations[-3:]
    best = min(loss for loss, _ in evaluations)
    return a < b < c and c > (1 + WORSE) * best and train_c < 0.98 * train_a
