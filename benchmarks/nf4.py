"""The 4-bit codec on this CPU: decal beside bitsandbytes in one run, 4096 x 4096, NF4, blocks of 64.

Both on as many threads as torch takes; best of several. G elements/s. decal's layers decode into a reused buffer;
bitsandbytes' CPU build always into new memory, whose page faults then set the pace: the last line has both do so.

    python benchmarks/nf4.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from decal.ops import nf4, select

SIZE, REPEATS = 4096, 7


def rate(work: Callable[[], object]) -> float:
    """G elements/s of the best of REPEATS, after one warm-up."""
    work()
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return SIZE * SIZE / best / 1e9


def main() -> None:
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) / 50
    packed, absmax = nf4.quantize(x)
    nested = nf4.Nested(*nf4.double_quantize(absmax))
    out = torch.empty_like(x)
    codes, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    codes2, state2 = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, codes.flatten())
    assert torch.equal(bnb.dequantize_4bit(codes, state), nf4.decode(packed, absmax, out, block=64, kind="nf4"))
    jobs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "quantise": (
            lambda: bnb.quantize_4bit(x, blocksize=64, quant_type="nf4"),
            lambda: nf4.quantize(x),
        ),
        "decode": (
            lambda: bnb.dequantize_4bit(codes, state),
            lambda: nf4.decode(packed, absmax, out, block=64, kind="nf4"),
        ),
        "decode, nested": (
            lambda: bnb.dequantize_4bit(codes2, state2),
            lambda: nf4.decode(packed, nested, out, block=64, kind="nf4"),
        ),
        "decode, new memory": (
            lambda: bnb.dequantize_4bit(codes, state),
            lambda: nf4.dequantize(packed, absmax, shape=x.shape),
        ),
    }
    print(f"{'':22} {'bitsandbytes':>13} {'decal':>8} {'ratio':>7} {'plain PyTorch':>14}")
    for name, (theirs, ours) in jobs.items():
        with select.forced("reference"):
            plain = rate(ours)
        a, b = rate(theirs), rate(ours)
        print(f"{name:22} {a:>13.3f} {b:>8.3f} {b / a:>6.1f}x {plain:>14.3f}")


if __name__ == "__main__":
    main()
