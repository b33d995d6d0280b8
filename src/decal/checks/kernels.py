"""Whether the kernels of this machine run, and give what plain PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from decal.checks.result import Check, failed, not_applicable, passed
from decal.ops import adam8, dynamic8, fp8, nf4, select
from decal.training.precision import FP8_FROM

SIZE = (48, 256)  # of the weight: whole blocks, and more than one tile of each kernel
RANK = 4
# Quantising and decoding give the reference's bits. A sum of products may be made in another order, or of factors
# rounded to TF32 (2^-11 each): of its largest value.
SUMS = 2e-3
# 8-bit AdamW's first step reads no coded moment yet: it is AdamW's formula but for the order of fp32 products.
STEP = 1e-5


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The 4-bit operations under test; those that run here, unless others are given."""

    quantize: Callable[..., tuple[Tensor, Tensor]] = nf4.quantize
    decode: Callable[..., Tensor] = nf4.decode
    decode_plus: Callable[..., Tensor] = nf4.decode_plus
    multiply: Callable[..., Tensor | None] = nf4.multiply


Answer = tuple[float | None, float]  # the largest difference (None: no kernel), and what is allowed
Ask = Callable[[torch.device, Codec], Answer]


def check(device: torch.device, codec: Codec | None = None) -> list[Check]:
    """Compare every kernel on `device` with its reference on small tensors."""
    under_test, kind = codec or Codec(), select.kind(device)
    found = [_safely(f"4-bit {name}", ask, device, under_test, kind) for name, ask in QUESTIONS.items()]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_FROM:
        found.append(_safely("8-bit floats", _floats8, device, under_test, kind))
    return [*found, _safely("8-bit AdamW", _adam, device, under_test, "reference")]


def _safely(name: str, ask: Ask, device: torch.device, codec: Codec, kind: str) -> Check:
    where = f"{'plain PyTorch' if kind == 'reference' else kind} on {device.type}"
    try:
        apart, allowed = ask(device, codec)
    except Exception as error:  # whatever a compiler or a driver raises is the answer
        text = (str(error).strip() or "no message").splitlines()[0][:120]
        return failed(name, f"{where}: {type(error).__name__}: {text}", fix=_fix(kind))
    if apart is None:
        return not_applicable(name, f"no kernel for it on {device.type}: weights are decoded, then multiplied")
    measure = f"{where}: largest difference {apart:.1e}"
    if apart <= allowed:
        return passed(name, measure)
    return failed(name, f"{measure} of the largest value, allowed is {allowed:g}", fix=_fix(kind))


def _fix(kind: str) -> str:
    if kind == "reference":
        return "Install torch again: plain PyTorch operations give wrong results here."
    return f"Reinstall {kind} in the version that decal asks for; without {kind} decal uses plain PyTorch, slower."


def _weight(device: torch.device) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).to(device)


def _coded(device: torch.device) -> tuple[Tensor, nf4.Nested]:
    packed, absmax = nf4.reference_quantize(_weight(device).flatten(), 64, "nf4")
    return packed, nf4.Nested(*nf4.double_quantize(absmax))


def _decoded(device: torch.device) -> Tensor:
    packed, nested = _coded(device)
    out = torch.empty(SIZE, device=device)
    nf4.reference_dequantize(packed, nf4.single(nested), out.view(-1), 64, "nf4")
    return out


def _quantize(device: torch.device, codec: Codec) -> Answer:
    W = _weight(device)
    packed, absmax = codec.quantize(W)
    codes, scales = nf4.reference_quantize(W.flatten(), 64, "nf4")
    return max(_apart(packed.float(), codes.float()), _apart(absmax, scales)), 0.0


def _decode(device: torch.device, codec: Codec) -> Answer:
    packed, nested = _coded(device)
    out = codec.decode(packed, nested, torch.empty(SIZE, device=device), block=64, kind="nf4")
    return _apart(out, _decoded(device)), 0.0


def _decode_plus(device: torch.device, codec: Codec) -> Answer:
    packed, nested = _coded(device)
    A, B = _weight(device)[:RANK], _weight(device)[:, :RANK].contiguous()
    out = codec.decode_plus(packed, nested, A, B, 2.0, torch.empty(SIZE, device=device), block=64, kind="nf4")
    return _apart(out, _decoded(device) + 2.0 * (B.double() @ A.double()).float()), SUMS


def _multiply(device: torch.device, codec: Codec) -> Answer:
    packed, nested = _coded(device)
    x = _weight(device)[:2].contiguous()
    y = codec.multiply(x, packed, nested, SIZE[0], block=64, kind="nf4")
    return None if y is None else _apart(y, (x.double() @ _decoded(device).double().T).float()), SUMS


def _floats8(device: torch.device, codec: Codec) -> Answer:
    """Rows, and codes with their change turned over, on scales of their own; both are off by their rounding alone."""
    W, (packed, nested) = _weight(device), _coded(device)
    A, B = W[:RANK], W[:, :RANK].contiguous()
    exact = (_decoded(device) + 2.0 * (B.double() @ A.double()).float()).t()
    scale = exact.abs().amax(1, keepdim=True) / fp8.LARGEST
    out = torch.empty(exact.shape, dtype=fp8.FORMAT, device=device)
    codec.decode_plus(packed, nested, A, B, 2.0, out.t(), block=64, kind="nf4", by=(1 / scale).t())
    narrow, step = fp8.rows(W.bfloat16())
    return max(_apart(out.float() * scale, exact), _apart(narrow.float() * step, W)), fp8.ROUNDING + SUMS


def _adam(device: torch.device, codec: Codec) -> Answer:
    p, g = _weight(device)[0], _weight(device)[1]
    zeros = torch.zeros(1, SIZE[1], device=device)
    moments = adam8.Moments(*dynamic8.nearest(zeros), *dynamic8.nearest(zeros, signed=False))
    ours, _ = adam8.adamw(p, g, moments, step=1, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    formula = p * (1 - 1e-2 * 0.01) - 1e-2 * g / (g.abs() + 1e-8)  # what AdamW's first step comes to
    return _apart(ours.flatten(), formula), STEP


def _apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


QUESTIONS: dict[str, Ask] = {
    "quantise": _quantize,
    "decode": _decode,
    "decode plus": _decode_plus,
    "product": _multiply,
}
