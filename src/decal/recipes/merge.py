"""Merge an adapter into its base, write a plain model, and measure what that cost.

Linear weights are read, summed, measured and written one at a time, so a model larger than memory can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from decal import rundir
from decal.data import prepare
from decal.data.mask import Sample
from decal.errors import ConfigError, DataError, RunError, Unsupported
from decal.evaluate import asking
from decal.evaluate.closeness import Rounding, Tally, logits_of, mean_kl, perplexity
from decal.evaluate.prompts import Prompts
from decal.files import peft_files, sealed
from decal.layers.coded import Coded, CodedLinear
from decal.layers.coded_experts import CodedExperts
from decal.layers.streamed import StreamedLinear
from decal.model import quantized, sealing, summed
from decal.model.load import compute_in_fp32, load_model, named_dtype
from decal.model.wrapper import PeftModel
from decal.ops import workspace
from decal.recipes import compare
from decal.spec import DataConfig, PeftConfig, QuantConfig, TaskType

PROMPTS = (
    "What can you help me with?",
    "Write a short note to a colleague about tomorrow's meeting.",
    "Explain in one sentence why the sky is blue.",
    "My order has not arrived yet. What should I do?",
)
PROOF_TOKENS, PROOF_LENGTH = 512, 128  # in all, and of one row: a large model passes them in a minute on a CPU
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODED = "nf4"  # the way that codes again, whichever 4-bit format it is
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LOST = 0.9  # below this surviving share of the update people should not trust the merged model unasked


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
    """One way to write the merged model, measured against what was trained, on the same rows."""

    into: str  # 16bit: the original weights + the change; dequantized: the decoded codes + it; nf4: those, coded again
    dtype: str  # what the weights are written in
    rounding: Rounding
    kl: float  # mean over tokens, nats: trained stack against merged
    base_kl: float  # the untouched base against merged
    perplexity: float
    same_top1: float

    @property
    def lost(self) -> bool:
        """Whether the merged model is nearer to the untouched base than to what was trained."""
        return not self.kl < math.inf or self.kl > self.base_kl


class LostUpdate(RunError):
    """The merge would erase what was trained; `candidates` are the measurements that say so."""

    def __init__(self, what: str, *, got: object, fix: str, candidates: tuple[Candidate, ...]) -> None:
        super().__init__(what, got=got, fix=fix)
        self.candidates = candidates


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The new model's folder and the measurements; `perplexity` is the trained stack's on the rows of the proof."""

    path: Path
    base: str
    trained_on: str | None  # the formats that the base was stored in; None: as its checkpoint is
    into: str
    dtype: str
    bytes: int
    rounding: Rounding
    agreement: Agreement
    candidates: tuple[Candidate, ...]
    perplexity: float
    proven: bool  # False: the adapter does not say on which weights, in which format, it was trained

    @property
    def lossy(self) -> bool:
        """Whether much of the update was lost to rounding, by the weights or by what the model says."""
        return not self.rounding.survived >= LOST or self.agreement.kl > (1 - LOST) * self.agreement.adapter_kl


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What was trained: a base, in the storage format of training, and the adapter's folder."""

    base: str
    quantize: QuantConfig | None
    adapter: str
    any_base: bool = False  # also another one than the adapter's seal names

    def load(self, dtype: torch.dtype | None = None) -> PeftModel:
        """Load it with its linear weights left in their files."""
        model: Any = load_model(self.base, dtype=dtype, device="cpu", quantize=self.quantize, stream=True)
        trained_on = compare.seal_of([self.adapter]).quantize
        # A merge measures what another storage format does: that needs no warning.
        model.seal = sealed.UNSEALED if self.any_base else replace(model.seal, quantize=trained_on)
        return PeftModel.from_pretrained(model, self.adapter).eval()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The rows to compare on, and the logits (tokens, V) fp32 of what was trained and of its untouched base."""

    rows: list[Tensor]
    trained: Tensor
    untouched: Tensor


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

    An adapter that was trained on a 4-bit base learnt to correct that base: the sum with the 16-bit original is
    another model. Each way, in each dtype, is measured on rows of `data` (or on `prompts`) against the trained stack.
    Written is the one with the smallest KL among those in the base's stored dtype and the coded one; `into` and `dtype`
    narrow what is measured and chosen from. Each weight is rounded once. Raises RunError if `out` is in use, or if the
    result is nearer to the untouched base than to what was trained; AdapterError if the base is not the one that the
    adapter was trained on (unless `force`).
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError("the output folder is not empty", got=out, fix="Choose another --out.")
    folder = compare.result_of(adapter, rundir.ADAPTER)
    base = compare.base_of([folder]) if base is None else compare.result_of(base, rundir.MODEL)
    refuse_other_kind(folder)
    seal = compare.seal_of([folder])
    stack = Stack(base=base, quantize=seal.quantize, adapter=folder, any_base=force)
    tokenizer = compare.tokenizer_of(folder, base)
    if not force:
        asking.refuse(seal, tokenizer, sealing.versions(), where=folder)
    asked = Prompts(tokenizer)
    tuned = stack.load()
    stored = main_dtype(tuned)
    wanted = stored if dtype is None else named_dtype(dtype)
    if not isinstance(wanted, torch.dtype):
        raise ConfigError("a merged model needs one dtype", got=dtype, fix="Use fp32, bf16 or fp16.")
    ways = ways_for(tuned, stack, into)
    proof = prove(tuned, proof_rows(tokenizer, asked, data, prompts))
    del tuned

    dtypes = dict.fromkeys([wanted, *(DTYPES if dtype is None else ())])
    candidates = [
        measure(stack, way, each, stored, proof) for way in ways for each in (dtypes if way != CODED else [None])
    ]
    best = min((c for c in candidates if c.into == CODED or c.dtype == peft_files.name_of(wanted)), key=lambda c: c.kl)
    if best.lost and not force:
        refuse_lost(best, candidates)
    plain = load_summed(stack, best.into, None if best.into == CODED else wanted, stored, None)
    stop_at(plain, asked.stop_ids)
    write(plain, tokenizer, out)
    del plain

    return Merged(
        path=out,
        base=base,
        trained_on=None if stack.quantize is None else stack.quantize.told,
        into=best.into,
        dtype=best.dtype,
        bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        rounding=best.rounding,
        agreement=agreement_of(out, proof),
        candidates=tuple(candidates),
        perplexity=perplexity(proof.trained, proof.rows),
        proven=seal.base_fingerprint is not None,
    )


def write(plain: Any, tokenizer: Any, out: Path) -> None:
    """Write model and tokenizer into the folder `out`, whole or not at all."""
    workspace.release()
    with rundir.new_folder(out) as new:
        quantized.write(plain, new)
        tokenizer.save_pretrained(new)


def refuse_other_kind(adapter: str) -> None:
    """Raise Unsupported for an adapter of a model that is no causal language model."""
    if PeftConfig.from_pretrained(adapter).task_type not in (None, TaskType.CAUSAL_LM):
        raise Unsupported(
            "decal merge compares what language models say next, and this adapter is of another kind",
            fix="Merge it in Python: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().",
        )


def refuse_lost(best: Candidate, candidates: Sequence[Candidate]) -> None:
    """Raise RunError for a merge that erases what was trained; name a way that does not, if one was measured."""
    kept = [c for c in candidates if not c.lost]
    other = min(kept, key=lambda c: c.kl) if kept else None
    way = "Merge with --into auto, which measures the other ways"
    if other is not None:
        dtype = "" if other.into == CODED else f" --dtype {SHORT.get(other.dtype, other.dtype)}"
        way = f"Merge with --into {other.into}{dtype}, which keeps {other.rounding.survived:.0%} of it"
    elif len(candidates) > 1 or best.into == "16bit":
        way = "Train longer or at a higher rate"
    raise LostUpdate(
        f"the merged model would be nearer to the untouched base (KL {best.base_kl:.3g}) than to what was trained "
        f"(KL {best.kl:.3g}): {1 - best.rounding.survived:.0%} of the update is lost in {best.dtype}",
        got=f"measured: {', '.join(c.into if c.into == c.dtype else f'{c.into} in {c.dtype}' for c in candidates)}",
        fix=f"{way}, or serve the adapter beside its base. --force writes it regardless.",
        candidates=tuple(candidates),
    )


def ways_for(tuned: PeftModel, stack: Stack, into: str) -> list[str]:
    """Return the ways to measure. Raises ConfigError for one that the adapter's base does not have."""
    layers = [m for m in tuned.modules() if isinstance(m, Coded)]
    coded = [m for m in layers if not isinstance(m, StreamedLinear) or m.form is not None]
    known = [] if coded and stack.quantize is None else ["16bit"]  # a checkpoint of codes has no original
    trained_on = stack.quantize.told if stack.quantize else "its stored dtype"
    if coded:
        known.append("dequantized")
    if any(isinstance(m, CodedExperts) for m in coded):
        trained_on += ", with experts, which the file layout of nf4 does not have"
    elif coded and (stack.quantize is None or stack.quantize.has_files):
        known.append(CODED)
    if into == "auto":
        return known
    if into not in known:
        raise ConfigError(
            f"this adapter cannot be merged into {into!r}",
            got=f"trained on a base in {trained_on}",
            fix=f"Use auto, {', '.join(known)}.",
        )
    return [into]


