"""The 4-bit codec on a CUDA card: decal's kernels beside cuBLAS, a bf16 copy and (where installed) bitsandbytes.

One weight of 14336 x 4096, NF4, blocks of 64, doubly quantised, bf16. Four weights in turn, so that codes come from the
card's memory and not from its cache; CUDA graphs, median of several replays (bitsandbytes' quantise, which cannot be
captured, without one). TB/s counts bytes read and written once.

    python benchmarks/nf4_gpu.py
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from decal.ops import nf4, nf4_multiply_triton, nf4_triton

OUT, IN, RANK, WEIGHTS, REPLAYS = 14336, 4096, 16, 4, 15
COUNT = OUT * IN
SINGLE, NESTED = COUNT / 2 + COUNT / 16, COUNT / 2 + COUNT / 64 * (1 + 4 / 256)  # bytes of codes and scales


def microseconds(work: Callable[[int], object], *, captured: bool = True) -> float:
    """Median time of work(i), i = 0 .. WEIGHTS - 1 in turn."""

    def all_of_it() -> None:
        for i in range(WEIGHTS):
            work(i)

    all_of_it()
    torch.cuda.synchronize()
    run = all_of_it
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_it()
        run = graph.replay
    times = []
    for _ in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / WEIGHTS)
    return statistics.median(times[3:])


def line(
    name: str, work: Callable[[int], object], moved: float, base: float | None = None, *, captured: bool = True
) -> float:
    """Print a row of the table; return the time. `base` is what the last column divides by."""
    time = microseconds(work, captured=captured)
    ratio = "" if base is None else f"{time / base:8.2f}x"
    print(f"{name:<40} {time:8.1f} us {moved / time / 1e6:6.2f} TB/s {ratio}")
    return time


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    dense = [0.02 * torch.randn(OUT, IN, device="cuda").bfloat16() for _ in range(WEIGHTS)]
    stored = [nf4_triton.quantize(w.view(-1), 64, "nf4") for w in dense]
    codes = [packed for packed, _ in stored]
    single = [absmax for _, absmax in stored]
    nested = [nf4.Nested(*nf4.double_quantize(absmax)) for absmax in single]
    out = [torch.empty_like(dense[0]) for _ in range(2)]
    A, B = torch.randn(RANK, IN, device="cuda") / 64, torch.randn(OUT, RANK, device="cuda") * 0.05

    print("(last column: over the nested decode, or over cuBLAS with as many rows)")
    line("copy bf16", lambda i: out[i % 2].copy_(dense[i]), 4 * COUNT)
    line("quantise", lambda i: nf4_triton.quantize(dense[i].view(-1), 64, "nf4"), 2 * COUNT + SINGLE)

    def decode(i: int, scales: list[Tensor] | list[nf4.Nested]) -> None:
        nf4.decode(codes[i], scales[i], out[i % 2], block=64, kind="nf4")

    line("decode", lambda i: decode(i, single), 2 * COUNT + SINGLE)
    base = line("decode, nested scales", lambda i: decode(i, nested), 2 * COUNT + NESTED)

    def plus(i: int) -> None:
        nf4.decode_plus(codes[i], nested[i], A, B, 0.5, out[i % 2], block=64, kind="nf4")

    line(f"decode + s·B·A, rank {RANK}", plus, 2 * COUNT + NESTED, base)
    for rows in (1, 8, 32):
        x = torch.randn(rows, IN, device="cuda").bfloat16()
        reference = line(f"cuBLAS bf16, {rows} rows", lambda i, x=x: torch.nn.functional.linear(x, dense[i]), 2 * COUNT)
        line(
            f"multiply, {rows} rows",
            lambda i, x=x: nf4_multiply_triton.multiply(x, codes[i], nested[i], OUT, 64, "nf4"),
            NESTED,
            reference,
        )
    if importlib.util.find_spec("bitsandbytes") is not None:
        bitsandbytes(dense, out, base)


def bitsandbytes(dense: list[Tensor], out: list[Tensor], base: float) -> None:
    """The same of bitsandbytes."""
    import bitsandbytes.functional as bnb
    from bitsandbytes import matmul_4bit as bnb_matmul

    stored = [bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True) for w in dense]
    line(
        "bitsandbytes, quantise",
        lambda i: bnb.quantize_4bit(dense[i], blocksize=64, quant_type="nf4"),
        2 * COUNT + SINGLE,
        captured=False,
    )
    line(
        "bitsandbytes, decode, nested scales",
        lambda i: bnb.dequantize_4bit(stored[i][0], stored[i][1], out=out[i % 2]),
        2 * COUNT + NESTED,
        base,
    )
    for rows in (1, 8, 32):
        x = torch.randn(rows, IN, device="cuda").bfloat16()
        line(
            f"bitsandbytes, multiply, {rows} rows",
            lambda i, x=x: bnb_matmul(x, stored[i][0].t(), quant_state=stored[i][1]),
            NESTED,
        )


if __name__ == "__main__":
    main()
