"""The 4-bit codec of QLoRA: NormalFloat (NF4) and FP4, blockwise, with double quantization of the scales.

Each block of 64 weights is divided by its largest magnitude (absmax) and rounded to the nearest of 16 levels in
[-1, 1]; NF4's are quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, section 3 and appendix E). Two codes
share a byte, the even element in the high half. Double quantization stores the absmax in 8 bits (ops/dynamic8.py)
around their mean: 4.5 bits per weight become 4.127.

Codes, scales and decoded values equal those of bitsandbytes 0.50's CPU build bit for bit: the level is found from
x · (1/absmax), or x / absmax in a last partial block; ties go to the lower level; a last partial block of zeros has
absmax 1e-38; an odd tail is padded with the level of zero. Decoding multiplies in fp32 and rounds once to the wanted
dtype. The mean of the scales is the one value whose last bit may depend on the device, as the order of its sum does.
Subnormal values (below 1e-38) are kept, where bitsandbytes' AVX-512 code makes them zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from decal.errors import DecalError
from decal.ops import dynamic8, rounding, select
from decal.ops.select import NotCompiled

Kind = Literal["nf4", "fp4"]
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# A sign bit over 0, 1/16, 8, 12, 4, 6, 2, 3, in twelfths: bitsandbytes' FP4.
FP4 = tuple(sign * twelfths / 12 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))
LEVELS: dict[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}
# Codes from the lowest level to the highest; FP4 writes zero as code 0, and a tiny positive value as 8, its other zero.
ORDER: dict[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
TINY = 1e-38


@cache
def levels(kind: str, device: torch.device) -> Tensor:
    """Return the value of each of the 16 codes, fp32."""
    return torch.tensor(LEVELS[kind], dtype=torch.float32, device=device)


@cache
def thresholds(kind: str, device: torch.device) -> Tensor:
    """Return the 15 midpoints between neighbouring levels, rising, fp32."""
    rising = levels(kind, torch.device("cpu"))[list(ORDER[kind])]
    return ((rising[:-1] + rising[1:]) / 2).to(device)


def quantize(x: Tensor, block: int = 64, kind: Kind = "nf4", *, name: str = "the tensor") -> tuple[Tensor, Tensor]:
    """Return the packed codes (ceil(n/2),) uint8 and the absmax (ceil(n/block),) fp32 of x, any shape of n elements.

    Raises DecalError, naming the tensor `name`, for integers, for Inf or NaN, and for a block size that is not a power
    of two from 32 to 4096.
    """
    _check_format(block, kind)
    if not x.is_floating_point():
        raise DecalError(
            f"{name} holds {x.dtype}, and only floating-point weights can be quantised", fix="Leave it out."
        )
    if x.numel() == 0:
        raise DecalError(f"{name} is empty", fix="Leave it out.")
    packed, absmax = _quantize(x.detach().flatten(), block, kind)
    if not bool(torch.isfinite(absmax).all()):
        raise DecalError(
            f"{name} holds Inf or NaN, which no 4-bit level stands for",
            fix="Repair or download the checkpoint again; a weight like that ruins the model in 16 bits, too.",
        )
    return packed, absmax


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    *,
    shape: Sequence[int],
    block: int = 64,
    dtype: torch.dtype = torch.float32,
    kind: Kind = "nf4",
    out: Tensor | None = None,
) -> Tensor:
    """Return the weights in `shape` and `dtype` (written into `out` if given): level · absmax in fp32, rounded once.

    `packed` (ceil(n/2),) uint8 and `absmax` (ceil(n/block),) fp32. Raises DecalError if they do not fit `shape`.
    """
    _check_format(block, kind)
    n = math.prod(shape)
    if packed.numel() != -(-n // 2) or absmax.numel() != -(-n // block):
        raise DecalError(
            f"the codes and scales do not fit a weight of {tuple(shape)} in blocks of {block}",
            got=f"{packed.numel()} bytes and {absmax.numel()} scales",
            fix="The file is damaged or describes another layout.",
        )
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    _dequantize(packed.flatten(), absmax.flatten(), out.view(-1), block, kind)
    return out


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scales' codes (m,) uint8, the absmax of their blocks of 256 (ceil(m/256),) fp32, and their mean ()."""
    offset = absmax.mean()
    codes, nested_absmax = dynamic8.quantize(absmax - offset)
    return codes, nested_absmax, offset


