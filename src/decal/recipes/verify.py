"""Verify an adapter: load it on its base, and compare everything that its seal says with what is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decal import locate, rundir
from decal.data.ledger import Ledger
from decal.errors import AdapterError
from decal.evaluate import asking, reference
from decal.evaluate.reference import Replay
from decal.files import compared, peft_files, sealed, vocabulary
from decal.files.compared import Part, State
from decal.files.sealed import UNSEALED, Data, Seal
from decal.model import saved, sealing
from decal.model.load import load_model
from decal.model.saved import Fetched
from decal.model.wrapper import PeftModel
from decal.recipes import compare
from decal.spec import TaskType
from decal.words import counted

NAME = "default"
WEAK = 3  # times the tolerance: an adapter that moves its base by less could be left out, and hardly be missed


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Every part of a seal, compared. `replay` is None where no logits are sealed; `notes` are for people."""

    adapter: str
    base: str
    seal: Seal
    parts: tuple[Part, ...]
    replay: Replay | None
    notes: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether no part differs."""
        return all(part.state is not State.differs for part in self.parts)


def complete(folder: Path, model: PeftModel, tokenizer: Any, ledger: Ledger | None) -> None:
    """Add to the seal in `folder` what only a whole run knows: tokenizer, template, data and reference logits."""
    data = None if ledger is None else Data(**{key: getattr(ledger, key) for key in Data.__dataclass_fields__})
    seal = replace(
        sealed.read(folder),
        tokens=vocabulary.tokens_of(tokenizer),
        data=data,
        reference=reference.reference(model, tokenizer),
    )
    sealed.write(folder, seal)


def verify(adapter: str, *, base: str | None = None, device: str | None = None) -> Verified:
    """Load an adapter on the base that it was trained on (or on `base`), replay its prompts, and compare.

    What differs is listed, never raised. Raises AdapterError for an adapter without a seal, and for one that does not
    fit the base at all.
    """
    folder = compare.result_of(adapter, rundir.ADAPTER)
    path = locate.folder(folder, kind="adapter", patterns=saved.patterns(None))
    config, tensors = peft_files.read(path)
    seal = sealed.read(path)
    if seal == UNSEALED:
        raise AdapterError(
            "the adapter is not sealed, so there is nothing to verify it by",
            got=f"{path} without {sealed.SEAL}",
            fix="decal seals what it saves: load it on its right base, and save_pretrained it.",
        )
    name = compare.base_of([folder]) if base is None else compare.result_of(base, rundir.MODEL)
    plain: Any = load_model(
        name,
        device=device,
        quantize=seal.quantize,
        revision=seal.base_revision if base is None else None,
        task=config.task_type or TaskType.CAUSAL_LM,
    )
    found = sealing.base_of(plain)
    model = on_base(plain, Fetched(config, tensors, UNSEALED), where=folder)
    replayed = None if seal.reference is None else reference.replay(model, seal.reference)
    parts = [
        compared.weights(seal, found),
        compared.config(seal, found),
        compared.storage(seal, found),
        compared.tensors(seal, peft_files.digest(tensors), file=peft_files.WEIGHTS),
        sealing.scale_part(seal, model, NAME),
        *asked(seal, folder, name),
        logits(replayed),
    ]
    return Verified(
        adapter=adapter, base=name, seal=seal, parts=tuple(parts), replay=replayed, notes=tuple(notes(seal, replayed))
    )


def on_base(plain: Any, read: Fetched, *, where: str) -> PeftModel:
    """Return the adapter on a base, whatever was sealed: here differences are to be listed."""
    saved.refuse_other_shape(plain, read.config, read.tensors, where=where)
    config = saved.for_loading(read.config, is_trainable=False)
    model = PeftModel(plain, config, NAME, low_cpu_mem_usage=True)
    saved.fill(model, NAME, read, where=where)
    return model.eval()


def asked(seal: Seal, folder: str, base: str) -> list[Part]:
    """Compare the tokenizer that lies beside the adapter (else the base's) with the sealed one."""
    if seal.tokens is None:
        return [
            Part(name=name, state=State.not_sealed, says="") for name in ("tokenizer", "chat template", "prompt ids")
        ]
    return asking.parts(seal, compare.tokenizer_of(folder, base), sealing.versions())


def logits(replayed: Replay | None) -> Part:
    """Compare the replayed logits with the sealed ones."""
    name = "logits"
    if replayed is None:
        return Part(name=name, state=State.not_sealed, says="")
    far = f"largest difference {replayed.max_difference:.3g}, KL {replayed.kl:.3g} nats at worst"
    if replayed.within:
        return Part(name=name, state=State.ok, says=f"{counted(replayed.prompts, 'prompt')}, {far}")
    allowed = replayed.tolerance
    return Part(
        name=name,
        state=State.differs,
        says=f"answers otherwise than it was sealed: {far}",
        got=f"at most {allowed.logits:g} and {allowed.kl:g} ({allowed.why})",
        fix="Look at the parts above. If none differs, this machine or server computes the adapter wrongly.",
    )


def notes(seal: Seal, replayed: Replay | None) -> Iterator[str]:
    """Yield what is no difference, and yet worth a line."""
    now = sealing.versions()
    moved = [f"{k} {v} -> {now.get(k)}" for k, v in (seal.versions or {}).items() if now.get(k) != v]
    if moved:
        yield f"sealed by other versions: {', '.join(moved)}"
    if replayed is not None and seal.reference is not None:
        effect, allowed = seal.reference.adapter_kl, replayed.tolerance.kl
        if effect < WEAK * allowed:
            yield (
                f"the adapter moves its base by only {effect:.3g} nats on these prompts, and the tolerance is "
                f"{allowed:g}: the logits prove little"
            )