def load_summed(stack: Stack, way: str, dtype: torch.dtype | None, stored: torch.dtype, tally: Tally | None) -> Any:
    """Return the merged plain model of one way, each weight rounded once to `dtype` (None: coded again)."""
    source = replace(stack, quantize=None) if way == "16bit" else stack
    # What is not streamed is summed in the dtype that it is loaded in: wide, unless it is written as it is stored.
    wide = stored if dtype in (stored, None) else torch.float32
    return summed.merged(source.load(wide), dtype=dtype, observe=None if tally is None else tally.add)


def measure(stack: Stack, way: str, dtype: torch.dtype | None, stored: torch.dtype, proof: Proof) -> Candidate:
    """Make the merged model of one way and compare its logits, computed in fp32."""
    tally = Tally()
    plain = load_summed(stack, way, dtype, stored, tally)
    compute_in_fp32(plain)
    merged = logits_of(plain, proof.rows)
    coded = stack.quantize.format if stack.quantize is not None else CODED
    return Candidate(
        into=way,
        dtype=coded if dtype is None else peft_files.name_of(dtype),
        rounding=tally.rounding(),
        kl=mean_kl(proof.trained, merged),
        base_kl=mean_kl(proof.untouched, merged),
        perplexity=perplexity(merged, proof.rows),
        same_top1=float((proof.trained.argmax(-1) == merged.argmax(-1)).float().mean()),
    )


