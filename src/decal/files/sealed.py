"""`decal.json` beside an adapter's PEFT files: what it was trained on and what it answers, which PEFT's cannot say.

The seal describes; `compared.py` holds it against what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decal import rundir
from decal.errors import AdapterError
from decal.spec import QuantConfig

SEAL = "decal.json"
VERSION = 2
AGAIN = "Copy or download the adapter again. To load it unverified, remove its decal.json."


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What each change is multiplied by: `layers` by the layers' last names (in full where these differ)."""

    layers: Mapping[str, float]
    r: int  # the settings that it comes from, so that an error can name the edited one
    lora_alpha: float
    use_rslora: bool


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What decides how text becomes ids: SHA-256 of each part; None: the tokenizer has no such part."""

    vocabulary: str  # every token with its id, the added ones, too
    size: int  # of the vocabulary
    rules: str | None  # merges, normaliser, pre-tokeniser, post-processor
    special: Mapping[str, str]  # bos_token, eos_token, ...; not the padding, which decides no id
    template: str | None  # the chat template's text


@dataclass(frozen=True, kw_only=True)
class Data:
    """The digest and the counts of the ledger; no text and no path of the user's."""

    digest: str
    rows: int
    used: int
    tokens: int
    loss_tokens: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the adapter says after one prompt: the largest logits of the last position, and the logsumexp of all."""

    ids: tuple[int, ...]
    top: tuple[int, ...]  # tokens, the likeliest first
    logits: tuple[float, ...]
    logsumexp: float


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The answers to the eight prompts, and on what they were computed."""

    answers: tuple[Answer, ...]
    templated: bool  # whether the prompts were written with the chat template
    device: str
    dtype: str  # that was computed in
    threads: int
    adapter_kl: float  # nats: how far the adapter moves the base on these prompts


@dataclass(frozen=True, kw_only=True)
class Seal:
    """All that is known of an adapter; None: unknown, and then not compared.

    `quantize` is the base's storage format in training; None beside a fingerprint means as the checkpoint stores it.
    """

    quantize: QuantConfig | None = None
    base_fingerprint: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    base_config: Mapping[str, Any] | None = None
    tensors: str | None = None
    scale: Scale | None = None
    start: str | None = None
    tokens: Tokens | None = None
    data: Data | None = None
    versions: Mapping[str, str | None] | None = None
    reference: Reference | None = None


UNSEALED = Seal()


def write(folder: Path, seal: Seal) -> None:
    """Write the seal, a line for each part; docs/files.md states every field. UNSEALED takes an older one away."""
    if seal == UNSEALED:
        (folder / SEAL).unlink(missing_ok=True)
        return
    facts = asdict(seal) | {"quantize": None if seal.quantize is None else seal.quantize.model_dump(mode="json")}
    facts = {"version": VERSION, **facts}
    facts["digest"] = _digest(facts)
    lines = [f"  {json.dumps(key)}: {_text(value)}" for key, value in facts.items()]
    rundir.write_bytes(folder / SEAL, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read(folder: Path) -> Seal:
    """Return an adapter's seal; UNSEALED for one without. Raises AdapterError for a damaged or newer one."""
    file = folder / SEAL
    if not file.is_file():
        return UNSEALED
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        version = facts["version"]
        if type(version) is int and version > VERSION:
            raise _newer(file, version)
        if type(version) is not int or version < 1 or (version > 1 and facts.pop("digest") != _digest(facts)):
            raise ValueError
        return _seal(facts)
    except AdapterError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise AdapterError("the adapter's seal is damaged, or was edited", got=file, fix=AGAIN) from None


def _newer(file: Path, version: int) -> AdapterError:
    return AdapterError(
        f"the adapter's seal is of version {version}, and this decal reads versions up to {VERSION}",
        got=file,
        fix="Install a newer decal. To load the adapter unverified, remove its decal.json.",
    )


def _seal(facts: dict[str, Any]) -> Seal:
    """Return the seal that a file's values mean; those of version 1 are the first two."""
    settings, reference = facts["quantize"], facts.get("reference")
    if not isinstance(facts["base_fingerprint"], (str, type(None))):
        raise TypeError
    if reference is not None:
        answers = tuple(Answer(**{k: _frozen(v) for k, v in answer.items()}) for answer in reference["answers"])
        reference = Reference(**{**reference, "answers": answers})
    parts: dict[str, Any] = {"scale": Scale, "tokens": Tokens, "data": Data}
    made = {key: kind(**facts[key]) for key, kind in parts.items() if facts.get(key) is not None}
    plain = ("base_name", "base_revision", "base_config", "tensors", "start", "versions")
    return Seal(
        quantize=None if settings is None else QuantConfig(**settings),
        base_fingerprint=facts["base_fingerprint"],
        reference=reference,
        **made,
        **{key: facts.get(key) for key in plain},
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _digest(facts: Mapping[str, Any]) -> str:
    return sha256(facts)


def sha256(value: Any) -> str:
    """Return the SHA-256 of a plain value, whatever the order of its keys and the spaces in its file."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
