"""The data ledger: what became of every row, so that nothing is lost or learnt in silence."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from decal.data.batch import IGNORE
from decal.data.mask import Masked, Sample
from decal.errors import DataError
from decal.words import counted

NO_REPLY = "no assistant turn to learn"
REFUSED = "refused by the chat template"
TOO_LONG = "longer than max_length"
REPLY_CUT = "reply beyond max_length"
UNWRITTEN = "reply not written by the chat template"
EMPTY = "no tokens"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Counts of one data set after tokenisation. Tokens are counted without padding.

    `loss_by_role` is the share of the learnt tokens in replies ("assistant", or "text" for plain text) and outside of
    them ("prompt"). `fill` is the share of packed rows that is not padding. `digest` is the sha256 over all samples,
    whatever their order. `partial`: a stream, of which only the first rows were counted.
    """

    source: str
    shape: str
    rows: int
    used: int
    dropped: Mapping[str, int]
    cut: int
    stops_lost: int  # cut rows whose last stop token was cut off
    without_stop: int  # used rows in which no stop token is learnt
    tokens: int
    loss_tokens: int
    longest: int  # tokens of the longest used sample
    loss_by_role: Mapping[str, float]
    fill: float | None
    notes: tuple[str, ...]
    digest: str
    partial: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON (the run's manifest)."""
        values = asdict(self)
        values["notes"] = list(self.notes)
        values["dropped"], values["loss_by_role"] = dict(self.dropped), dict(self.loss_by_role)
        return values

    def text(self) -> str:
        """Return a few lines for people."""
        first = ("first " if self.partial else "") + counted(self.rows, "row")
        lines = [f"{self.source}: {self.shape}; {first}, {self.used} used"]
        lines += [f"  dropped {count}: {reason}" for reason, count in self.dropped.items()]
        if self.cut:
            lines.append(f"  cut {self.cut} at max_length, {self.stops_lost} of them lost their stop token")
        share = self.loss_tokens / self.tokens if self.tokens else 0.0
        lines.append(f"  {counted(self.tokens, 'token')}, {self.loss_tokens:,} in the loss ({share:.0%})")
        if self.without_stop:
            lines.append(f"  no stop token is learnt from {self.without_stop:,} of {counted(self.used, 'row')}")
        if self.fill is not None:
            lines.append(f"  packing fills {self.fill:.0%} of each batch")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


class Tally:
    """Counts while the rows pass; `close` makes the Ledger."""

    def __init__(self) -> None:
        self.rows = self.used = self.cut = self.stops_lost = self.without_stop = 0
        self.tokens = self.loss_tokens = self.reply_tokens = self.merged = self.longest = 0
        self.dropped: Counter[str] = Counter()
        self.first_refusal: str | None = None
        self._digests: list[bytes] = []

    def drop(self, reason: str) -> None:
        """Count a row that is not used."""
        self.rows += 1
        self.dropped[reason] += 1

    def refuse(self, number: int, message: str) -> None:
        """Count a row that the chat template cannot write; the first one's reason is told."""
        self.drop(REFUSED)
        self.first_refusal = self.first_refusal or f"row {number}: {message.strip().splitlines()[0][:200]}"

    def use(self, masked: Masked, *, reply_tokens: int, was_cut: bool, stop_lost: bool) -> None:
        """Count a used row."""
        sample = masked.sample
        self.rows += 1
        self.used += 1
        self.cut += was_cut
        self.stops_lost += stop_lost
        self.without_stop += not masked.stops
        self.tokens += len(sample.ids)
        self.longest = max(self.longest, len(sample.ids))
        self.loss_tokens += sum(label != IGNORE for label in sample.labels)
        self.reply_tokens += reply_tokens
        self.merged += masked.merged > 0
        self._digests.append(fingerprint(sample))

    @property
    def digests(self) -> frozenset[bytes]:
        """The fingerprints of the used samples."""
        return frozenset(self._digests)

    def close(
        self,
        *,
        source: str,
        shape: str,
        learnt: str,
        fill: float | None,
        notes: tuple[str, ...],
        partial: bool = False,
    ) -> Ledger:
        """Return the ledger; `learnt` names the role whose tokens are meant to be learnt."""
        more = []
        if self.first_refusal is not None:
            more.append(f"the chat template refused {counted(self.dropped[REFUSED], 'row')}; {self.first_refusal}")
        if self.merged:
            more.append(f"in {counted(self.merged, 'row')} the reply's first token also holds the end of the prompt")
        share = self.reply_tokens / self.loss_tokens if self.loss_tokens else 0.0
        return Ledger(
            source=source,
            shape=shape,
            rows=self.rows,
            used=self.used,
            dropped=dict(self.dropped),
            cut=self.cut,
            stops_lost=self.stops_lost,
            without_stop=self.without_stop,
            tokens=self.tokens,
            loss_tokens=self.loss_tokens,
            longest=self.longest,
            loss_by_role={learnt: share, "prompt": 1.0 - share},
            fill=fill,
            notes=(*notes, *more),
            digest=hashlib.sha256(b"".join(sorted(self._digests))).hexdigest(),
            partial=partial,
        )


def fingerprint(sample: Sample) -> bytes:
    """Return the sha256 of one sample's ids and labels (int32, little endian, ids then labels)."""
    return hashlib.sha256(np.array([sample.ids, sample.labels], dtype="<i4").tobytes()).digest()


def remedies(ledger: Ledger, *, max_length: int) -> tuple[str, ...]:
    """Return what to do about rows that are lost, cut or learnt otherwise than replies are, a line each."""
    lines = []
    if count := ledger.dropped.get(TOO_LONG):
        lines.append(
            f"{count:,} of {counted(ledger.rows, 'row')} longer than max_length ({max_length}): raise data.max_length, "
            "or set data.too_long=cut"
        )
    if ledger.stops_lost:
        lines.append(
            f"stop token lost to max_length ({max_length}): {ledger.stops_lost:,} of {counted(ledger.used, 'row')}; "
            "raise data.max_length, or set data.too_long=drop"
        )
    if share := ledger.loss_by_role.get("prompt"):
        lines.append(
            f"{share:.0%} of the loss is on text that is no reply: data.loss_on=assistant learns replies alone"
        )
    return tuple(lines)


def check(ledger: Ledger, *, needs_stop: bool, max_length: int, template: str) -> None:
    """Raise DataError if nothing is left to learn, or if no reply would teach the model to stop.

    `template` names the chat template.
    """
    if ledger.rows == 0:
        raise DataError("the data set is empty", got=ledger.source, fix="Give at least one row.")
    if ledger.used == 0:
        refusal = next((note for note in ledger.notes if "refused" in note), "Give another chat_template.")
        if set(ledger.dropped) == {UNWRITTEN}:
            raise DataError(
                "the template writes none of the reply: there would be nothing to learn but the stop token",
                got=f"{template}, {counted(ledger.rows, 'row')} of {ledger.source}",
                fix="Give another data.chat_template: one that writes the content of each assistant message.",
            )
        if set(ledger.dropped) == {REFUSED}:
            raise DataError(
                f"the template refuses every row of {ledger.source}",
                got=f"{template}, {counted(ledger.rows, 'row')}; {refusal.partition('; ')[2]}",
                fix="Correct the template (data.chat_template), or the rows.",
            )
        reasons = ", ".join(f"{count} {reason}" for reason, count in ledger.dropped.items())
        fixes = {
            NO_REPLY: "Give rows that end in a reply of the assistant.",
            REFUSED: refusal,
            TOO_LONG: f"Raise max_length (now {max_length}), or set too_long: cut.",
            UNWRITTEN: f"Give another data.chat_template: {template} writes none of the reply there.",
            REPLY_CUT: f"Raise max_length (now {max_length}): the prompts alone fill it.",
            EMPTY: "Give rows with text.",
        }
        worst = max(ledger.dropped, key=lambda reason: ledger.dropped[reason])
        raise DataError(f"no row of {ledger.source} can be used", got=reasons, fix=fixes[worst])
    if needs_stop and ledger.without_stop == ledger.used:
        raise DataError(
            "no row trains a stop token: the model would never learn to end its reply",
            got=f"{ledger.source}, {ledger.cut:,} of {counted(ledger.used, 'row')} cut at max_length {max_length}",
            fix="Raise max_length, or use a chat template that ends replies with a special token.",
        )
