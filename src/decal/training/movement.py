"""Whether what is to be trained moves: measured on the weights themselves, at chosen steps only.

A whole tensor's fingerprint (the exact sum of its bits) tells whether any entry changed, at the price of reading it
once and of no memory; a few entries of each, kept from one look to the next, tell how many cannot move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLE = 64  # entries of each matrix, evenly spaced: 200 matrices give 12,800, a share within 1%
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GROUPS = (  # the part of a parameter's name, and what it is for people; the first that fits
    ("lora_embedding_A", "embedding A matrices"),
    ("lora_embedding_B", "embedding B matrices"),
    ("lora_A", "A matrices"),
    ("lora_B", "B matrices"),
    ("lora_magnitude_vector", "DoRA magnitudes"),
    ("trainable_tokens_delta", "trained token rows"),
    ("modules_to_save", "modules_to_save tensors"),
    ("expert", "expert weights"),
)


def group_of(name: str) -> str:
    """Return what a parameter is, in words."""
    if ".experts." in name and "lora_" in name:
        return "expert " + group_of(name.replace("experts", ""))
    return next((words for part, words in GROUPS if part in name), "weights")


@dataclass(frozen=True, kw_only=True)
class Look:
    """The weights at one moment: by name, each one's fingerprint and a sample of its entries (on the CPU, fp32)."""

    prints: dict[str, int]
    samples: dict[str, Tensor]


@torch.no_grad()
def look(named: Iterable[tuple[str, nn.Parameter]]) -> Look:
    """Read the weights once. Waits for the device."""
    names, prints, samples = [], [], []
    for name, parameter in named:
        flat = parameter.detach().reshape(-1)
        names.append(name)
        prints.append(flat.view(BITS[flat.element_size()]).sum())
        samples.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].float())
    if not names:
        return Look(prints={}, samples={})
    sums = torch.stack(prints).tolist()
    parts = torch.cat(samples).cpu().split_with_sizes([len(sample) for sample in samples])
    return Look(prints=dict(zip(names, sums, strict=True)), samples=dict(zip(names, parts, strict=True)))


def unmoved(start: Look, now: Look, rates: dict[str, float], steps_of: dict[str, torch.dtype]) -> list[str]:
    """Return the parameters of which no entry has changed, though the rate would have changed their bits.

    `rates` are the highest learning rates since `start`: one below eight units in the last place of a parameter's
    typical entry says nothing of the gradient, only of the rate (`stalled` is for that).
    """
    return [
        name
        for name, before in start.prints.items()
        if now.prints[name] == before and rates[name] > 8 * _ulp(_typical(start.samples[name]), steps_of[name])
    ]


def stalled(before: Look, now: Look, rates: dict[str, float], dtypes: dict[str, torch.dtype]) -> dict[str, float]:
    """Return, by group, the share of entries that stood still and cannot move: a step of AdamW, which is about the
    rate, is less than half their last place and is rounded away, every time anew."""
    still: dict[str, list[Tensor]] = {}
    for name, old in before.samples.items():
        tight = rates[name] < _ulps(old, dtypes[name])
        still.setdefault(group_of(name), []).append((old == now.samples[name]) & tight & (old != 0))
    return {group: float(torch.cat(flags).float().mean()) for group, flags in still.items()}


def _typical(sample: Tensor) -> float:
    return float(sample.abs().median()) if len(sample) else 0.0


def _ulp(value: float, dtype: torch.dtype) -> float:
    return float(_ulps(torch.tensor([value]), dtype))


def _ulps(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance from each value to the next larger one of that dtype."""
    _, exponent = torch.frexp(values.abs().clamp(min=torch.finfo(torch.float32).tiny))
    return torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps / 2), exponent)
