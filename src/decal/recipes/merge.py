"""Merge an adapter into its base, write a plain model, and measure what the rounding cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decal import rundir
from decal.errors import ConfigError, RunError
from decal.evaluate.prompts import Prompts
from decal.layers.adapted import Adapted
from decal.model.load import load_model, load_tokenizer, named_dtype
from decal.model.wrapper import PeftModel
from decal.recipes import compare

PROMPTS = (
    "What can you help me with?",
    "Write a short note to a colleague about tomorrow's meeting.",
    "Explain in one sentence why the sky is blue.",
    "My order has not arrived yet. What should I do?",
)
LOST = 0.9  # below this surviving share of the update people should not trust the merged model unasked


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What writing W + delta in the output's dtype does to the update, over all adapted weights."""

    survived: float  # the share of the update along its own direction: <written - W, delta> / <delta, delta>
    unchanged: float  # share of the weights with a change that are the same number after the merge


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far the merged model, read back from disk, is from base + adapter; both compute in fp32 on a CPU."""

    tokens: int
    max_logit_difference: float
    kl: float  # mean over tokens, nats: base + adapter against merged
    same_top1: float
    adapter_kl: float  # the adapter's own effect, for scale: base + adapter against base


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The new model's folder and the measurements."""

    path: Path
    base: str
    dtype: str
    bytes: int
    rounding: Rounding
    agreement: Agreement

    @property
    def lossy(self) -> bool:
        """Whether much of the update was lost to rounding, by the weights or by what the model says."""
        return self.rounding.survived < LOST or self.agreement.kl > (1 - LOST) * self.agreement.adapter_kl


def merge(
    adapter: str, out: Path, *, base: str | None = None, dtype: str | None = None, prompts: Sequence[str] = PROMPTS
) -> Merged:
    """Write base + adapter as a plain transformers model in the folder `out`.

    `dtype` None keeps the base's stored dtype. Each weight is rounded once. Raises RunError if `out` is in use.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError("the output folder is not empty", got=out, fix="Choose another --out.")
    folder = compare.result_of(adapter, rundir.ADAPTER)
    base = base or compare.base_of([folder])

    stored: Any = load_model(base, dtype="auto", device="cpu")
    wanted = main_dtype(stored) if dtype is None else named_dtype(dtype)
    if not isinstance(wanted, torch.dtype):
        raise ConfigError("unknown dtype", got=dtype, fix="Use fp32, bf16 or fp16.")
    if wanted != main_dtype(stored):  # add in fp32, so that what is rounded is the sum
        stored = load_model(base, dtype=torch.float32, device="cpu")
    model = PeftModel.from_pretrained(stored, folder)
    rounding = measure_rounding(model, wanted)
    plain: Any = model.merge_and_unload().to(wanted)

    tokenizer = compare.tokenizer_of(folder, base)
    asked = Prompts(tokenizer)
    stop_at(plain, asked.stop_ids)
    with rundir.new_folder(out) as new:
        plain.save_pretrained(new)
        tokenizer.save_pretrained(new)
    del stored, model, plain

    return Merged(
        path=out,
        base=base,
        dtype=str(wanted).removeprefix("torch."),
        bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        rounding=rounding,
        agreement=measure_agreement(base, folder, out, [asked.question(prompt) for prompt in prompts]),
    )


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that most of the weights are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


@torch.no_grad()
def measure_rounding(model: PeftModel, dtype: torch.dtype) -> Rounding:
    """Return what survives of the active adapter's change when each W + delta is written in `dtype`."""
    along = square = 0.0
    same = changed = 0
    for layer in model.modules():
        if not isinstance(layer, Adapted):
            continue
        for name in layer.active_adapters:
            W = layer.base.dense(torch.float32)
            delta = layer.get_delta_weight(name).float()
            written = (W + delta).to(dtype).float() - W.to(dtype).float()
            along += float((written.double() * delta).sum())
            square += float(delta.double().square().sum())
            moved = delta != 0
            same += int(((written == 0) & moved).sum())
            changed += int(moved.sum())
    if square == 0:
        return Rounding(survived=1.0, unchanged=0.0)
    return Rounding(survived=along / square, unchanged=same / changed)


def stop_at(model: Any, stop_ids: Sequence[int]) -> None:
    """Let the saved generation config end replies where training ended them: no adapter tells the reader any more."""
    own = model.generation_config.eos_token_id
    known = list(own) if isinstance(own, (list, tuple)) else [] if own is None else [own]
    model.generation_config.eos_token_id = list(dict.fromkeys((*stop_ids, *known))) or None


@torch.no_grad()
def measure_agreement(base: str, adapter: str, merged: Path, prompts: Sequence[str]) -> Agreement:
    """Compare the logits of base + adapter, of the merged model read from disk, and of the base alone."""
    tokenizer = load_tokenizer(str(merged))
    rows = [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in prompts]
    tuned = PeftModel.from_pretrained(load_model(base, device="cpu"), adapter)
    with_adapter = [tuned(input_ids=ids).logits[0].float() for ids in rows]
    with tuned.disable_adapter():
        without = [tuned(input_ids=ids).logits[0].float() for ids in rows]
    del tuned
    again = load_model(str(merged), device="cpu")
    from_disk = [again(input_ids=ids).logits[0].float() for ids in rows]
    target, other, plain = (torch.cat(logits) for logits in (with_adapter, from_disk, without))
    return Agreement(
        tokens=target.shape[0],
        max_logit_difference=float((target - other).abs().max()),
        kl=mean_kl(target, other),
        same_top1=float((target.argmax(-1) == other.argmax(-1)).float().mean()),
        adapter_kl=mean_kl(target, plain),
    )


def mean_kl(target_NV: Tensor, other_NV: Tensor) -> float:
    """Return the mean over rows of KL(target || other) in nats, from logits."""
    p, q = F.log_softmax(target_NV.double(), -1), F.log_softmax(other_NV.double(), -1)
    return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().clamp(min=0))
