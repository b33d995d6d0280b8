"""The elementwise parts of a layer on a CUDA card: plain PyTorch, compiled (ops/fuse.py), Liger-Kernel.

Llama-3.1-8B's widths, 8,192 rows, bf16; microseconds, the median of 20 after 5; TB/s counts what must move.

    python benchmarks/elementwise_gpu.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from decal.ops import fuse, regions

N, D, F, V, S = 8192, 4096, 14336, 128256, 4096
HEADS, KV, E = 32, 8, 128


def timed(call: Callable[[], Any]) -> float:
    """Return microseconds."""
    for _ in range(5):
        call()
    times = []
    for _ in range(20):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def calls() -> dict[str, tuple[Callable[[], Any], float]]:
    """Return each region's call and the bytes that it must move."""
    x, w, dy, plus = random(N, D), random(D), random(N, D), random(N, D)
    gate, up, dh = random(N, F), random(N, F), random(N, F)
    raw = random(N // S, S, HEADS + 2 * KV, E)
    cos, sin = random(1, S, E), random(1, S, E)
    dq, dk, dv = (random(N // S, S, h, E).transpose(1, 2) for h in (HEADS, KV, KV))
    z, y = random(1024, V), torch.randint(0, V, (1024,), device="cuda")
    one, wide = 2.0 * N * D, 2.0 * N * F
    return {
        "rms_norm": (lambda: regions.rms_norm(x, w, 1e-5), 2 * one),
        "add_rms_norm": (lambda: regions.add_rms_norm(x, plus, w, 1e-5), 4 * one),
        "rms_norm_backward_plus": (lambda: regions.rms_norm_backward_plus(dy, x, w, 1e-5, plus), 4 * one),
        "rotate": (lambda: regions.rotate(raw, cos, sin, HEADS + KV), 2.0 * 2 * raw.numel()),
        "rotate_backward": (lambda: regions.rotate_backward(dq, dk, dv, cos, sin), 2.0 * 2 * raw.numel()),
        "gated": (lambda: regions.gated(gate, up, "silu"), 3 * wide),
        "gated_backward_": (lambda: regions.gated_backward_(dh, gate, up, "silu"), 6 * wide),
        "cross_entropy_": (lambda: regions.cross_entropy_(z, y), 3 * 2.0 * z.numel()),
    }


def liger() -> dict[str, Callable[[], Any]]:
    """Return Liger-Kernel's operations of the same names; none where it is not installed."""
    try:
        from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward
        from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward
    except ImportError:
        return {}
    x, w, dy = random(N, D), random(D), random(N, D)
    gate, up, dh = random(N, F), random(N, F), random(N, F)
    found: dict[str, Callable[[], Any]] = {
        "gated": lambda: swiglu_forward(gate, up),
        "gated_backward_": lambda: swiglu_backward(gate, up, dh),
        "rms_norm": lambda: rms_norm_forward(x, w, 1e-5, 0.0, "llama", None),
    }
    _, _, rstd, block, warps, casting = rms_norm_forward(x, w, 1e-5, 0.0, "llama", None)
    found["rms_norm_backward_plus"] = lambda: rms_norm_backward(dy, x, w, rstd, 0.0, casting, block, warps, False, None)
    return found


def main() -> None:
    try:
        others = liger()
    except TypeError as error:  # its signatures change between versions
        print(f"Liger-Kernel: {error}")
        others = {}
    for name, (call, size) in calls().items():
        with fuse.forced("plain"):
            plain = timed(call)
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        compiled = timed(call)
        theirs = "-"
        if name in others:
            try:
                theirs = f"{timed(others[name]):.1f}"
            except Exception as error:  # a benchmark goes on
                theirs = type(error).__name__
        print(
            f"{name:<24} plain {plain:8.1f} us  compiled {compiled:8.1f} us ({size / compiled / 1e6:.2f} TB/s; "
            f"first call {seconds:.1f} s)  Liger {theirs}",
            flush=True,
        )


if __name__ == "__main__":
    main()