def proof_rows(tokenizer: Any, asked: Prompts, data: str | None, prompts: Sequence[str]) -> list[Tensor]:
    """Return the token ids (T,) to compare on: up to PROOF_TOKENS of the user's own rows, else of the prompts."""
    if data is None:
        texts = [asked.question(prompt) for prompt in prompts]
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    else:
        config = DataConfig(path=data, max_length=PROOF_LENGTH, packing=False)
        samples = cast(Iterable[Sample], prepare.prepare(config, tokenizer, seed=0).train)  # not streamed
        rows = [sample.ids for sample in samples]
    kept: list[Tensor] = []
    left = PROOF_TOKENS
    for ids in rows:
        part = ids[: min(PROOF_LENGTH, left)]
        if len(part) > 1:
            kept.append(torch.tensor(part))
            left -= len(part)
    if not kept:
        raise DataError("no row has two tokens to compare on", got=data, fix="Give --data with longer rows.")
    return kept


def prove(tuned: PeftModel, rows: list[Tensor]) -> Proof:
    """Return what merged models are compared with."""
    trained = logits_of(tuned, rows)
    with tuned.disable_adapter():
        return Proof(rows=rows, trained=trained, untouched=logits_of(tuned, rows))


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that most of the weights are stored in, or were before they were coded."""
    sizes: dict[torch.dtype, int] = {}
    for module in model.modules():
        own = [(p.dtype, p.numel()) for p in module.parameters(recurse=False)]
        if isinstance(module, CodedLinear):
            own = [(module.dtype, module.in_features * module.out_features)]
        for dtype, size in own:
            sizes[dtype] = sizes.get(dtype, 0) + size
    return max(sizes, key=lambda dtype: sizes[dtype])


def stop_at(model: Any, stop_ids: Sequence[int]) -> None:
    """Let the saved generation config end replies where training ended them: no adapter tells the reader any more."""
    own = model.generation_config.eos_token_id
    known = list(own) if isinstance(own, (list, tuple)) else [] if own is None else [own]
    model.generation_config.eos_token_id = list(dict.fromkeys((*stop_ids, *known))) or None


def agreement_of(merged: Path, proof: Proof) -> Agreement:
    """Compare the model read back from disk with the trained stack's logits, and those with the untouched base's."""
    from_disk = logits_of(load_model(str(merged), device="cpu", stream=True), proof.rows)
    return Agreement(
        tokens=proof.trained.shape[0],
        max_logit_difference=float((proof.trained - from_disk).abs().max()),
        kl=mean_kl(proof.trained, from_disk),
        same_top1=float((proof.trained.argmax(-1) == from_disk.argmax(-1)).float().mean()),
        adapter_kl=mean_kl(proof.trained, proof.untouched),
    )
