"""Causal attention on a CUDA card, forward and with its backward: each kernel that is there, on a layer's shapes.

Heads and widths of Llama-3.1-8B: 32 heads of queries and 8 of keys, 128 wide, in bf16; whole rows, and the same tokens
as packed samples of 1 to 1,023 tokens. TFLOP/s counts what a causal mask leaves. Each result is compared with cuDNN's
(packed: with torch's own FlashAttention).

    python benchmarks/attention_gpu.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KEYS, WIDTH = 32, 8, 128
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, H, S, E), k, v (B, K, S, E) -> (B, S, H, E)


def by_torch(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute.interface import flash_attn_func

    found: Any = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
    return found[0] if isinstance(found, tuple) else found


def flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def packed_by_torch(bounds: Tensor, longest: int) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = varlen_attn(flat(q), flat(k), flat(v), bounds, bounds, longest, longest, window_size=(-1, 0))
        return out.view(q.shape[0], q.shape[2], HEADS, WIDTH)

    return attend


def packed_flash4(bounds: Tensor, longest: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn.cute.interface import flash_attn_varlen_func

        found: Any = flash_attn_varlen_func(
            flat(q), flat(k), flat(v), cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest,
            max_seqlen_k=longest, causal=True,
        )  # fmt: skip
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.view(q.shape[0], q.shape[2], HEADS, WIDTH)

    return attend


def milliseconds(run: Callable[[], object], rounds: int = 20) -> float:
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / rounds


def measure(name: str, attend: Attend, rows: int, length: int, pairs: float, expected: list[Tensor] | None) -> Any:
    """Print a line of times; return the result and the gradients, None if the kernel is not there."""
    make = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(rows, length, heads, WIDTH, generator=make, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (HEADS, KEYS, KEYS)
    )
    dy = torch.randn(rows, length, HEADS, WIDTH, generator=make, device="cuda", dtype=torch.bfloat16)

    def both() -> list[Tensor]:
        y = attend(q, k, v)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]

    try:
        found = both()
        with torch.no_grad():
            forward = milliseconds(lambda: attend(q, k, v))
        whole = milliseconds(both)
    except Exception as error:
        print(json.dumps({"kernel": name, "rows": rows, "length": length, "failed": repr(error)[:300]}), flush=True)
        return None
    apart = [] if expected is None else [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    flops = 4 * HEADS * WIDTH * pairs
    print(
        json.dumps(
            {
                "kernel": name,
                "rows": rows,
                "length": length,
                "forward_ms": round(forward, 3),
                "forward_tflops": round(flops / forward / 1e9),
                "backward_ms": round(whole - forward, 3),
                "backward_tflops": round(2.5 * flops / (whole - forward) / 1e9),
                "apart": [f"{a:.1e}" for a in apart],
            }
        ),
        flush=True,
    )
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    for rows, length in ((2, 4096), (4, 2048)):
        expected = None
        pairs = rows * length * (length + 1) / 2
        kernels: dict[str, Attend] = {
            "cuDNN": by_torch(SDPBackend.CUDNN_ATTENTION),
            "FlashAttention 2 (torch)": by_torch(SDPBackend.FLASH_ATTENTION),
            "FlashAttention 4": flash4,
        }
        for name, attend in kernels.items():
            found = measure(name, attend, rows, length, pairs, expected)
            expected = expected or found
    make = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < 8192:
        left = 4096 - sum(lengths) % 4096  # a sample ends with its row
        lengths.append(min(int(torch.randint(1, 1024, (), generator=make)), left))
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    pairs, expected = sum(n * (n + 1) / 2 for n in lengths), None
    packed = {"packed, FlashAttention 2 (torch)": packed_by_torch, "packed, FlashAttention 4": packed_flash4}
    for name, way in packed.items():
        found = measure(name, way(bounds, 1024), 2, 4096, pairs, expected)
        expected = expected or found


if __name__ == "__main__":
    main()
