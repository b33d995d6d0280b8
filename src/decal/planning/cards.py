"""Cards, and what they keep up: memory, the rate of matrix products and of memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from decal.errors import ConfigError, nearest

# Of a data sheet's dense 16-bit rate, what a training step's products keep up for seconds: 674 of 989 TFLOP/s, measured
# on an H200 over the layers of an 8B model at 8192 rows; of its bandwidth, what a copy does: 4.06 of 4.8 TB/s there.
RATE_SHARE, BANDWIDTH_SHARE = 0.68, 0.85


@dataclass(frozen=True, kw_only=True)
class Card:
    """`memory` is in GiB, what torch can give out; `tflops` of dense bf16 (fp16) products and `bandwidth` in GB/s are

    sustained. `source` says where they come from.
    """

    name: str
    memory: float
    tflops: float
    bandwidth: float
    source: str


def _sheet(name: str, memory: float, tflops: float, bandwidth: float) -> Card:
    return Card(
        name=name,
        memory=memory,
        tflops=round(tflops * RATE_SHARE, 1),
        bandwidth=round(bandwidth * BANDWIDTH_SHARE),
        source=f"data sheet, {tflops:g} TFLOP/s x {RATE_SHARE} and {bandwidth:g} GB/s x {BANDWIDTH_SHARE}",
    )


CARDS = {
    card.name: card
    for card in (
        Card(name="h200", memory=139.8, tflops=674, bandwidth=4060, source="measured: products of an 8B layer, a copy"),
        Card(
            name="h100", memory=79.1, tflops=640, bandwidth=2880, source="copy measured; rate as an H200's, less power"
        ),
        _sheet("b200", 178.4, 2250, 8000),
        _sheet("a100-80", 79.1, 312, 2039),
        _sheet("a100-40", 39.4, 312, 1555),
        _sheet("l40s", 44.4, 362, 864),
        _sheet("a10", 22.1, 125, 600),
        _sheet("l4", 22.0, 121, 300),
        _sheet("t4", 14.6, 65, 320),
        _sheet("rtx5090", 31.4, 209.5, 1792),
        _sheet("rtx4090", 23.5, 165.2, 1008),
        _sheet("rtx3090", 23.6, 71, 936),
    )
}


def find(name: str) -> Card:
    """Return a card by name. Raises ConfigError for an unknown one."""
    card = CARDS.get(name.lower())
    if card is None:
        raise ConfigError(
            f"no card {name!r} is known{nearest(name.lower(), CARDS)}",
            fix=f"Known are {', '.join(CARDS)}. For another give --gpu 24GiB and --tflops 150.",
        )
    return card


def measured(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.1) -> Card:
    """Return this machine's own rates: a product of 1024 x 1024 and a copy, the best of a few."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    product = _best(lambda: torch.mm(a, b, out=out), device, seconds / 2)
    copied = _best(lambda: out.copy_(a), device, seconds / 2)
    return Card(
        name=device.type,
        memory=0.0,
        tflops=2 * size**3 / product / 1e12,
        bandwidth=2 * a.numel() * a.element_size() / copied / 1e9,
        source="measured here",
    )


def _best(work: object, device: torch.device, seconds: float) -> float:
    assert callable(work)
    end, times = time.perf_counter() + seconds, list[float]()
    while len(times) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)
