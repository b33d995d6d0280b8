"""Rows rounded to 8-bit floats on a CUDA card: microseconds for 8,192 rows, by numbers read together and warps.

The widths are those of Llama-3.1-8B's activations and gradients; four inputs in turn, so that nothing comes from the
cache. Beside them stands what reading 16 bits and writing 8 takes at the rate of a copy.

    python benchmarks/rows_gpu.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from decal.ops import fp8, fp8_triton

ROWS = 8192
WIDTHS = (4096, 6144, 14336, 28672)
SIZES = (2048, 4096, 8192, 16384, 32768)
WARPS = (4, 8, 16, 32)


def microseconds(run: Callable[[], object], rounds: int = 30) -> float:
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / rounds


def copied(x: Tensor) -> float:
    """Return bytes per microsecond of a copy, read and written."""
    out = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() / microseconds(lambda: out.copy_(x))


def round_rows(inputs: Iterator[Tensor], out: Tensor, scale: Tensor, size: int, warps: int) -> None:
    width = out.shape[1]
    fp8_triton._rows[(len(out),)](
        next(inputs), out, scale, width, width,
        SIZE=size, LARGEST=fp8.LARGEST, SMALLEST=fp8.SMALLEST, num_warps=warps,
    )  # fmt: skip


def main() -> None:
    print(torch.cuda.get_device_name())
    for width in WIDTHS:
        inputs = [torch.randn(ROWS, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        out = torch.empty(ROWS, width, dtype=fp8.FORMAT, device="cuda")
        scale = torch.empty(ROWS, 1, device="cuda")
        found = []
        for size, warps in itertools.product(SIZES, WARPS):
            if size >= 2 * width or not 8 <= size // (32 * warps) <= 64:
                continue
            launch = partial(round_rows, itertools.cycle(inputs), out, scale, size, warps)
            found.append((microseconds(launch), size, warps))
        best = ", ".join(f"{us:.0f} ({size} by {warps} warps)" for us, size, warps in sorted(found))
        print(f"{width}: at a copy's rate {3 * ROWS * width / copied(inputs[0]):.0f}; {best}", flush=True)


if __name__ == "__main__":
    main()
