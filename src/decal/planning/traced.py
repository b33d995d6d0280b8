"""Every storage that a block of code makes, with its bytes and its life: on tensors without values as on real ones.

Time is counted in operations. A storage counts from the operation that made it to the last one before it was freed;
views count nothing. What a kernel takes for itself while it runs is added from `kernels.py`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from decal.planning import kernels

R = TypeVar("R")
DEVICE, ADD = torch.ops.prim.device.default, torch.ops.aten.add.Tensor
ENGINE = torch.autograd.graph._engine_run_backward.__code__  # from where autograd's own operations come
SMALL = 1 << 20  # elements: what has values and is no larger keeps them, so that models may look at positions


@dataclass(kw_only=True)
class Block:
    """One storage. `died` is the first operation that no longer saw it, None while it lives."""

    bytes: int
    born: int
    died: int | None = None
    part: str | None = None
    shape: tuple[int, ...] = ()
    middle: bool = False  # of the layer that stands for others (see deepen.py)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Use it in a `with` block, inside the mode that takes values away where there is one."""

    def __init__(self, *, card: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.card = card
        self._inside = False  # a kernel
        self.blocks: list[Block] = []
        self.now = 0
        self.flops: list[tuple[int, int]] = []  # of matrix products and attention: (when, how many)
        self.moved: list[tuple[int, int]] = []  # bytes read and written by all else
        self._live: dict[int, tuple[weakref.ref[Any], Block]] = {}
        self._summands: list[Block] = []  # of the sum that autograd formed last, and when that was
        self._summed = -1
        self._makers: dict[Any, Callable[[], Any]] = {}  # of a kernel's results, by the kernel and its inputs' likeness

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it is half the time of an operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE:  # half of all that is asked; FakeTensor's own answer, without its detours
            self.now += not self._inside
            return args[0].device
        kwargs = kwargs or {}
        inputs = [*tensors_in(args), *tensors_in(kwargs.values())]
        if has_values(func, inputs):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            out = _formed(func, args, kwargs, inputs)
        if self._inside:
            return out
        self.now += 1
        outputs = list(tensors_in((out,)))
        for tensor in outputs:
            self.see(tensor)
        if func is ADD and sys._getframe(1).f_code is ENGINE:
            self._summands, self._summed = [self.see(x) for x in inputs], self.now
        self._count(func, args, kwargs, inputs, outputs, out)
        return out

    def kernel(self, function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        """Count a call as one operation that reads its tensors and makes what it returns, nothing between.

        For inputs like an earlier call's, results like that call's are made, and the function does not run.
        """
        read = list(tensors_in(args))
        key = function, tuple(_likeness(x) for x in (*args, *kwargs.items()))
        make = self._makers.get(key)
        self._inside = True
        try:
            out: Any = function(*args, **kwargs) if make is None else make()
        finally:
            self._inside = False
        if make is None and (maker := _maker(out, read)) is not None:
            self._makers[key] = maker
        self.now += 1
        outputs = list(tensors_in((out,)))
        for tensor in outputs:
            self.see(tensor)
        over = read if function.__name__.endswith("_") else []
        self.moved.append((self.now, sum(kernels.size(x) for x in (*read, *over, *outputs))))
        return out  # type: ignore[no-any-return]  # the function's own result, or one like it

    def see(self, tensor: Tensor, part: str | None = None, *, middle: bool = False) -> Block:
        """Return the block of a tensor's storage, which is new if it has not been seen, and say what it is."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            block = self._live[key][1]
        else:
            block = Block(
                bytes=kernels.taken(storage.nbytes(), card=self.card), born=self.now, shape=tuple(tensor.shape)
            )
            self.blocks.append(block)
            self._live[key] = weakref.ref(storage, self._forgetting(key, block)), block
        block.part, block.middle = block.part or part, block.middle or middle
        return block

    def _forgetting(self, key: int, block: Block) -> Callable[[Any], None]:
        live, clock = self._live, weakref.ref(self)

        def forget(_: Any) -> None:
            trace = clock()
            if trace is not None:
                block.died = trace.now + 1 - trace._took_over(block)
            live.pop(key, None)

        return forget

    def _took_over(self, block: Block) -> bool:
        """Whether a gradient that is freed would have held the sum that was just formed of it.

        Autograd adds to a gradient that nobody else holds in place. Where every operation is watched it does not.
        """
        found = self.now == self._summed and any(block is summand for summand in self._summands)
        self._summands = [] if found else self._summands  # one of the two alone
        return found

    def _count(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], out: Any) -> None:
        work = kernels.flops(func, args, kwargs, out)
        if work:
            self.flops.append((self.now, work))
        elif not kernels.is_view(func):
            self.moved.append((self.now, sum(kernels.size(x) for x in (*inputs, *outputs))))
        extra = kernels.workspace(func, args, card=self.card)
        if extra:
            self.blocks.append(Block(bytes=extra, born=self.now, died=self.now + 1, part="workspace"))


def _likeness(x: Any) -> Any:
    """Return what a kernel's results depend on, of one of its arguments."""
    return (type(x), x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _maker(out: Any, read: list[Tensor]) -> Callable[[], Any] | None:
    """Return what makes another result like `out`; None where it has values or a history, or shares memory."""
    made = list(tensors_in((out,)))
    own = {x.untyped_storage()._cdata for x in made}
    apart = len(own) == len(made) and own.isdisjoint(x.untyped_storage()._cdata for x in read)
    if not apart or not all(isinstance(x, FakeTensor) and not x.requires_grad for x in made):
        return None
    if any(x.untyped_storage().nbytes() != kernels.size(x) for x in made):
        return None
    makers = [partial(torch.empty_strided, x.shape, x.stride(), dtype=x.dtype) for x in made]
    if isinstance(out, Tensor):
        return makers[0]
    return None if len(made) != len(out or ()) else lambda: tuple(make() for make in makers) if makers else None


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values and in lists of them, which is all that operations take and return."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def has_values(func: Any, inputs: list[Tensor]) -> bool:
    """Whether an operation's inputs are real and small: it is then computed, as positions and labels are looked at."""
    if not inputs:
        return bool(func._overloadpacket is torch.ops.aten.arange)
    if any(isinstance(x, FakeTensor) for x in inputs):
        return False
    try:
        shape: torch.Size = torch.broadcast_shapes(*(x.shape for x in inputs))  # type: ignore[no-untyped-call]  # torch's
    except RuntimeError:
        return True
    return shape.numel() <= SMALL


def _formed(func: Any, args: Any, kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
    """Return what an operation returns, where that needs no value; FakeTensor's own ways to some of it are long."""
    place = _written_over(func)
    if place is not None:
        over = args[place] if isinstance(place, int) else kwargs[place]
        if isinstance(over, FakeTensor) and over.numel():  # torch gives an empty one the size that it takes
            return over
    fakes = [isinstance(x, FakeTensor) for x in inputs]
    if any(fakes) and not all(fakes):
        args, kwargs = tree_map_only(Tensor, _emptied, (args, kwargs))
    return func(*args, **kwargs)


@cache
def _written_over(func: Any) -> int | str | None:
    """Return which argument an operation writes over and returns, in the form that it had; None for others."""
    schema = func._schema
    alias = schema.returns[0].alias_info if len(schema.returns) == 1 else None
    if alias is None or not alias.is_write or torch.Tag.inplace_view in func.tags:
        return None
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return str(argument.name) if argument.kwarg_only else number
    return None


def _emptied(x: Tensor) -> Tensor:
    """Return a likeness of x without values; a single number stays, for it may be a constant of the operation."""
    return x if isinstance(x, FakeTensor) or not x.dim() else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


def live_at(blocks: Iterable[Block], moment: int) -> Iterator[Block]:
    """Yield the blocks that live at a moment."""
    for block in blocks:
        if block.born <= moment and (block.died is None or moment < block.died):
            yield block


def peak(blocks: Iterable[Block], first: int, last: int) -> tuple[int, int]:
    """Return the largest total of live bytes from operation `first` to `last`, and when that was."""
    change: dict[int, int] = {}
    for block in blocks:
        change[block.born] = change.get(block.born, 0) + block.bytes
        if block.died is not None:
            change[block.died] = change.get(block.died, 0) - block.bytes
    total = best = when = 0
    started = False
    for moment in sorted(change):
        if moment > last:
            break
        if moment > first and not started:
            best, when, started = total, first, True
        total += change[moment]
        if moment >= first and (not started or total > best):
            best, when, started = total, moment, True
    return (best, when) if started else (total, first)
