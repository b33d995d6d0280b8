"""Merge an adapter into its base, write a plain model, and measure what the rounding cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from decal import rundir
from decal.data import prepare
from decal.data.mask import Sample
from decal.errors import ConfigError, RunError
from decal.evaluate.prompts import Prompts
from decal.layers.adapted import Adapted
from decal.layers.coded import CodedLinear
from decal.model import quantized, quantizer, targets
from decal.model.load import compute_in_fp32, load_model, meta_model, named_dtype
from decal.model.wrapper import PeftModel
from decal.recipes import compare
from decal.spec import DataConfig, QuantConfig

PROMPTS = (
    "What can you help me with?",
    "Write a short note to a colleague about tomorrow's meeting.",
    "Explain in one sentence why the sky is blue.",
    "My order has not arrived yet. What should I do?",
)
PROOF_ROWS, PROOF_LENGTH = 32, 256  # of the user's data
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
class Candidate:
    """One way to write the merged model, measured in memory against what was trained, on the same rows."""

    into: str  # 16bit: the original weights + the change; dequantized: the decoded codes + it; nf4: those, coded again
    dtype: str
    rounding: Rounding
    kl: float  # mean over tokens, nats: trained stack against merged
    base_kl: float  # the untouched base against merged
    perplexity: float
    same_top1: float

    @property
    def lost(self) -> bool:
        """Whether the merged model is nearer to the untouched base than to what was trained."""
        return self.kl > self.base_kl


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The new model's folder and the measurements; `perplexity` is the trained stack's on the rows of the proof."""

    path: Path
    base: str
    into: str
    dtype: str
    bytes: int
    rounding: Rounding
    agreement: Agreement
    candidates: tuple[Candidate, ...]
    perplexity: float

    @property
    def lossy(self) -> bool:
        """Whether much of the update was lost to rounding, by the weights or by what the model says."""
        return self.rounding.survived < LOST or self.agreement.kl > (1 - LOST) * self.agreement.adapter_kl


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What was trained: a base, in the storage format of training, and the adapter's folder."""

    base: str
    quantize: QuantConfig | None
    adapter: str

    def load(self, dtype: torch.dtype | None = None) -> PeftModel:
        model = load_model(self.base, dtype=dtype, device="cpu", quantize=self.quantize)
        return PeftModel.from_pretrained(model, self.adapter).eval()


def merge(
    adapter: str,
    out: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    into: str = "auto",
    data: str | None = None,
    force: bool = False,
    prompts: Sequence[str] = PROMPTS,
) -> Merged:
    """Write base + adapter as a plain transformers model in the folder `out`, the way that measures best.

    An adapter that was trained on a 4-bit base learnt to correct that base: the sum with the 16-bit original is another
    model. Each way is measured on rows of `data` (or on `prompts`) against the trained stack, and the one with the
    smallest KL is written; `into` other than "auto" names one. `dtype` None keeps the base's stored dtype. Each weight
    is rounded once. Raises RunError if `out` is in use, or if the result is nearer to the untouched base than to what
    was trained (unless `force`).
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError("the output folder is not empty", got=out, fix="Choose another --out.")
    folder = compare.result_of(adapter, rundir.ADAPTER)
    base = base or compare.base_of([folder])
    stack = Stack(base=base, quantize=compare.quantize_of([folder]), adapter=folder)
    ways = ways_for(stack, into)
    stored = main_dtype(load_model(base, dtype="auto", device="cpu"))
    wanted = stored if dtype is None else named_dtype(dtype)
    if not isinstance(wanted, torch.dtype):
        raise ConfigError("unknown dtype", got=dtype, fix="Use fp32, bf16 or fp16.")

    tokenizer = compare.tokenizer_of(folder, base)
    asked = Prompts(tokenizer)
    rows = proof_rows(tokenizer, asked, data, prompts)
    tuned = stack.load()
    trained = logits_of(tuned, rows)
    with tuned.disable_adapter():
        untouched = logits_of(tuned, rows)
    del tuned
    candidates = [measure(stack, way, wanted, stored, rows, trained, untouched) for way in ways]
    best = min(candidates, key=lambda c: c.kl)
    if best.lost and not force:
        raise RunError(
            f"the merged model would be nearer to the untouched base (KL {best.base_kl:.3g}) than to what was trained "
            f"(KL {best.kl:.3g}): {1 - best.rounding.survived:.0%} of the update is lost in {best.dtype}",
            got=f"the best of {', '.join(c.into for c in candidates)}",
            fix="Merge with --dtype fp32, or serve the adapter beside its base. --force writes it regardless.",
        )
    plain, _ = summed(stack, best.into, wanted, stored)
    stop_at(plain, asked.stop_ids)
    with rundir.new_folder(out) as new:
        quantized.write(plain, new) if best.into == "nf4" else plain.save_pretrained(new)
        tokenizer.save_pretrained(new)
    del plain

    return Merged(
        path=out,
        base=base,
        into=best.into,
        dtype=best.dtype,
        bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        rounding=best.rounding,
        agreement=agreement_of(out, rows, trained, untouched),
        candidates=tuple(candidates),
        perplexity=perplexity(trained, rows),
    )


def ways_for(stack: Stack, into: str) -> list[str]:
    """Return the ways to measure. Raises ConfigError for one that the adapter's base does not have."""
    coded = stack.quantize is not None
    known = ["16bit", "dequantized", "nf4"] if coded else ["16bit"]
    trained_on: str = stack.quantize.format if stack.quantize else "its stored dtype"
    if stack.quantize is not None and stack.quantize.format == "int8":
        known.remove("nf4")
    elif stack.quantize is not None and quantizer.planned_experts(meta_model(stack.base), stack.quantize):
        known.remove("nf4")
        trained_on += ", with experts, which the file layout of nf4 does not have"
    if into == "auto":
        return known
    if into not in known:
        raise ConfigError(
            f"this adapter cannot be merged into {into!r}",
            got=f"trained on a base in {trained_on}",
            fix=f"Use auto, {', '.join(known)}.",
        )
    return [into]