def double_dequantize(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Return the scales (m,) fp32: value · nested absmax, rounded, + offset, rounded."""
    return dynamic8.dequantize(codes, nested_absmax) + offset


class Nested(NamedTuple):
    """Doubly quantised scales: codes (m,) uint8, absmax of blocks of 256 (ceil(m/256),) fp32, offset () fp32."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor


Scales = Tensor | Nested  # one absmax (m,) fp32 for each block, or what it is decoded from


def single(scales: Scales) -> Tensor:
    """Return the absmax of each block, (m,) fp32."""
    return double_dequantize(*scales) if isinstance(scales, Nested) else scales


def of_blocks(scales: Scales, first: int, last: int) -> Scales:
    """Return views of the scales of blocks `first` to `last`; doubly quantised ones begin at a multiple of 256."""
    if not isinstance(scales, Nested):
        return scales[first:last]
    assert first % dynamic8.BLOCK == 0, "the 256 scales of a nested block have one absmax"
    outer = scales.absmax[first // dynamic8.BLOCK : -(-last // dynamic8.BLOCK)]
    return Nested(codes=scales.codes[first:last], absmax=outer, offset=scales.offset)


def decode(packed: Tensor, scales: Scales, out: Tensor, *, block: int, kind: str) -> Tensor:
    """Write the weights into `out`, contiguous, of any shape and floating dtype; return it."""
    kernels = _kernels(packed.device)
    if kernels is not None and isinstance(scales, Nested) and hasattr(kernels, "dequantize_nested"):
        with suppress(NotCompiled):
            select.tried("dequantize", partial(kernels.dequantize_nested, packed, scales, out.view(-1), block, kind))
            return out
    _dequantize(packed, single(scales), out.view(-1), block, kind)
    return out


def decode_plus(
    packed: Tensor,
    scales: Scales,
    A: Tensor,
    B: Tensor,
    s: float,
    out: Tensor,
    *,
    block: int,
    kind: str,
    by: Tensor | None = None,
) -> Tensor:
    """Write W + s·B·A into `out` (out, in), summed in fp32 and rounded once; A (r, in), B (out, r). Returns `out`.

    The sum is multiplied by `by`, dense fp32 (out, 1) or (1, in), where that is given, as 8-bit floats need it.
    """
    kernels = _kernels(packed.device)
    if kernels is not None and hasattr(kernels, "decode_plus"):
        with suppress(NotCompiled):
            select.tried("decode_plus", partial(kernels.decode_plus, packed, scales, A, B, s, out, block, kind, by))
            return out
    wide = rounding.room(out, by)
    decode(packed, scales, wide, block=block, kind=kind).addmm_(B.to(wide.dtype), A.to(wide.dtype), alpha=s)
    return rounding.into(out, wide, by)


def multiply(x: Tensor, packed: Tensor, scales: Scales, out_features: int, *, block: int, kind: str) -> Tensor | None:
    """Return x Wᵀ (rows, out) without forming W, for a few rows, or None where no kernel does so. x is (rows, in)."""
    if select.kind(packed.device) != "triton":
        return None
    from decal.ops import nf4_multiply_triton as kernels

    if kernels.can_multiply(x, block):
        with suppress(NotCompiled):
            return select.tried("multiply", partial(kernels.multiply, x, packed, scales, out_features, block, kind))
    return None


def bits_per_weight(shape: Sequence[int], *, block: int = 64, double_quant: bool = False) -> float:
    """Return the storage per weight in bits: codes, scales, and the nested scales and offset; not the small tables."""
    n = math.prod(shape)
    scales = -(-n // block)
    nested = 8 * scales + 32 * (-(-scales // dynamic8.BLOCK)) + 32
    return (8 * (-(-n // 2)) + (nested if double_quant else 32 * scales)) / n


def _check_format(block: int, kind: str) -> None:
    if block not in BLOCKS:
        raise DecalError("the block size must be a power of two from 32 to 4096", got=block, fix="Use 64.")
    if kind not in LEVELS:
        raise DecalError("unknown 4-bit format", got=kind, fix="Use nf4 or fp4.")


def _kernels(device: torch.device) -> Any:
    """Return the module that has the kernels for `device`, or None for the reference here."""
    chosen = select.kind(device)
    if chosen == "numba":
        from decal.ops import nf4_numba

        return nf4_numba
    if chosen == "triton":
        from decal.ops import nf4_triton

        return nf4_triton
    if chosen == "shapes":
        from decal.ops import nf4_shapes

        return nf4_shapes
    return None


def _quantize(flat: Tensor, block: int, kind: str) -> tuple[Tensor, Tensor]:
    kernels = _kernels(flat.device)
    if kernels is not None:
        with suppress(NotCompiled):
            found: tuple[Tensor, Tensor] = select.tried("quantize", partial(kernels.quantize, flat, block, kind))
            return found
    return reference_quantize(flat, block, kind)


def reference_quantize(flat: Tensor, block: int, kind: str) -> tuple[Tensor, Tensor]:
    """Return packed codes and absmax of a flat tensor, in plain PyTorch."""
    x = flat.float()
    n, full = len(x), len(x) // block * block
    whole = x[:full].view(-1, block)
    absmax = whole.abs().amax(1)
    unit = (whole * (1 / absmax.clamp(min=TINY))[:, None]).flatten()
    if full < n:
        last = x[full:].abs().amax().clamp(min=TINY)
        absmax = torch.cat([absmax, last[None]])
        unit = torch.cat([unit, x[full:] / last])
    if n % 2:
        unit = torch.nn.functional.pad(unit, (0, 1))
    rank = torch.bucketize(unit.clamp_(-1, 1), thresholds(kind, x.device), out_int32=True)
    codes = torch.tensor(ORDER[kind], dtype=torch.uint8, device=x.device)[rank]
    return (codes[::2] << 4) | codes[1::2], absmax


def _dequantize(packed: Tensor, absmax: Tensor, out: Tensor, block: int, kind: str) -> None:
    kernels = _kernels(packed.device)
    if kernels is not None:
        with suppress(NotCompiled):
            select.tried("dequantize", partial(kernels.dequantize, packed, absmax, out, block, kind))
            return
    reference_dequantize(packed, absmax, out, block, kind)


def reference_dequantize(packed: Tensor, absmax: Tensor, out: Tensor, block: int, kind: str) -> None:
    """Write the decoded values into the flat tensor `out`, in plain PyTorch."""
    n = len(out)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:n]
    values = levels(kind, packed.device)[codes.int()]
    out.copy_(values * absmax.repeat_interleave(block)[:n])
