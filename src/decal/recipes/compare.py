"""Load a base with any number of adapters, ready to answer: what `decal generate` and `decal chat` begin with."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decal import locate, rundir
from decal.errors import AdapterError, DecalError
from decal.evaluate import asking
from decal.evaluate.compare import Sampling, answers
from decal.evaluate.prompts import Prompts
from decal.files import peft_files, sealed
from decal.layers.routing import BASE
from decal.model import rows, sealing
from decal.model.load import load_model, load_tokenizer
from decal.model.wrapper import PeftModel
from decal.spec import ADAPTER_CONFIG, PeftConfig

# What to fetch of an adapter's hub repository for its tokenizer; there may be gigabytes of checkpoints beside it.
TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True)
class Variants:
    """A model that answers as its base or as any of its adapters. `labels` name them for people, base first."""

    model: Any
    tokenizer: Any
    prompts: Prompts
    base: str
    labels: dict[str, str]  # by the adapter's name in the model; BASE is the base

    def answer(self, texts: Sequence[str], *, name: str, sampling: Sampling) -> list[str]:
        """Return the replies of one variant to rendered prompts."""
        chosen = name if len(self.labels) > 1 else None
        return answers(
            self.model, self.tokenizer, texts, name=chosen, sampling=sampling, stop_ids=self.prompts.stop_ids
        )


def load(model: str | None, adapters: Sequence[str], *, device: str | None = None) -> Variants:
    """Load the base (by default the one that the first adapter names) and each adapter on it.

    A run folder stands for the adapter or model in it. The tokenizer and chat template are the ones saved with the
    first adapter, if there are any: what the model was taught with is what it must be asked with.
    """
    folders = [result_of(adapter, rundir.ADAPTER) for adapter in adapters]
    base = base_of(folders) if model is None else result_of(model, rundir.MODEL)
    seal = seal_of(folders)
    revision = seal.base_revision if model is None else None
    try:
        loaded: Any = load_model(base, device=device, quantize=seal.quantize, revision=revision)
    except DecalError as error:
        if model is not None or not folders:
            raise
        raise AdapterError(
            f"the base model that the adapter names cannot be loaded: {error.what}",
            got=error.got if error.got is not None else base,
            fix="Give the base with --model.",
        ) from error
    tokenizer = tokenizer_of(next(iter(folders), None), base)
    if (missing := rows.check(loaded, tokenizer)) is not None:
        logging.getLogger("decal").warning(missing)
    for folder in folders:  # one tokenizer and template asks them all
        asking.refuse(seal_of([folder]), tokenizer, sealing.versions(), where=folder)
    labels = {BASE: "base"}
    for number, folder in enumerate(folders, start=1):
        name = f"adapter{number}"
        if number == 1:
            loaded = PeftModel.from_pretrained(loaded, folder, name)
        else:
            loaded.load_adapter(folder, name)
        labels[name] = label(folder, taken=labels.values())
    return Variants(model=loaded, tokenizer=tokenizer, prompts=Prompts(tokenizer), base=base, labels=labels)


def result_of(name: str, kind: str) -> str:
    """Return the adapter (or model) folder inside a run folder; any other name as it is."""
    inside = Path(name) / kind
    return str(inside) if (Path(name) / rundir.RUN).is_file() and inside.is_dir() else name


def seal_of(adapters: Sequence[str]) -> sealed.Seal:
    """Return what the first adapter says of the base that it was trained on."""
    if not adapters:
        return sealed.UNSEALED
    patterns = [*peft_files.PATTERNS, sealed.SEAL]
    return sealed.read(locate.folder(adapters[0], kind="adapter", patterns=patterns))


def base_of(adapters: Sequence[str]) -> str:
    """Return the base that the first adapter names."""
    if not adapters:
        raise DecalError("neither a model nor an adapter is given", fix="Give --model, --adapter or both.")
    if Path(adapters[0], "config.json").is_file() and not Path(adapters[0], ADAPTER_CONFIG).is_file():
        raise AdapterError(
            "the adapter folder holds a whole model", got=adapters[0], fix=f"Give it as --model {adapters[0]}."
        )
    base = PeftConfig.from_pretrained(adapters[0]).base_model_name_or_path
    if not base:
        raise AdapterError("the adapter does not name its base model", got=adapters[0], fix="Give it with --model.")
    return base


def tokenizer_of(adapter: str | None, base: str) -> Any:
    """Return the tokenizer (with its chat template) that was saved with the adapter, else the base's."""
    if adapter is not None:
        folder = locate.folder(adapter, kind="adapter", patterns=TOKENIZER_FILES)
        if (folder / "tokenizer_config.json").is_file():
            return load_tokenizer(folder)
    return load_tokenizer(base)


def label(adapter: str, *, taken: Collection[str]) -> str:
    """Return a short name for an adapter: its run's name, or its folder's; the whole path if that is taken."""
    path = Path(adapter)
    short = path.parent.name if path.name == rundir.ADAPTER and path.parent.name else path.name
    return adapter if short in taken else short
