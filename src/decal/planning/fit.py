"""What would make a run fit: the cheapest sets of changes that do, each counted.

All sets are guessed from the parts of the forecast that does not fit; what a guess lets hope for is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from decal.errors import DecalError
from decal.planning import memory
from decal.planning.change import BY_TOKENS, LENGTH, ROWS, Change, changes, cut
from decal.planning.memory import Forecast, Known
from decal.planning.shapes import ACTIVATIONS

GRAIN = 128  # tokens: rows are cut to multiples of it
LONGER = 1.2  # what rows must gain to be another way
COUNTED = 14  # forecasts after which a search begins no other candidate
HOPE, SURE = 1.2, 1.02  # a guess may be so much too high: at first, and once the least was counted
IN_VAIN = 100  # the cost of cutting rows before a micro-batch has one alone, which changes no result


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Changes that may be enough, the length of rows with them, and a guess at the bytes that they need."""

    changes: tuple[Change, ...]
    length: int
    guess: float


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Changes that together make a run fit, and what it takes then."""

    changes: tuple[Change, ...]
    forecast: Forecast

    @property
    def settings(self) -> str:
        return " ".join(str(change) for change in self.changes)

    @property
    def length(self) -> int:
        return self.forecast.wanted.length

    def is_in(self, chosen: tuple[Change, ...], length: int) -> bool:
        """Whether `chosen`, with rows of `length`, changes all that this does, and has rows that are hardly longer."""
        touched, more = ({name for change in part for name in change.settings} for part in (self.changes, chosen))
        return touched <= more | {LENGTH} and length <= LONGER * self.length


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The cheapest ways to make a run fit; where there is none, `least` is the one that takes the least memory."""

    fittings: tuple[Fitting, ...]
    fewer: bool  # than were asked for: no other way was found
    least: Fitting | None


def offer(forecast: Forecast, room: int, *, known: Known | None = None, count: int = 3) -> Offer:
    """Return the cheapest ways to bring a run's need down to `room` bytes, each counted, at most `count`.

    Each has one change or as many as it takes, none holds another that fits without the rest, and where rows are to be
    shorter they are the longest that fit. `known` is what earlier forecasts counted.
    """
    search = _Search(forecast=forecast, room=room, known=known or Known())
    found: list[Fitting] = []
    least: Fitting | None = None
    for early in search.candidates():
        if len(found) == count or search.counted >= COUNTED:
            break
        candidate = search.renewed(early)
        if search.hopeless(candidate) or any(way.is_in(candidate.changes, candidate.length) for way in found):
            continue
        fitting = search.fitted(candidate)
        if fitting is not None and not any(way.is_in(fitting.changes, fitting.length) for way in found):
            found.append(fitting)
        if fitting is None and least is None:
            least = search.least()
            if least is not None and least.forecast.needed > room:  # all that follows would be in vain
                break
    if not found:
        least = least or search.least()
        fits = least is not None and least.forecast.needed <= room
        longest = search.fitted(search.renewed(search.candidate(least.changes))) if least and fits else None
        found += [] if longest is None else [longest]
    found.sort(key=lambda fitting: search.cost(fitting.changes))
    return Offer(fittings=tuple(found), fewer=len(found) < count, least=None if found else least)


