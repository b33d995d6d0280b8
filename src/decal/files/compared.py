"""A seal against what is there, part by part: what `decal verify` lists, and what loading refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from decal.errors import AdapterError
from decal.files.sealed import Scale, Seal, Tokens
from decal.words import counted

SHOWN = 12  # hexadecimal digits of a digest, for people
UNVERIFIED = "To load it regardless, remove its decal.json."
OTHERWISE = 1e-9  # of a scale: what rounding does to alpha / sqrt(r) written in two ways


class State(str, Enum):
    """What came of comparing one part."""

    ok = "ok"
    differs = "differs"
    not_sealed = "not sealed"
    not_compared = "not compared"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a seal, compared. `says` goes on from the adapter's name: "was trained on another base"."""

    name: str
    state: State
    says: str
    got: str | None = None
    fix: str = ""


def refuse(parts: Iterable[Part], *, where: str) -> None:
    """Raise AdapterError for the first part that differs."""
    for part in parts:
        if part.state is State.differs:
            raise AdapterError(f"{where} {part.says}", got=part.got, fix=part.fix)


def weights(seal: Seal, base: Seal) -> Part:
    """Compare the base's sampled weights."""
    name, wanted, found = "base weights", seal.base_fingerprint, base.base_fingerprint
    if wanted is None:
        return _not_sealed(name)
    if found is None:
        return _not_compared(name, "this base comes from no checkpoint that decal can sample")
    if wanted == found:
        return _ok(name, short(wanted))
    other = f", {seal.base_name}" if seal.base_name and seal.base_name != base.base_name else ""
    return Part(
        name=name,
        state=State.differs,
        says="was trained on another base",
        got=f"weights {short(found)}, where the adapter was trained on {short(wanted)}{other}",
        fix="Load it on its own base. Regardless: remove its decal.json, or decal merge --force.",
    )


def config(seal: Seal, base: Seal) -> Part:
    """Compare the settings that decide what the base computes; those that only one side knows are passed over."""
    name = "base config"
    if seal.base_config is None:
        return _not_sealed(name)
    if base.base_config is None:
        return _not_compared(name, "this base has no configuration")
    moved = list(_moved(seal.base_config, base.base_config))
    if not moved:
        return _ok(name, counted(len(seal.base_config), "setting"))
    key, before, after = moved[0]
    fix = "Load the base with the config.json that it was trained with."
    if key == "vocab_size":
        fix = f"Before loading: model.resize_token_embeddings({before}), or the base whose vocabulary was resized."
    return Part(
        name=name,
        state=State.differs,
        says=f"was trained on a base with other settings: {key} moved {_short(before)} -> {_short(after)}",
        got=", ".join(f"{key} {_short(before)} -> {_short(after)}" for key, before, after in moved[:5]),
        fix=f"{fix} {UNVERIFIED}",
    )


def storage(seal: Seal, base: Seal) -> Part:
    """Compare the format that the base's weights are stored in."""
    name = "storage format"
    if seal.base_fingerprint is None:
        return _not_sealed(name)
    if base.base_fingerprint is None:
        return _not_compared(name, "how this base is stored is not known")
    wanted, found = _stored(seal), _stored(base)
    if seal.quantize == base.quantize:
        return _ok(name, wanted)
    return Part(
        name=name,
        state=State.differs,
        says=f"was trained on a base stored {wanted}, and this one is stored {found}: it will answer otherwise",
        got=f"{found}, where the adapter was trained on {wanted}",
        fix="Load the base with the format that it was trained on (quantize=...), or measure: decal verify.",
    )


def tensors(seal: Seal, digest: str, *, file: str) -> Part:
    """Compare the adapter's own tensors."""
    name = "adapter tensors"
    if seal.tensors is None:
        return _not_sealed(name)
    if seal.tensors == digest:
        return _ok(name, short(digest))
    return Part(
        name=name,
        state=State.differs,
        says=f"holds other tensors than its decal.json seals: {file} is damaged, or another program saved over it",
        got=f"{short(digest)}, where {short(seal.tensors)} is sealed",
        fix="Damaged: copy it again. Changed on purpose: remove its decal.json, and save it with decal to seal it.",
    )


