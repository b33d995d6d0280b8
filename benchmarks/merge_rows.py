"""Where forming W + s·B·A for one product begins to pay: the two ways of one adapted layer, forward and backward.

Rank 16, fp32, the shapes of small models; the cheaper way of each number of rows, and the break-even that follows. The
constant MERGE_ROWS in decal/layers/adapted.py is set from it.

    python benchmarks/merge_rows.py [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from decal import LoraConfig, get_peft_model
from decal.layers import adapted

SHAPES = ((576, 576), (576, 1536), (1536, 576), (2048, 2048))
ROWS = (16, 32, 64, 128, 256, 512, 1024, 2048)
REPEATS = 15


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        return y


def step_ms(model: nn.Module, x: torch.Tensor, *, merge: bool) -> float:
    """Median time of one forward and backward pass by merging on the fly, or by the side branch."""
    adapted.MERGE_ROWS[x.device.type] = 0 if merge else 1 << 40
    times = []
    for _ in range(REPEATS + 3):
        _wait(x)
        began = time.perf_counter()
        model(x).sum().backward()
        _wait(x)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(f"{'in x out':>12} {'rows':>5} {'merged ms':>10} {'side ms':>8} {'merged/side':>12}")
    for inputs, outputs in SHAPES:
        model = get_peft_model(One(inputs, outputs), LoraConfig(r=16, target_modules=["layer"])).to(args.device)
        for rows in ROWS:
            x = torch.randn(rows, inputs, device=args.device, requires_grad=True)
            merged, side = step_ms(model, x, merge=True), step_ms(model, x, merge=False)
            print(f"{inputs:>5} x {outputs:<4} {rows:>5} {merged:>10.3f} {side:>8.3f} {merged / side:>11.2f}x")


if __name__ == "__main__":
    main()
