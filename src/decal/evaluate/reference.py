"""Reference logits: what an adapter on its base says next after eight fixed prompts, to be replayed anywhere.

A server that ignores a scale, a saved module or the template gives other logits; nothing else that an adapter carries
shows this.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decal.evaluate import asking
from decal.evaluate.closeness import mean_kl
from decal.files import peft_files
from decal.files.sealed import Answer, Reference
from decal.model.evaluating import evaluating
from decal.model.wrapper import PeftModel

TOP = 16  # logits kept of each prompt: with the logsumexp they give the probability of all others together
DIGITS = 9  # an fp32 number is exact with them
WIDE = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far replayed logits may lie from the sealed ones, and why so far."""

    logits: float
    kl: float  # nats
    why: str


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How far the logits of the replayed prompts lie from the sealed ones, and how far they may."""

    max_difference: float
    kl: float  # of the worst prompt, nats: sealed against replayed, over the sealed tokens and all others as one
    same_top1: int
    prompts: int
    tolerance: Tolerance

    @property
    def within(self) -> bool:
        """Whether both are within the tolerance; a number that is not finite is not."""
        return self.max_difference <= self.tolerance.logits and self.kl <= self.tolerance.kl


def reference(model: PeftModel, tokenizer: Any) -> Reference:
    """Return the adapter's answers to the prompts, without dropout; the model's modes and all generators stay."""
    ids, templated = asking.token_ids(tokenizer)
    adapted = last_logits(model, ids)
    with model.disable_adapter():
        plain = last_logits(model, ids)
    return Reference(
        answers=tuple(answer(one, logits) for one, logits in zip(ids, adapted, strict=True)),
        templated=templated,
        device=device_of(model).type,
        dtype=peft_files.name_of(adapted.dtype),
        threads=torch.get_num_threads(),
        adapter_kl=float(f"{mean_kl(adapted, plain):.3g}"),
    )


def last_logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits after each row's last token, (rows, V), as computed, from one pass in evaluation mode."""
    device = device_of(model)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    lasts = torch.tensor([len(row) - 1 for row in rows])
    where, place = torch.unique(lasts, return_inverse=True)
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    few = "logits_to_keep" in inspect.signature(plain.forward).parameters  # a whole vocabulary for each token is large
    extra = {"logits_to_keep": where.to(device)} if few else {}
    with evaluating(model):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **extra).logits
    at = place if few else lasts
    kept: Tensor = logits[torch.arange(len(rows)), at.to(logits.device)].cpu()
    return kept


def answer(ids: Sequence[int], logits: Tensor) -> Answer:
    """Return what is kept of one prompt's logits (V,)."""
    logits = logits.float()
    values, top = logits.topk(min(TOP, len(logits)))
    return Answer(
        ids=tuple(ids),
        top=tuple(top.tolist()),
        logits=tuple(float(f"{value:.{DIGITS}g}") for value in values.tolist()),
        logsumexp=float(f"{float(torch.logsumexp(logits.double(), 0)):.12g}"),
    )


def replay(model: Any, sealed: Reference) -> Replay:
    """Run the sealed prompts' ids through `model` and compare."""
    logits = last_logits(model, [one.ids for one in sealed.answers])
    return compare(sealed, logits, tolerance=tolerance(sealed, device_of(model).type, logits.dtype))


def compare(sealed: Reference, logits: Tensor, *, tolerance: Tolerance) -> Replay:
    """Compare logits (prompts, V) with the sealed ones."""
    differences, kls, same = [], [], 0
    for one, now in zip(sealed.answers, logits, strict=True):
        found = now[list(one.top)].double()
        wanted = torch.tensor(one.logits, dtype=torch.float64)
        differences.append(float((found - wanted).abs().max()))
        kls.append(_kl_of_parts(wanted - one.logsumexp, found - torch.logsumexp(now.double(), 0)))
        same += int(now.argmax()) == one.top[0]
    return Replay(
        max_difference=_worst(differences),
        kl=_worst(kls),
        same_top1=same,
        prompts=len(sealed.answers),
        tolerance=tolerance,
    )


def tolerance(sealed: Reference, device: str, dtype: torch.dtype) -> Tolerance:
    """Return how far replayed logits may lie from the sealed ones on this device, in this dtype."""
    if sealed.dtype not in WIDE or peft_files.name_of(dtype) not in WIDE:
        # 2^-9 of a logit of 16 is 0.03, and each layer rounds before it: 0.23 and 5e-4 in 6 layers of bf16.
        return Tolerance(logits=1.0, kl=2e-2, why="16-bit numbers keep two to three digits")
    if sealed.device != device:
        return Tolerance(logits=1e-2, kl=1e-5, why="another device sums in another order, with other exponentials")
    return Tolerance(logits=2e-3, kl=1e-6, why="fp32 on the same kind of device; only the order of sums may differ")


def device_of(model: Any) -> torch.device:
    """Return where a model takes its ids."""
    device: torch.device = next(model.parameters()).device
    return device


def _kl_of_parts(sealed: Tensor, found: Tensor) -> float:
    """Return KL(sealed || found) over the listed tokens (log probabilities) and one part for all others."""
    p, q = sealed.exp(), found.exp()
    rest_p, rest_q = max(0.0, 1 - float(p.sum())), max(1e-9, 1 - float(q.sum()))  # no smaller than what 1 - x rounds
    kl = float((p * (sealed - found)).sum())
    if rest_p > 0:
        kl += rest_p * math.log(rest_p / rest_q)
    return max(0.0, kl) if math.isfinite(kl) else math.inf


def _worst(values: Sequence[float]) -> float:
    return max(value if math.isfinite(value) else math.inf for value in values)
