"""The first training rows as the model sees them: what it learns and only reads, where it stops, what is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Literal

from decal.checks.untouched import untouched
from decal.data.batch import IGNORE, Batch
from decal.training.job import Job

Kind = Literal["read", "learnt", "stop", "special", "gap"]
SHOWN_SAMPLES = 3  # of a packed row
SHOWN_TOKENS = 160  # of a sample: the beginning and the end


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens of one kind as text. "special": a control token that is read, not learnt; "stop": a learnt
    token at which generation stops; "gap": the number of tokens that are not shown."""

    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a batch: its samples' pieces (the first few), and counts of tokens over all of it."""

    samples: tuple[tuple[Piece, ...], ...]
    packed: int  # samples in the row
    tokens: int
    learnt: int
    padding: int


def rows(job: Job, count: int) -> list[Row]:
    """Return the first `count` rows that training will see. The job stays as it is."""
    with untouched(job, weights=False):
        return list(islice(_rows(job), count))


def _rows(job: Job) -> Iterator[Row]:
    for group in job.batches:
        for batch in group:
            for number in range(len(batch.input_ids)):
                yield _row(job, batch, number)


def _row(job: Job, batch: Batch, number: int) -> Row:
    ids, labels = batch.input_ids[number].tolist(), batch.labels[number].tolist()
    starts = [0]
    if batch.position_ids is not None:
        starts = [at for at, position in enumerate(batch.position_ids[number].tolist()) if position == 0]
    parts = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    samples = [part for part in parts if any(label != IGNORE for label in labels[part])]
    last = samples[-1].stop if samples else 0
    if batch.position_ids is None:  # one sample, and padding behind its last learnt token
        last = _end(ids, labels, pad=job.data.pad_id)
        samples = [slice(0, last)]
    shown = tuple(tuple(_pieces(job, ids[part], labels[part])) for part in samples[:SHOWN_SAMPLES])
    learnt = sum(label != IGNORE for label in labels)
    return Row(samples=shown, packed=len(samples), tokens=last, learnt=learnt, padding=len(ids) - last)


def _end(ids: Sequence[int], labels: Sequence[int], *, pad: int) -> int:
    end = len(ids)
    while end > 1 and ids[end - 1] == pad and labels[end - 1] == IGNORE:
        end -= 1
    return end


def _pieces(job: Job, ids: Sequence[int], labels: Sequence[int]) -> Iterator[Piece]:
    tokenizer: Any = job.tokenizer
    controls = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    kinds: list[Kind] = [
        _kind(token, label, job.data.stop_ids, controls) for token, label in zip(ids, labels, strict=True)
    ]
    first, behind = SHOWN_TOKENS // 4, len(ids) - SHOWN_TOKENS * 3 // 4
    hidden = range(first, behind) if behind > first else range(0)
    said = ""
    for at in hidden:
        kinds[at] = "gap"
    for kind, run in groupby(range(len(ids)), key=kinds.__getitem__):
        places = list(run)
        if kind == "gap":
            yield Piece(kind="gap", text=f"{len(places):,}")
            said = ""
            continue
        begin = hidden.stop if hidden and places[0] >= hidden.stop else 0
        whole = tokenizer.decode(ids[begin : places[-1] + 1], clean_up_tokenization_spaces=False)
        # What these tokens add to the text before them: decoded alone, they would lose a space or half a letter.
        yield Piece(kind=kind, text=whole[len(said) :])
        said = whole


def _kind(token: int, label: int, stops: Sequence[int], controls: set[int]) -> Kind:
    if label != IGNORE:
        return "stop" if token in stops else "learnt"
    return "special" if token in controls else "read"
