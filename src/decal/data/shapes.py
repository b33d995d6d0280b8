"""Recognise the shape of a data set's rows and turn each row into one typed form.

| shape               | columns                                                                            |
|---------------------|------------------------------------------------------------------------------------|
| `messages`          | `messages` or `conversation`: a list of {role, content}                            |
| `sharegpt`          | `conversations` (or the names above): a list of {from, value}                      |
| `prompt_completion` | `prompt`, `completion`: two texts, or two lists of messages                        |
| `instruction`       | `instruction`, `output` or `response`; also `input` or `context`, and `system`     |
| `text`              | `text`                                                                             |
| `template`          | any, named in "{{text}} -> {{label}}": what stands before the last is the prompt   |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from decal.data import cells
from decal.data.cells import Call as Call
from decal.data.cells import Row as Row
from decal.data.cells import Turn as Turn
from decal.errors import DataError, nearest
from decal.reading import one_line

LIST_COLUMNS = ("messages", "conversation", "conversations")
ANSWERS, INPUTS = ("output", "response"), ("input", "context")
CLASS_COLUMNS = ("label", "labels", "target", "class", "intent")
PLACEHOLDER = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation, and the functions the assistant may call in it (JSON schemas)."""

    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] = ()

    @property
    def has_reply(self) -> bool:
        """Whether an assistant turn with words or calls is there to learn."""
        return any(t.role == "assistant" and t.learn and (t.content.strip() or t.calls) for t in self.turns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A prompt and its completion. `as_chat`: they go through the chat template if the tokenizer has one."""

    prompt: str
    completion: str
    as_chat: bool = False

    def chat(self) -> Chat:
        """Return the pair as a user's turn and the assistant's reply."""
        reply = Turn(role="assistant", content=self.completion)
        return Chat(turns=(Turn(role="user", content=self.prompt), reply))


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """Plain text; all of it is learnt."""

    text: str


Example = Chat | Pair | Passage


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the rows of one data set are read: `name` as in DataConfig.shape, `says` for people."""

    name: str
    says: str
    read: Callable[[Row, int], Example] = field(repr=False)
    used: tuple[str, ...]

    def unused(self, row: Row) -> list[str]:
        """Return the columns of a row that this shape does not read."""
        return sorted(set(row) - set(self.used))


def recognise(row: Row, *, shape: str = "auto", template: str | None = None, number: int = 1) -> Shape:
    """Return the shape of a data set from its first row; raise DataError if it is none that decal reads."""
    if template is not None:
        if shape not in ("auto", "template"):
            raise DataError(f"template and shape={shape!r} contradict each other", fix="Give only one of them.")
        return _template_shape(template, row)
    if shape == "template":
        raise DataError("shape 'template' needs a template", fix='Give template: "{{text}} -> {{label}}".')
    tried = {
        "messages": _messages_shape,
        "sharegpt": _sharegpt_shape,
        "prompt_completion": _pair_shape,
        "instruction": _instruction_shape,
        "text": _text_shape,
    }
    if shape != "auto":
        found = tried[shape](row)
        if found is None:
            _refuse_lists(row, number)
            raise _unknown(row, f"the rows are not of the shape {shape!r}")
        return found
    for build in tried.values():
        found = build(row)
        if found is not None:
            if found.name == "text":
                _refuse_labels(row)
            return found
    _refuse_lists(row, number)
    raise _unknown(row, "the rows are of no shape that decal knows")


def _refuse_lists(row: Row, number: int) -> None:
    """Say what is wrong with a column that by its name should hold messages."""
    name = next((name for name in LIST_COLUMNS if name in row), None)
    if name is None or isinstance(row[name], str):  # a text of that name may be used with a template
        return
    value = row[name]
    first = value[0] if isinstance(value, Sequence) and value else None
    raise DataError(
        f"row {number}, which tells the shape of all: {name!r} must be a list of messages with role and content",
        got=f"keys {', '.join(map(str, first)) or 'none'}" if isinstance(first, Mapping) else cells.shown(value),
        fix=cells.MESSAGES,
    )


def _unknown(row: Row, what: str) -> DataError:
    names = [one_line(str(name), 24) for name in row]
    guess = f"{{{{{names[0]}}}}} -> {{{{{names[-1]}}}}}" if len(names) > 1 else "{{question}} -> {{answer}}"
    if {"chosen", "rejected"} <= set(names):
        fix = "These are preference pairs; decal trains on replies: keep the chosen ones as messages."
    else:
        fix = (
            "Known: messages; conversations; prompt + completion; instruction + output; text; or any columns with a "
            f"template: {guess!r}."
        )
    return DataError(what, got=f"columns {one_line(', '.join(names), 120) or 'none'}", fix=fix)


def _refuse_labels(row: Row) -> None:
    labels = [name for name in CLASS_COLUMNS if name in row]
    if labels:
        raise DataError(
            f"the rows hold text and {labels[0]!r}: as plain text the {labels[0]} would never be learnt",
            got=f"columns {one_line(', '.join(row), 120)}",
            fix=f"Give template: '{{{{text}}}} -> {{{{{labels[0]}}}}}', or shape: text to learn the text alone.",
        )


# --- the shapes ------------------------------------------------------------------------------------------------


def _list_column(row: Row, key: str) -> str | None:
    for name in LIST_COLUMNS:
        value = row.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            first = value[0]
            if isinstance(first, Mapping) and key in first:
                return name
    return None


def _messages_shape(row: Row) -> Shape | None:
    name = _list_column(row, "role")
    if name is None:
        return None

    def read(row: Row, number: int) -> Example:
        return Chat(turns=cells.system(row, number) + cells.turns(row, name, number), tools=cells.tools(row, number))

    return Shape(name="messages", says=f"messages in {name!r}", read=read, used=(name, "tools", "system"))


def _sharegpt_shape(row: Row) -> Shape | None:
    name = _list_column(row, "from")
    if name is None:
        return None

    def read(row: Row, number: int) -> Example:
        return Chat(turns=cells.system(row, number) + cells.turns(row, name, number), tools=cells.tools(row, number))

    return Shape(name="sharegpt", says=f"ShareGPT turns in {name!r}", read=read, used=(name, "tools", "system"))


def _pair_shape(row: Row) -> Shape | None:
    if not {"prompt", "completion"} <= set(row):
        return None

    def read(row: Row, number: int) -> Example:
        if isinstance(row.get("prompt"), (list, tuple)):
            given = tuple(cells.unlearnt(turn) for turn in cells.turns(row, "prompt", number))
            return Chat(turns=given + cells.turns(row, "completion", number), tools=cells.tools(row, number))
        completion = cells.text(row, "completion", number)
        return Pair(prompt=cells.text(row, "prompt", number), completion=completion, as_chat=True)

    return Shape(
        name="prompt_completion", says="prompt and completion", read=read, used=("prompt", "completion", "tools")
    )


def _instruction_shape(row: Row) -> Shape | None:
    answer = next((name for name in ANSWERS if name in row), None)
    if answer is None or "instruction" not in row:
        return None
    extra = next((name for name in INPUTS if name in row), None)

    def read(row: Row, number: int) -> Example:
        words = cells.text(row, "instruction", number)
        more = cells.text(row, extra, number) if extra is not None and row.get(extra) is not None else ""
        user = f"{words}\n\n{more}" if more.strip() else words
        reply = Turn(role="assistant", content=cells.text(row, answer, number))
        return Chat(turns=(*cells.system(row, number), Turn(role="user", content=user), reply))

    used = ("instruction", answer, "system", *([extra] if extra else []))
    says = "instruction, " + (f"{extra}, " if extra else "") + answer
    return Shape(name="instruction", says=says, read=read, used=used)


def _text_shape(row: Row) -> Shape | None:
    if "text" not in row:
        return None

    def read(row: Row, number: int) -> Example:
        return Passage(text=cells.text(row, "text", number))

    return Shape(name="text", says="plain text", read=read, used=("text",))


def _template_shape(template: str, row: Row) -> Shape:
    names = PLACEHOLDER.findall(template)
    if not names:
        raise DataError("the template names no column", got=repr(template), fix='Write it as "{{text}} -> {{label}}".')
    for name in names:
        if name not in row:
            raise DataError(
                f"the template names a column that is not there: {name!r}{nearest(name, row)}",
                got=f"columns {one_line(', '.join(row), 120)}",
                fix="Correct the template.",
            )
    last = list(PLACEHOLDER.finditer(template))[-1]
    head, tail = template[: last.start()], template[last.end() :]
    prompt_head = head.rstrip(" ")
    gap = head[len(prompt_head) :]  # tokenizers join a blank to the word behind it: it belongs to the completion

    def read(row: Row, number: int) -> Example:
        prompt = PLACEHOLDER.sub(lambda match: cells.text_or_number(row, match[1], number), prompt_head)
        return Pair(prompt=prompt, completion=gap + cells.text_or_number(row, names[-1], number) + tail)

    return Shape(name="template", says=f"the template {template!r}", read=read, used=tuple(names))