def scale(seal: Seal, layers: Mapping[str, float], now: Scale) -> Part:
    """Compare the effective scale of each layer (by full name) with the sealed one."""
    name = "scale"
    if seal.scale is None:
        return _not_sealed(name)
    sealed = seal.scale.layers
    for layer, found in layers.items():
        wanted = sealed.get(layer, sealed.get(layer.rpartition(".")[2]))
        if wanted is not None and not math.isclose(wanted, found, rel_tol=OTHERWISE):
            return Part(
                name=name,
                state=State.differs,
                says=f"has another scale than in training: scale moved {_number(wanted)} -> {_number(found)}",
                got=f"{_edited(seal.scale, now)} at {layer}",
                fix=f"Put adapter_config.json back as it was saved. {UNVERIFIED}",
            )
    return _ok(name, ", ".join(_number(value) for value in sorted(set(sealed.values()))))


def _edited(before: Scale, after: Scale) -> str:
    keys = ("r", "lora_alpha", "use_rslora")
    moved = [
        f"{k} {getattr(before, k)} -> {getattr(after, k)}" for k in keys if getattr(before, k) != getattr(after, k)
    ]
    return ", ".join(moved) or "rank_pattern or alpha_pattern was edited"


def vocabulary(seal: Seal, now: Tokens, *, rewritten: bool) -> Part:
    """Compare how text becomes ids.

    `rewritten`: other versions of the libraries may write the same rules otherwise, and the prompts' ids are equal.
    """
    name = "tokenizer"
    if seal.tokens is None:
        return _not_sealed(name)
    before = seal.tokens
    what = None
    if before.vocabulary != now.vocabulary:
        sizes = f"{now.size:,} tokens, where {before.size:,} are sealed"
        what = f"another vocabulary of {sizes}"
        if before.size == now.size:
            what = f"another vocabulary of as many tokens, {short(now.vocabulary)}, not {short(before.vocabulary)}"
    elif moved := list(_moved(before.special, now.special, both=False)):
        what = "other special tokens: " + ", ".join(f"{key} {old!r} -> {new!r}" for key, old, new in moved)
    elif before.rules != now.rules and not rewritten:
        what = "other merges, or another normaliser, pre-tokeniser or post-processor"
    if what is None:
        return _ok(name, short(before.vocabulary))
    return Part(
        name=name,
        state=State.differs,
        says="was trained with another tokenizer",
        got=what,
        fix="Use the tokenizer that was saved with the adapter, unedited. " + UNVERIFIED,
    )


def template(seal: Seal, now: Tokens) -> Part:
    """Compare the chat template's text."""
    name = "chat template"
    if seal.tokens is None:
        return _not_sealed(name)
    before = seal.tokens.template
    if before == now.template:
        return _ok(name, "none" if before is None else short(before))
    return Part(
        name=name,
        state=State.differs,
        says="was trained with another chat template",
        got=f"{_none(now.template)}, where {_none(before)} is sealed",
        fix="Use the chat_template.jinja that was saved with the adapter, unedited. " + UNVERIFIED,
    )


def short(digest: str) -> str:
    """Return the beginning of a digest."""
    return digest[:SHOWN]


def _moved(before: Mapping[str, Any], after: Mapping[str, Any], *, both: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, before, after) of the values that differ; with `both`, of those that both sides have."""
    keys = sorted(before.keys() & after.keys() if both else before.keys() | after.keys())
    for key in keys:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from ((f"{key}.{inner}", a, b) for inner, a, b in _moved(old, new, both=both))
        elif old != new:
            yield key, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: float) -> str:
    return str(float(f"{value:.4g}"))


def _stored(seal: Seal) -> str:
    return "as its checkpoint is" if seal.quantize is None else f"in {seal.quantize.told}"


def _none(digest: str | None) -> str:
    return "no template" if digest is None else f"template {short(digest)}"


def _ok(name: str, says: str) -> Part:
    return Part(name=name, state=State.ok, says=says)


def _not_sealed(name: str) -> Part:
    return Part(name=name, state=State.not_sealed, says="")


def _not_compared(name: str, why: str) -> Part:
    return Part(name=name, state=State.not_compared, says=why)
