"""`decal.json` beside an adapter's PEFT files: what the adapter was trained on, which PEFT's files cannot say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from decal import rundir
from decal.errors import AdapterError
from decal.spec import QuantConfig

SEAL = "decal.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The base's storage format in training (None: as it is), and its checkpoint's fingerprint (None: unknown)."""

    quantize: QuantConfig | None
    base_fingerprint: str | None


UNSEALED = Seal(quantize=None, base_fingerprint=None)


def of(model: object) -> Seal:
    """Return what `load_model` said of the base that it loaded; UNSEALED for a model from elsewhere."""
    return getattr(model, "seal", UNSEALED)


def refuse_other_base(seal: Seal, model: object, *, where: str) -> None:
    """Raise AdapterError if an adapter's seal names other weights than those that `model` was loaded from."""
    wanted, found = seal.base_fingerprint, of(model).base_fingerprint
    if wanted is not None and found is not None and wanted != found:
        raise AdapterError(
            f"{where} was trained on another base",
            got=f"weights {found[:12]}, where the adapter was trained on {wanted[:12]}",
            fix="Load it on its own base. Regardless: remove its decal.json, or decal merge --force.",
        )


def write(folder: Path, seal: Seal) -> None:
    """Write the seal: {"version": 1, "quantize": settings or null, "base_fingerprint": SHA-256 or null}.

    An UNSEALED adapter gets none, and loses an older one.
    """
    if seal == UNSEALED:
        (folder / SEAL).unlink(missing_ok=True)
        return
    settings = None if seal.quantize is None else seal.quantize.model_dump(mode="json")
    facts = {"version": VERSION, "quantize": settings, "base_fingerprint": seal.base_fingerprint}
    rundir.write_json(folder / SEAL, facts)


def read(folder: Path) -> Seal:
    """Return an adapter's seal; UNSEALED for one without. Raises AdapterError for a damaged one."""
    file = folder / SEAL
    if not file.is_file():
        return UNSEALED
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        settings, base = facts["quantize"], facts["base_fingerprint"]
        if not isinstance(base, (str, type(None))):
            raise TypeError
        return Seal(quantize=None if settings is None else QuantConfig(**settings), base_fingerprint=base)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise AdapterError("the adapter's seal is damaged", got=file, fix="Copy the adapter again.") from None