@torch.no_grad()
def summed(stack: Stack, way: str, wanted: torch.dtype, stored: torch.dtype) -> tuple[Any, Rounding]:
    """Return the merged plain model, each weight rounded once, and what the rounding did to the update."""
    if way == "16bit":
        wide = stored if wanted == stored else torch.float32  # add in fp32, so that what is rounded is the sum
        model = Stack(base=stack.base, quantize=None, adapter=stack.adapter).load(wide)
        rounding = measure_rounding(model, lambda W: W.to(wanted).float())
        return model.merge_and_unload().to(wanted), rounding
    assert stack.quantize is not None
    model = stack.load(torch.float32)
    names = [
        name for name, m in targets.modules(model.get_base_model()) if isinstance(targets.original(m), CodedLinear)
    ]
    if way == "dequantized":
        rounding = measure_rounding(model, lambda W: W.to(wanted).float())
        return quantized.dense(model.merge_and_unload()).to(wanted), rounding
    settings = stack.quantize
    again = partial(quantized.coded_and_back, settings=settings)
    rounding = measure_rounding(model, again)
    return quantized.encode(quantized.dense(model.merge_and_unload()), names, settings), rounding


def measure(
    stack: Stack,
    way: str,
    wanted: torch.dtype,
    stored: torch.dtype,
    rows: Sequence[Tensor],
    trained: Tensor,
    untouched: Tensor,
) -> Candidate:
    """Make the merged model of one way and compare its logits, computed in fp32."""
    plain, rounding = summed(stack, way, wanted, stored)
    compute_in_fp32(plain)
    merged = logits_of(plain, rows)
    return Candidate(
        into=way,
        dtype=str(stack.quantize.format if way == "nf4" and stack.quantize else wanted).removeprefix("torch."),
        rounding=rounding,
        kl=mean_kl(trained, merged),
        base_kl=mean_kl(untouched, merged),
        perplexity=perplexity(merged, rows),
        same_top1=float((trained.argmax(-1) == merged.argmax(-1)).float().mean()),
    )


def proof_rows(tokenizer: Any, asked: Prompts, data: str | None, prompts: Sequence[str]) -> list[Tensor]:
    """Return the token ids (1, T) to compare on: up to PROOF_ROWS of the user's own rows, else the prompts."""
    if data is None:
        texts = [asked.question(prompt) for prompt in prompts]
        return [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]
    config = DataConfig(path=data, max_length=PROOF_LENGTH, packing=False)
    prepared = prepare.prepare(config, tokenizer, seed=0)
    samples = cast(Iterable[Sample], prepared.train)  # not streamed
    return [torch.tensor([sample.ids]) for sample in islice(samples, PROOF_ROWS)]


@torch.no_grad()
def logits_of(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """Return the logits of all rows, (tokens, V) fp32."""
    return torch.cat([model(input_ids=ids).logits[0].float() for ids in rows])


def perplexity(logits: Tensor, rows: Sequence[Tensor]) -> float:
    """Return exp of the mean cross entropy of each next token."""
    losses = [
        F.cross_entropy(part[:-1].double(), ids[0, 1:], reduction="none")
        for part, ids in zip(torch.split(logits, [ids.shape[1] for ids in rows]), rows, strict=True)
    ]
    return float(torch.cat(losses).mean().exp())


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that most of the weights are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


@torch.no_grad()
def measure_rounding(model: PeftModel, rounded: Callable[[Tensor], Tensor]) -> Rounding:
    """Return what survives of the active adapter's change when each W + delta is written as rounded(W + delta)."""
    along = square = 0.0
    same = changed = 0
    for layer in model.modules():
        if not isinstance(layer, Adapted):
            continue
        for name in layer.active_adapters:
            W = layer.base.dense(torch.float32)
            delta = layer.get_delta_weight(name).float()
            written = rounded(W + delta) - rounded(W)
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


def agreement_of(merged: Path, rows: Sequence[Tensor], trained: Tensor, untouched: Tensor) -> Agreement:
    """Compare the model read back from disk with the trained stack's logits, and those with the untouched base's."""
    from_disk = logits_of(load_model(str(merged), device="cpu"), rows)
    return Agreement(
        tokens=trained.shape[0],
        max_logit_difference=float((trained - from_disk).abs().max()),
        kl=mean_kl(trained, from_disk),
        same_top1=float((trained.argmax(-1) == from_disk.argmax(-1)).float().mean()),
        adapter_kl=mean_kl(trained, untouched),
    )


def mean_kl(target_NV: Tensor, other_NV: Tensor) -> float:
    """Return the mean over rows of KL(target || other) in nats, from logits."""
    p, q = F.log_softmax(target_NV.double(), -1), F.log_softmax(other_NV.double(), -1)
    return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().clamp(min=0))
