"""One epoch of a run, from its data where they lie here and are small: the largest micro-batch, steps and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from decal.data import prepare
from decal.data.batches import Batches, InOrder
from decal.errors import DecalError
from decal.model.load import load_tokenizer
from decal.planning.time import Epoch
from decal.spec import RunConfig
from decal.training import job

CHEAP = 16 << 20  # bytes of data files, which are tokenised in some seconds
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class Read:
    """A run's data as training would take them."""

    batches: Batches
    held_out: InOrder | None

    def epoch(self) -> Epoch:
        """Return the first epoch, counted batch by batch."""
        tokens = sum(batch.tokens for step in self.batches.epoch() for batch in step)
        return Epoch(tokens=tokens, steps=self.batches.steps_per_epoch)


def read(config: RunConfig) -> Read | str:
    """Return the data of a run, or in a few words why they are not read for a plan."""
    data = config.data
    if data.streaming:
        return "the data are a stream"
    for path in (data.path, data.eval_path):
        if path is not None and not Path(path).expanduser().exists():
            return f"there is no {path} here"
    size = sum(_bytes(Path(path).expanduser()) for path in (data.path, data.eval_path) if path is not None)
    if size > CHEAP:
        return f"the data are larger than {CHEAP >> 20} MiB"
    if not any((Path(config.model) / name).is_file() for name in TOKENIZERS):
        return "the model's tokenizer is not here"
    try:
        tokenizer = load_tokenizer(config.model, revision=config.revision)
        batches, held_out = job.batch(config, prepare.prepare(data, tokenizer, seed=config.train.seed))
    except DecalError as error:
        return f"training would refuse the data, for {error.what}"
    return Read(batches=batches, held_out=held_out)


def _bytes(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())
