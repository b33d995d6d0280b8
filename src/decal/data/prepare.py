"""From settings to samples and their ledgers: the one door through which training gets its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from decal.data import ledger, pack, shapes, source
from decal.data.encode import Encoder
from decal.data.ledger import Ledger, Tally
from decal.data.mask import Sample
from decal.data.samples import Samples, Stream
from decal.errors import DataError
from decal.spec import DataConfig
from decal.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBED = 512  # rows of a stream that its ledger counts
Numbered = Iterable[tuple[int, shapes.Row]]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tokenised data for training and evaluation, with what became of every row.

    `template`: the Jinja chat template in use (keep it with the adapter), None for raw text. `stop_ids`: the tokens
    at which generation must stop (the tokenizer's eos alone is often not the one a chat ends with). `pad_id`: the
    token that fills rows; it may equal eos, padding is known by its place.
    """

    train: Samples | Stream
    evaluation: Samples | None
    ledger: Ledger
    eval_ledger: Ledger | None
    template: str | None
    stop_ids: tuple[int, ...]
    pad_id: int


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> Prepared:
    """Read, recognise, render, tokenise and mask the data of a run; `seed` chooses the rows held out.

    Raises DataError if the data cannot be read, is of no known shape, or leaves nothing to learn.
    """
    encoder = Encoder(config, tokenizer)
    rows = source.open_rows(config.path, split=config.split, streaming=config.streaming, limit=config.limit)
    held_out: source.Rows | list[tuple[int, shapes.Row]] | None = _open_evaluation(config)
    train: Samples | Stream
    if config.streaming:
        if held_out is None and config.eval_rows:
            held_out = list(rows.part(limit=config.eval_rows))  # the first ones: nobody knows how many there are
            rows = rows.part(skip=config.eval_rows)
        train, train_ledger, seen = _stream(config, encoder, rows, seed=seed)
    else:
        kept = list(rows)
        if held_out is None and config.eval_rows:
            kept, held_out = _hold_out(kept, config.eval_rows, seed=seed)
        train, train_ledger, seen = _encode(config, encoder, kept, name=rows.name)
    evaluation: Samples | None = None
    eval_ledger: Ledger | None = None
    if held_out is not None:
        name = held_out.name if isinstance(held_out, source.Rows) else f"{rows.name}, held out"
        evaluation, eval_ledger, _ = _encode(config, encoder, held_out, name=name, known=seen)
    return Prepared(
        train=train,
        evaluation=evaluation,
        ledger=train_ledger,
        eval_ledger=eval_ledger,
        template=encoder.template,
        stop_ids=tuple(sorted(encoder.stop_ids)),
        pad_id=encoder.pad_id,
    )


def _open_evaluation(config: DataConfig) -> source.Rows | None:
    if config.eval_path is not None:
        return source.open_rows(config.eval_path, split=config.eval_split or _evaluation_split(config.eval_path))
    if config.eval_split is None:
        return None
    if Path(config.path).expanduser().is_file():
        raise DataError(
            "a single file has no splits, so eval_split would evaluate on the training rows",
            got=config.path,
            fix="Give eval_path, or eval_rows to hold some rows out.",
        )
    return source.open_rows(config.path, split=config.eval_split)


def _evaluation_split(path: str) -> str:
    folder = Path(path).expanduser()
    there = source.split_files(folder) if folder.is_dir() else {}
    return next((name for name in ("validation", "test", "train") if name in there), "test")


def _hold_out(
    rows: list[tuple[int, shapes.Row]], count: int, *, seed: int
) -> tuple[list[tuple[int, shapes.Row]], list[tuple[int, shapes.Row]]]:
    if count >= len(rows):
        raise DataError(
            "eval_rows leaves no row to train on",
            got=f"{count:,} of {counted(len(rows), 'row')}",
            fix="Hold fewer rows out.",
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def _shape(config: DataConfig, rows: Numbered, name: str) -> tuple[shapes.Shape, list[str]]:
    first = next(iter(rows), None)
    if first is None:
        raise DataError("the data set is empty", got=name, fix="Give at least one row.")
    shape = shapes.recognise(first[1], shape=config.shape, template=config.template, number=first[0])
    unused = shape.unused(first[1])
    return shape, [f"columns not used: {', '.join(unused)}"] if unused else []


def _encode(
    config: DataConfig, encoder: Encoder, rows: Numbered, *, name: str, known: frozenset[bytes] = frozenset()
) -> tuple[Samples, Ledger, frozenset[bytes]]:
    shape, notes = _shape(config, rows, name)
    tally = Tally()
    samples = Samples(encoder.encode(((n, shape.read(row, n)) for n, row in rows), tally))
    twice = len(tally.digests & known)
    if twice:
        notes.append(f"{counted(twice, 'sample')} of these also in the training data")
    return samples, _close(config, encoder, tally, shape, name=name, notes=notes, samples=samples), tally.digests


def _stream(
    config: DataConfig, encoder: Encoder, rows: source.Rows, *, seed: int
) -> tuple[Stream, Ledger, frozenset[bytes]]:
    shape, notes = _shape(config, rows, rows.name)
    notes.append(f"a stream: this ledger counts its first {PROBED} rows")

    def make(epoch: int) -> Iterator[Sample]:
        numbered = rows.shuffled(seed=seed, epoch=epoch)
        return encoder.encode(((n, shape.read(row, n)) for n, row in numbered), Tally())

    tally = Tally()
    probed = ((n, shape.read(row, n)) for n, row in islice(rows, PROBED))
    samples = Samples(encoder.encode(probed, tally))
    closed = _close(config, encoder, tally, shape, name=rows.name, notes=notes, samples=samples, partial=True)
    return Stream(make), closed, tally.digests


def _close(
    config: DataConfig,
    encoder: Encoder,
    tally: Tally,
    shape: shapes.Shape,
    *,
    name: str,
    notes: list[str],
    samples: Samples,
    partial: bool = False,
) -> Ledger:
    fill: float | None = None
    if config.packing and len(samples):
        lengths = [samples.length(i) for i in range(len(samples))]
        fill = sum(lengths) / (len(pack.best_fit(lengths, config.max_length)) * config.max_length)
    closed = tally.close(
        source=name,
        shape=shape.says,
        learnt="text" if shape.name == "text" else "assistant",
        fill=fill,
        notes=(*notes, *encoder.notes),
        partial=partial,
    )
    closed = replace(closed, notes=(*closed.notes, *ledger.remedies(closed, max_length=config.max_length)))
    needs_stop = shape.name != "text"
    ledger.check(closed, needs_stop=needs_stop, max_length=config.max_length, template=encoder.template_name)
    return closed
