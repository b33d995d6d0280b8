"""From a text and the spans to learn to token ids, labels and the stop tokens among them.

The whole text is tokenised once, as the model will see it; the spans are laid over the tokens by character offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from decal.data.batch import IGNORE
from decal.data.chat import Span


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One example as tokens: `labels[t]` is `ids[t]` where that token is learnt, else IGNORE; the first never is."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked:
    """A sample before cutting. `stops`: positions of learnt stop tokens; `merged`: replies whose first token also
    holds the end of the prompt, so that generation will meet another token there; `bare`: which of the spans hold
    nothing to learn but their stop token and blanks."""

    sample: Sample
    stops: tuple[int, ...]
    merged: int = 0
    bare: tuple[int, ...] = ()


def lay(
    ids: Sequence[int],
    offsets: Sequence[Span],
    spans: Sequence[Span],
    *,
    stop_ids: frozenset[int],
    control_ids: frozenset[int],
    blank: Callable[[int], bool],
) -> Masked:
    """Return the sample in which the tokens of `spans`, each up to its stop token, are learnt.

    After a reply's last word comes a run of control tokens and blanks: its stop token is the first of `stop_ids` in
    that run, else the last control token inside the span. Nothing behind the stop token is learnt.
    """
    labels = [IGNORE] * len(ids)
    stops: list[int] = []
    bare: list[int] = []
    merged = 0
    token = 0
    for number, (start, end) in enumerate(spans):
        while token < len(ids) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(ids) and offsets[token][0] < end:
            token += 1
        last = token
        merged += first < last and offsets[first][0] < start
        find = partial(_stop, ids, first, span_end=last, stop_ids=stop_ids, control_ids=control_ids, blank=blank)
        stop = find(last)
        if stop is None:  # the template writes more than blanks behind the stop token
            inside = [position for position in range(first, last) if ids[position] in stop_ids]
            stop = find(inside[-1] + 1) if inside else None
        until = last if stop is None else stop + 1
        labels[first:until] = ids[first:until]
        if all(position == stop or blank(position) for position in range(first, until)):
            bare.append(number)
        if stop is not None:
            stops.append(stop)
            token = max(token, until)
    if labels:
        labels[0] = IGNORE
    sample = Sample(ids=list(ids), labels=labels)
    return Masked(sample=sample, stops=tuple(stops), merged=merged, bare=tuple(bare))


def _stop(
    ids: Sequence[int],
    first: int,
    end: int,
    *,
    span_end: int,
    stop_ids: frozenset[int],
    control_ids: frozenset[int],
    blank: Callable[[int], bool],
) -> int | None:
    """Return the stop token in the run of control tokens and blanks that reaches up to, or goes beyond, `end`."""
    start = end
    while start > first and (ids[start - 1] in control_ids or blank(start - 1)):
        start -= 1
    inside: int | None = None
    for position in range(start, len(ids)):
        if ids[position] in stop_ids:
            return position
        if ids[position] in control_ids:
            if position < span_end:
                inside = position
        elif not blank(position):
            break
    return inside


def cut(masked: Masked, length: int) -> tuple[Masked, bool]:
    """Return the first `length` tokens, and whether the last stop token was among those cut off."""
    sample = Sample(ids=masked.sample.ids[:length], labels=masked.sample.labels[:length])
    stops = tuple(stop for stop in masked.stops if stop < length)
    return Masked(sample=sample, stops=stops, merged=masked.merged), len(stops) < len(masked.stops)


def learn_all(masked: Masked) -> Masked:
    """Return the sample with every token learnt but the first, which nothing predicts."""
    ids = masked.sample.ids
    return Masked(sample=Sample(ids=ids, labels=[IGNORE, *ids[1:]]), stops=masked.stops, merged=masked.merged)
