"""What each optimizer's states take and how long its step is.

The adapters of LoRA r=16 on all linear layers of SmolLM2-135M: 420 tensors, 4,884,480 parameters, random gradients.
The optimizers alternate; the table gives the best of all rounds. Bitsandbytes' is there if it is installed. On a card
the paged ones are forced out.

    python benchmarks/optimizers.py --rounds 5
    python benchmarks/optimizers.py --rounds 5 --device cuda --layers 320
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from decal.training.adamw8bit import AdamW8bit
from decal.training.paged import Paged

RANK, WIDTH, KEYS, INNER = 16, 576, 192, 1536
LINEARS = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH), (WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)]
Optimizer = torch.optim.Optimizer


def adapters(layers: int, device: torch.device) -> list[nn.Parameter]:
    """Return A (r, in) and B (out, r) of every linear layer."""
    shapes = [shape for into, out in LINEARS * layers for shape in ((RANK, into), (out, RANK))]
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]


def fused(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def forced_out(inner: Callable[[list[nn.Parameter]], Optimizer], device: torch.device) -> Callable[..., Optimizer]:
    return lambda parameters: Paged(inner(parameters), device=device, free=lambda: 0)


def kinds(device: torch.device) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    found: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {"adamw": fused, "adamw8bit": AdamW8bit}
    if device.type == "cuda":
        found |= {f"paged_{name}, out": forced_out(kind, device) for name, kind in list(found.items())}
    if find_spec("bitsandbytes") is not None:
        import bitsandbytes

        found["bitsandbytes AdamW8bit"] = lambda parameters: bitsandbytes.optim.AdamW8bit(parameters)
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--layers", type=int, default=30)
    arguments.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = arguments.parse_args()
    made = {name: kind(adapters(given.layers, given.device)) for name, kind in kinds(given.device).items()}
    best = dict.fromkeys(made, float("inf"))
    for _ in range(given.rounds + 1):  # the first makes the states, which takes longer
        for name, optimizer in made.items():
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            wait(given.device)
            began = time.perf_counter()
            optimizer.step()
            wait(given.device)
            best[name] = min(best[name], time.perf_counter() - began)
    print("| optimizer | state bytes per parameter | s/step |\n|---|---|---|")
    for name, optimizer in made.items():
        parameters = optimizer.param_groups[0]["params"]
        # Each state tensor once: bitsandbytes keeps its shared maps in every parameter's state.
        held = {id(t): t.nbytes for state in optimizer.state.values() for t in state.values() if hasattr(t, "nbytes")}
        print(f"| {name} | {sum(held.values()) / sum(p.numel() for p in parameters):.3f} | {best[name]:.4f} |")


if __name__ == "__main__":
    main()
