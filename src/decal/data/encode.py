"""Turn examples into samples: write the text, tokenise it once, lay the loss mask over it, count every row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from decal.data import chat, mask
from decal.data.batch import IGNORE
from decal.data.ledger import EMPTY, NO_REPLY, REPLY_CUT, TOO_LONG, UNWRITTEN, Tally
from decal.data.shapes import Chat, Example, Pair, Passage, Turn
from decal.errors import DataError, nearest
from decal.spec import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # rows tokenised in one call: the tokenizer works on them in parallel


@dataclass(frozen=True, kw_only=True)
class Written:
    """A row's text; `bos` and `eos`: whether those tokens are put around it (a chat template writes its own).

    `worded` says for each span whether its reply has words or calls, so that there must be something to learn.
    """

    number: int
    text: str
    spans: tuple[chat.Span, ...]
    worded: tuple[bool, ...]
    bos: bool
    eos: bool


class Encoder:
    """From examples to samples for one tokenizer and one group of settings. `notes` say what was chosen or adapted."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                "this tokenizer gives no character offsets, so replies cannot be told from prompts",
                got=type(tokenizer).__name__,
                fix="Load it with AutoTokenizer, which gives the fast kind where there is one.",
            )
        self.config = config
        self.tokenizer = tokenizer
        self._format = chat.choose(tokenizer, _read_template(config.chat_template), name=self.template_name)
        self._bos = chat.adds_bos(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._controls = frozenset(tokenizer.all_special_ids) | frozenset(added)
        eos = tokenizer.eos_token_id
        self.stop_ids = frozenset() if eos is None else frozenset([eos])
        self._turn_ends: frozenset[int] = frozenset()  # what ends a reply amid a conversation
        self.pad_id = _pad_id(tokenizer)
        self._appends_eos = False  # the template ends replies with no token: eos is added
        self._notes: list[str] = []
        if self._format is not None:
            self._find_stop(self._format)

    @property
    def template(self) -> str | None:
        """The Jinja source of the chat format in use; None if the rows are raw text."""
        return None if self._format is None else self._format.template

    @property
    def template_name(self) -> str:
        """The chat template's name, for the text of an error."""
        return self.config.chat_template or f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen or adapted, one line each."""
        return (*(self._format.notes if self._format else ()), *self._notes)

    def encode(self, examples: Iterable[tuple[int, Example]], tally: Tally) -> Iterator[mask.Sample]:
        """Yield the samples of the numbered examples that can be used; all of them are counted in `tally`."""
        written = self._write_all(examples, tally)
        while chunk := list(islice(written, CHUNK)):
            texts = [row.text for row in chunk]
            tokens = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for row, ids, offsets in zip(chunk, tokens["input_ids"], tokens["offset_mapping"], strict=True):
                sample = self._finish(row, ids, offsets, tally)
                if sample is not None:
                    yield sample

    # --- text ---

    def _write_all(self, examples: Iterable[tuple[int, Example]], tally: Tally) -> Iterator[Written]:
        for number, example in examples:
            if isinstance(example, Pair) and example.as_chat and self._format is not None:
                example = example.chat()
            if isinstance(example, Chat):
                if not example.has_reply:
                    tally.drop(NO_REPLY)
                    continue
                try:
                    yield self._write_chat(number, example)
                except chat.Unwritten:
                    tally.drop(UNWRITTEN)
                except chat.Refused as refusal:
                    tally.refuse(number, str(refusal))
                continue
            text = self._write_raw(number, example)
            if text is None:
                tally.drop(NO_REPLY)
                continue
            yield text

    def _write_chat(self, number: int, example: Chat) -> Written:
        if self._format is None:
            self._format = chat.default(self.tokenizer)
            self._find_stop(self._format)
        written = self._format.write(example)
        if not written.spans:
            raise DataError(
                f"row {number}: the chat template marks no reply as generated",
                got=repr(written.text[:400]),
                fix="Put {% generation %} ... {% endgeneration %} around the assistant's words, or leave it out.",
            )
        last = example.turns[-1]
        ends = self._appends_eos and last.role == "assistant" and last.learn
        return Written(
            number=number, text=written.text, spans=written.spans, worded=written.worded, bos=False, eos=ends
        )

    def _write_raw(self, number: int, example: Pair | Passage) -> Written | None:
        if isinstance(example, Pair):
            prompt, reply = example.prompt, example.completion
        else:
            prompt, reply = "", example.text
        if not reply.strip():
            return None
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, so the model could not learn to stop",
                fix="Set tokenizer.eos_token to the token that ends a text.",
            )
        text = prompt + reply
        bos = self._bos and not text.startswith(self.tokenizer.bos_token)
        span = (len(prompt), len(text))
        return Written(number=number, text=text, spans=(span,), worded=(False,), bos=bos, eos=True)

    # --- tokens ---

    def _finish(self, row: Written, ids: list[int], offsets: list[chat.Span], tally: Tally) -> mask.Sample | None:
        end = len(row.text)
        spans = row.spans
        if row.bos:
            ids, offsets = [self.tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
        if row.eos:
            ids, offsets = [*ids, self.tokenizer.eos_token_id], [*offsets, (end, end + 1)]
        if len(ids) < 2:
            tally.drop(EMPTY)
            return None
        if ids[0] == ids[1] == self.tokenizer.bos_token_id:
            raise DataError(
                f"row {row.number}: the text begins with two BOS tokens",
                got=repr(row.text[:60]),
                fix="Take the BOS token out of the data or out of the chat template.",
            )
        masked = mask.lay(
            ids,
            offsets,
            spans,
            stop_ids=self.stop_ids | self._turn_ends,
            control_ids=self._controls,
            blank=lambda position: not row.text[slice(*offsets[position])].strip(),
        )
        if any(row.worded[i] for i in masked.bare):
            tally.drop(UNWRITTEN)
            return None
        return self._fit(masked, tally)

    def _fit(self, masked: mask.Masked, tally: Tally) -> mask.Sample | None:
        limit = self.config.max_length
        too_long = len(masked.sample.ids) > limit
        if too_long and self.config.too_long == "drop":
            tally.drop(TOO_LONG)
            return None
        stop_lost = False
        if too_long:
            masked, stop_lost = mask.cut(masked, limit)
        replies = sum(label != IGNORE for label in masked.sample.labels)
        if replies == 0:
            tally.drop(REPLY_CUT if too_long else EMPTY)
            return None
        if self.config.loss_on == "all":
            masked = mask.learn_all(masked)
        tally.use(masked, reply_tokens=replies, was_cut=too_long, stop_lost=stop_lost)
        return masked.sample

    def _find_stop(self, form: chat.ChatFormat) -> None:
        """Learn from a probe which token the template puts behind a reply: the last one, and one amid the conversation.

        The two may differ. Amid the conversation the token counts only if it ends the user's turn too: else it may
        be the next turn's header.
        """
        words = chat.PROBES
        turns = [Turn(role="assistant" if i % 2 else "user", content=word) for i, word in enumerate(words)]
        try:
            text = form.text(Chat(turns=tuple(turns)))
        except chat.Refused:
            return
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        controls = [
            (token, start)
            for token, (start, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
            if token in self._controls
        ]
        behind = [next((token for token, at in controls if at > text.rfind(word)), None) for word in words]
        if behind[1] == behind[0] and behind[1] is not None:
            self._turn_ends |= {behind[1]}
        if behind[3] is not None:
            self.stop_ids |= {behind[3]}
            return
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the chat template ends a reply with no special token, and the tokenizer has no end-of-sequence token",
                got=repr(text[text.rfind(words[3]) + len(words[3]) :]),
                fix="Set tokenizer.eos_token, or give a chat_template that ends replies with a special token.",
            )
        self._appends_eos = True
        self._notes.append(f"the chat template ends a reply with no special token: {self.tokenizer.eos_token} is added")


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills rows: any will do, for padding is known by its place and never learnt."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        near = nearest(file.name, [entry.name for entry in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise DataError(f"no such chat template file{near}", got=path, fix="Give the path of a Jinja file.")
    return file.read_text(encoding="utf-8")
