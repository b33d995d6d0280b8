"""From a step of three alike layers (or periods of layers) to one of all: the middle one is repeated.

A block of the middle layer's forward that is freed in the next layer, or in either one's backward, is freed in the next
copy, or in the copies' backward, which come in the opposite order. All other blocks are moved in time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from decal.planning.traced import Block


@dataclass(frozen=True, kw_only=True)
class Middle:
    """When the middle's forward and backward began and ended, in operations, and how many copies are to be added.

    Without a backward (evaluation) that is an empty stretch at the end.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]
    copies: int

    @property
    def longer(self) -> int:
        """Operations that the copies' forward takes."""
        return self.copies * (self.forward[1] - self.forward[0])

    @property
    def longer_back(self) -> int:
        return self.copies * (self.backward[1] - self.backward[0])

    def moved(self, time: int) -> int:
        """Return when something outside the middle happens."""
        if time < self.forward[1]:
            return time
        if time < self.backward[0]:
            return time + self.longer
        return time + self.longer + self.longer_back  # the first copy's backward is the last one

    def freed(self, time: int | None) -> int | None:
        return None if time is None else self.moved(time)

    def copied(self, time: int, copy: int, *, back_from: int) -> int:
        """Return when something that began in the middle's forward happens in a copy (0 is the first)."""
        if time >= back_from:
            share = self.copies - copy
            return time + self.longer + share * (self.backward[1] - self.backward[0])
        return time + copy * (self.forward[1] - self.forward[0])


def deepened(blocks: list[Block], middle: Middle, *, back_from: int) -> list[Block]:
    """Return the blocks of a deeper model. `back_from`: when the backward pass of the layers began.

    Blocks with `middle` set (weights and what goes with them) are there as often as the middle is.
    """
    if middle.copies == 0:
        return blocks
    found: list[Block] = []
    for block in blocks:
        forward = middle.forward[0] <= block.born < middle.forward[1]
        backward = middle.backward[0] <= block.born < middle.backward[1]
        if block.middle:
            born, died = middle.moved(block.born), middle.freed(block.died)
            found += [replace(block, born=born, died=died) for _ in range(middle.copies + 1)]
        elif forward:
            for copy in range(middle.copies + 1):
                born = middle.copied(block.born, copy, back_from=back_from)
                died = None if block.died is None else middle.copied(block.died, copy, back_from=back_from)
                found.append(replace(block, born=born, died=died))
        elif backward:
            step = middle.backward[1] - middle.backward[0]
            for copy in range(middle.copies + 1):
                shift = middle.longer + copy * step
                found.append(replace(block, born=block.born + shift, died=_plus(block.died, shift)))
        else:
            found.append(replace(block, born=middle.moved(block.born), died=middle.freed(block.died)))
    return sorted(found, key=lambda block: block.born)


def _plus(time: int | None, shift: int) -> int | None:
    return None if time is None else time + shift