@dataclass(kw_only=True)
class _Search:
    forecast: Forecast
    room: int
    known: Known
    counted: int = 0
    more: int = 0  # than guessed, where the least was counted
    hope: float = HOPE

    def candidates(self) -> list[Candidate]:
        """Return sets of changes that may be enough, the cheapest first: with rows as they are, or shorter."""
        asked, found = self.forecast.wanted, list[Candidate]()
        for chosen in self._sets():
            whole = self.candidate(chosen)
            found += [whole] if chosen else []
            if whole.guess * HOPE > self.room and asked.length > GRAIN:
                found.append(self.candidate((*chosen, cut(asked, self._length(chosen)))))
        return sorted(found, key=lambda candidate: (self.cost(candidate.changes), len(candidate.changes)))

    def cost(self, chosen: tuple[Change, ...]) -> float:
        """Return what orders the ways."""
        settings = {name: value for change in chosen for name, value in change.settings.items()}
        in_vain = LENGTH in settings and settings.get(ROWS, self.forecast.wanted.train.micro_batch) > 1
        return sum(change.cost for change in chosen) + IN_VAIN * in_vain

    def candidate(self, chosen: tuple[Change, ...]) -> Candidate:
        """Return a set of changes with a guess at what it takes."""
        length = chosen[-1].settings.get(LENGTH) if chosen else None
        guess = self.forecast.needed_at(sum(self._guess(chosen).values()))
        return Candidate(changes=chosen, length=length or self.forecast.wanted.length, guess=guess)

    def renewed(self, candidate: Candidate) -> Candidate:
        """Return a candidate with the length of its rows guessed anew, by what is known by now."""
        asked = self.forecast.wanted
        if candidate.length == asked.length:
            return candidate
        chosen = candidate.changes[:-1]
        return self.candidate((*chosen, cut(asked, self._length(chosen))))

    def hopeless(self, candidate: Candidate) -> bool:
        """Whether a candidate need not be counted."""
        return candidate.guess + self.more > self.room * self.hope

    def fitted(self, candidate: Candidate) -> Fitting | None:
        """Return a candidate counted, its rows as long as they can be where it cuts them; None if it does not fit."""
        asked = self.forecast.wanted
        cuts = candidate.length < asked.length
        fitting = self._longest(candidate) if cuts else self._count(candidate)
        if fitting is None or fitting.forecast.needed > self.room:
            return None
        if not asked.evaluates or (asked.eval_length or 0) <= candidate.length:
            return fitting  # rows no longer than training's take less in evaluation
        whole = memory.forecast(replace(fitting.forecast.wanted, evaluates=True), self.known)
        return replace(fitting, forecast=whole) if whole.needed <= self.room else None

    def least(self) -> Fitting | None:
        """Return the changes that take the least memory, counted, whether they fit or not."""
        asked = self.forecast.wanted
        cuts = (cut(asked, GRAIN),) if asked.length > GRAIN else ()
        sets = [self.candidate((*chosen, *cuts)) for chosen in self._sets()]
        for candidate in sorted(sets, key=lambda candidate: candidate.guess):
            found = self._count(candidate)
            if found is not None:
                self.more, self.hope = max(0, found.forecast.needed - int(candidate.guess)), SURE
                return found
        return None

    @property
    def _parts(self) -> Mapping[str, int]:
        return self.forecast.phase("training").parts

    def _sets(self) -> Iterator[tuple[Change, ...]]:
        """Yield every set of changes, one of a kind, none included."""
        kinds: dict[str, list[tuple[Change, ...]]] = {}
        for change in changes(self.forecast.wanted, kept=self._kept):
            kinds.setdefault(next(iter(change.settings)), [()]).append((change,))
        for picked in product(*kinds.values()):
            yield tuple(change for part in picked for change in part)

    @cached_property
    def _kept(self) -> float:
        """The share that is left of activations if layers run again, counted."""
        asked = self.forecast.wanted
        if asked.train.gradient_checkpointing or not self._parts[ACTIVATIONS]:
            return 1.0
        again = asked.train.model_copy(update={"gradient_checkpointing": True})
        other = memory.forecast(replace(asked, train=again, evaluates=False), self.known).phase("training").parts
        saved = sum(self._parts[part] - other[part] for part in BY_TOKENS)
        return max(0.0, 1 - saved / self._parts[ACTIVATIONS])

    def _guess(self, chosen: tuple[Change, ...]) -> dict[str, float]:
        """Return about what the parts come down to."""
        left = dict[str, float](self._parts)
        for change in chosen:
            left |= {part: left[part] * share for part, share in change.left.items()}
        return left

    def _length(self, chosen: tuple[Change, ...]) -> int:
        """Return about the longest rows that fit with some changes."""
        length, parts, needed = self.forecast.wanted.length, self._guess(chosen), self.forecast.needed_at
        whole = needed(sum(parts.values()))
        growth = whole - needed(sum(size for part, size in parts.items() if part not in BY_TOKENS))
        return max(GRAIN, _grain(length * (1 - (whole + self.more - self.room) / max(growth, 1)), below=length))

    def _count(self, candidate: Candidate) -> Fitting | None:
        """Return what training takes with these changes; None where the model cannot be changed so."""
        asked = replace(self.forecast.wanted, evaluates=False)
        for change in candidate.changes:
            asked = change.of(asked)
        self.counted += 1
        try:
            return Fitting(changes=candidate.changes, forecast=memory.forecast(asked, self.known))
        except DecalError:  # this model has no such layers, or cannot be stored so
            return None

    def _longest(self, candidate: Candidate) -> Fitting | None:
        """Return the candidate with the longest rows that fit: they are counted, and 128 more are counted not to."""
        asked, chosen, length = self.forecast.wanted, candidate.changes[:-1], candidate.length
        best: Fitting | None = None
        limit, over = asked.length, 0  # the shortest rows that do not fit, and by how much (0: not counted)
        while length:
            tried = self._count(self.candidate((*chosen, cut(asked, length))))
            if tried is None:
                return None
            spare, parts = self.room - tried.forecast.needed, tried.forecast.phase("training").parts
            if spare >= 0:
                best = tried
            else:
                limit, over = length, -spare
            longest = 0 if best is None else best.forecast.wanted.length
            if limit - longest <= GRAIN:
                break
            slope = max(1, sum(parts[part] for part in BY_TOKENS) / length)
            if best is not None and over:
                slope = max(1, (over + self.room - best.forecast.needed) / (limit - longest))
            length = _grain(max(length + spare / slope, longest + GRAIN), below=limit)
        return best


def _grain(length: float, *, below: int) -> int:
    """Return the largest multiple of GRAIN that is no longer, and shorter than `below`; 0 where there is none."""
    return max(0, min(int(length), below - 1) // GRAIN * GRAIN)
