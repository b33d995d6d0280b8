"""What a step's tensors take of resident memory on a CPU: the C library's heap with its holes, played through.

torch asks glibc for every tensor with posix_memalign(64). glibc cuts an aligned piece out of a chunk that is larger by
the alignment; small objects take the slivers on both sides, so a freed tensor's place is too small for the next tensor
of the same size until they are gone, too. What is played is malloc of glibc 2.26 to 2.41: best fit among free chunks,
which merge with free neighbours; else the top of the heap; else, from 32 MiB on, memory of its own (mmap).

How long the small objects live nobody sees. KEPT and TOUCHED are fitted to the measured steps of docs/plan.md; they are
the only numbers of a plan that are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

from decal.planning.traced import Block

HEADER, GRAIN, ALIGN, SMALLEST = 8, 16, 64, 32
PAGE, PAD = 4096, 128 << 10
HIGHEST = 32 << 20
SLIVER = 256  # bytes: a rest no larger is taken by small objects
KEPT = 100  # operations, for so long
# What no tensor accounts for: the libraries' pages and buffers that a first step touches, what loading leaves in the
# heap, and holes beyond those that are played.
TOUCHED, LEAST = 280 << 20, 32 << 20  # bytes; a tiny run touches little
TINY = 1024  # smaller tensors come from caches of their own
PASSES = 2  # steps that are played: the holes of the first are there in the second


class Heap:
    """Addresses only, from 0. `peak` is the most that was resident: pages once touched stay, but for the top's."""

    def __init__(self) -> None:
        self.end = self.top = self.touched = self.mapped = self.peak = 0
        self.trim = 2 * HIGHEST
        self._slivers: deque[tuple[int, int, int]] = deque()  # free again at, start, size
        self._now = 0
        self._starts: dict[int, int] = {}  # of free chunks: start -> size
        self._ends: dict[int, int] = {}  # end -> start
        self._sizes: list[tuple[int, int]] = []
        self.used: dict[int, tuple[int, int]] = {}  # key -> start (-1: mapped), size

    def at(self, now: int) -> None:
        """Let time go on, in operations: slivers become free."""
        self._now = now
        while self._slivers and self._slivers[0][0] <= now:
            _, start, size = self._slivers.popleft()
            self._release(start, size)

    def _rest(self, start: int, size: int) -> None:
        if 0 < size <= SLIVER:
            self._slivers.append((self._now + KEPT, start, size))
        elif size:
            self._release(start, size)

    def take(self, key: int, size: int) -> None:
        """Allocate a tensor of `size` bytes."""
        need = _rounded(size + HEADER)
        asked = _rounded(need + ALIGN + SMALLEST + HEADER)
        at = bisect_left(self._sizes, (asked, 0))
        if at < len(self._sizes):
            start = self._sizes[at][1]
            room = self._remove(start)
        elif asked + SMALLEST <= self.end - self.top:
            start, room = self._from_top(asked)
        elif asked >= HIGHEST:
            self.used[key] = (-1, -(-asked // PAGE) * PAGE)
            self.mapped += self.used[key][1]
            self.peak = max(self.peak, self.mapped + self.touched)
            return
        else:
            self.end += -(-(asked + PAD + SMALLEST - (self.end - self.top)) // PAGE) * PAGE
            start, room = self._from_top(asked)
        lead = -(start + 2 * HEADER) % ALIGN
        lead += ALIGN if 0 < lead < SMALLEST else 0
        rest = room - lead - need
        self._rest(start, lead)
        self._rest(start + lead + need, rest)
        self.used[key] = (start + lead, need)
        self.touched = max(self.touched, start + lead + need)
        self.peak = max(self.peak, self.mapped + self.touched)

    def give(self, key: int) -> None:
        """Free a tensor."""
        start, size = self.used.pop(key)
        if start < 0:
            self.mapped -= size
            return
        self._release(start, size)
        if size >= 65536 and self.end - self.top >= self.trim:
            self.end = -(-(self.top + PAD + SMALLEST) // PAGE) * PAGE
            self.touched = min(self.touched, self.end)

    def _from_top(self, size: int) -> tuple[int, int]:
        start = self.top
        self.top += size
        return start, size

    def _release(self, start: int, size: int) -> None:
        if start in self._ends:
            before = self._ends[start]
            size += self._remove(before)
            start = before
        if start + size in self._starts:
            size += self._remove(start + size)
        if start + size == self.top:
            self.top = start
            return
        self._starts[start], self._ends[start + size] = size, start
        insort(self._sizes, (size, start))

    def _remove(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._sizes[bisect_left(self._sizes, (size, start))]
        return size


def _rounded(size: int) -> int:
    return max(SMALLEST, -(-size // GRAIN) * GRAIN)


def resident(blocks: Iterable[Block], first: int) -> int:
    """Return the most bytes that are resident in a step that begins at operation `first`, and in the one after it."""
    events: list[tuple[int, bool, int, int]] = []
    for number, block in enumerate(blocks):
        if block.bytes >= TINY:
            events.append((block.born, False, number, block.bytes))
            if block.died is not None:
                events.append((block.died - 1, True, number, block.bytes))  # after what that operation made
    events.sort()
    heap, last = Heap(), events[-1][0] if events else 0
    for number in range(PASSES):
        for when, freed, key, size in events:
            if number and when <= first:
                continue  # weights and states are there
            heap.at(when + number * last)
            if freed and key in heap.used:
                heap.give(key)
            elif not freed:
                heap.take(key, size)
        for key in [key for when, freed, key, _ in events if not freed and when > first and key in heap.used]:
            heap.give(key)  # the gradients
    return heap.peak + min(TOUCHED, LEAST + heap.peak // 2)
