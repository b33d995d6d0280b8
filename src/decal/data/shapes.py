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

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from decal.errors import DataError, nearest

Row = Mapping[str, Any]
Message = Mapping[str, Any]

LIST_COLUMNS = ("messages", "conversation", "conversations")
ANSWERS, INPUTS = ("output", "response"), ("input", "context")
CLASS_COLUMNS = ("label", "labels", "target", "class", "intent")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
PLACEHOLDER = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One function call that the assistant makes."""

    name: str
    arguments: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message; `role` is system, user, assistant or tool. Only assistant turns with `learn` are trained on."""

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    reasoning: str | None = None
    learn: bool = True


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


def recognise(row: Row, *, shape: str = "auto", template: str | None = None) -> Shape:
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
            raise _unknown(row, f"the rows are not of the shape {shape!r}")
        return found
    for build in tried.values():
        found = build(row)
        if found is not None:
            if found.name == "text":
                _refuse_labels(row)
            return found
    raise _unknown(row, "the rows are of no shape that decal knows")


def _unknown(row: Row, what: str) -> DataError:
    names = list(row)
    guess = f"{{{{{names[0]}}}}} -> {{{{{names[-1]}}}}}" if len(names) > 1 else "{{question}} -> {{answer}}"
    if {"chosen", "rejected"} <= set(names):
        fix = "These are preference pairs; decal trains on replies: keep the chosen ones as messages."
    else:
        fix = (
            "Known: messages; conversations (from/value); prompt + completion; instruction (+ input) + output or "
            f"response; text; or any columns with a template, such as template: {guess!r}."
        )
    return DataError(what, got=f"columns {', '.join(names) or 'none'}", fix=fix)


def _refuse_labels(row: Row) -> None:
    labels = [name for name in CLASS_COLUMNS if name in row]
    if labels:
        raise DataError(
            f"the rows hold text and {labels[0]!r}: as plain text the {labels[0]} would never be learnt",
            got=f"columns {', '.join(row)}",
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
        return Chat(turns=_system(row, number) + _turns(row, name, number), tools=_tools(row, number))

    return Shape(name="messages", says=f"messages in {name!r}", read=read, used=(name, "tools", "system"))


def _sharegpt_shape(row: Row) -> Shape | None:
    name = _list_column(row, "from")
    if name is None:
        return None

    def read(row: Row, number: int) -> Example:
        return Chat(turns=_system(row, number) + _turns(row, name, number), tools=_tools(row, number))

    return Shape(name="sharegpt", says=f"ShareGPT turns in {name!r}", read=read, used=(name, "tools", "system"))


def _pair_shape(row: Row) -> Shape | None:
    if not {"prompt", "completion"} <= set(row):
        return None

    def read(row: Row, number: int) -> Example:
        if isinstance(row.get("prompt"), (list, tuple)):
            given = tuple(_unlearnt(turn) for turn in _turns(row, "prompt", number))
            return Chat(turns=given + _turns(row, "completion", number), tools=_tools(row, number))
        completion = _text(row, "completion", number)
        return Pair(prompt=_text(row, "prompt", number), completion=completion, as_chat=True)

    return Shape(
        name="prompt_completion", says="prompt and completion", read=read, used=("prompt", "completion", "tools")
    )


def _instruction_shape(row: Row) -> Shape | None:
    answer = next((name for name in ANSWERS if name in row), None)
    if answer is None or "instruction" not in row:
        return None
    extra = next((name for name in INPUTS if name in row), None)

    def read(row: Row, number: int) -> Example:
        words = _text(row, "instruction", number)
        more = _text(row, extra, number) if extra is not None and row.get(extra) is not None else ""
        user = f"{words}\n\n{more}" if more.strip() else words
        reply = Turn(role="assistant", content=_text(row, answer, number))
        return Chat(turns=(*_system(row, number), Turn(role="user", content=user), reply))

    used = ("instruction", answer, "system", *([extra] if extra else []))
    says = "instruction, " + (f"{extra}, " if extra else "") + answer
    return Shape(name="instruction", says=says, read=read, used=used)


def _text_shape(row: Row) -> Shape | None:
    if "text" not in row:
        return None

    def read(row: Row, number: int) -> Example:
        return Passage(text=_text(row, "text", number))

    return Shape(name="text", says="plain text", read=read, used=("text",))


def _template_shape(template: str, row: Row) -> Shape:
    names = PLACEHOLDER.findall(template)
    if not names:
        raise DataError("the template names no column", got=repr(template), fix='Write it as "{{text}} -> {{label}}".')
    for name in names:
        if name not in row:
            raise DataError(
                f"the template names a column that is not there: {name!r}{nearest(name, row)}",
                got=f"columns {', '.join(row)}",
                fix="Correct the template.",
            )
    last = list(PLACEHOLDER.finditer(template))[-1]
    head, tail = template[: last.start()], template[last.end() :]
    prompt_head = head.rstrip(" ")
    gap = head[len(prompt_head) :]  # tokenizers join a blank to the word behind it: it belongs to the completion

    def read(row: Row, number: int) -> Example:
        prompt = PLACEHOLDER.sub(lambda match: _cell(row, match[1], number), prompt_head)
        return Pair(prompt=prompt, completion=gap + _cell(row, names[-1], number) + tail)

    return Shape(name="template", says=f"the template {template!r}", read=read, used=tuple(names))


# --- cells -----------------------------------------------------------------------------------------------------


def _wrong(what: str, number: int, value: object, wanted: str = "text") -> DataError:
    kind = "null" if value is None else type(value).__name__
    return DataError(f"row {number}: {what} must be {wanted}", got=kind, fix="Correct or delete this row.")


def _text(row: Row, name: str, number: int) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _wrong(repr(name), number, value)
    return value


def _cell(row: Row, name: str, number: int) -> str:
    """A template's column: text or a plain number (a class, a count)."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return json.dumps(value)
    raise _wrong(repr(name), number, value, "text or a number")


def _system(row: Row, number: int) -> tuple[Turn, ...]:
    if not row.get("system"):
        return ()
    return (Turn(role="system", content=_text(row, "system", number)),)


def _unlearnt(turn: Turn) -> Turn:
    return Turn(role=turn.role, content=turn.content, calls=turn.calls, reasoning=turn.reasoning, learn=False)


def _turns(row: Row, column: str, number: int) -> tuple[Turn, ...]:
    value = row.get(column)
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        raise _wrong(repr(column), number, value, "a list of messages")
    return tuple(_turn(message, f"{column}[{i}]", number) for i, message in enumerate(value))


def _turn(message: Message, where: str, number: int) -> Turn:
    said = message.get("role", message.get("from"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise DataError(f"row {number}: {where} has an unknown role", got=repr(said), fix=f"Known: {known}.")
    content = message["content"] if "content" in message else message.get("value")
    calls = _calls(message, where, number)
    if content is None and calls:
        content = ""
    if role == "call":
        parsed = _parse_calls(content)
        if parsed:
            return Turn(role="assistant", content="", calls=parsed)
        role = "assistant"
    if role == "tool" and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    reasoning = message.get("reasoning_content")
    return Turn(
        role=role,
        content=_content(content, where, number),
        calls=calls,
        reasoning=reasoning if isinstance(reasoning, str) and reasoning else None,
        learn=message.get("weight") != 0,
    )


def _content(value: object, where: str, number: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):  # OpenAI's list of parts
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
        raise _wrong(f"the content of {where}", number, value, "text (decal trains on text, not on images or sound)")
    raise _wrong(f"the content of {where}", number, value)


def _calls(message: Message, where: str, number: int) -> tuple[Call, ...]:
    value = message.get("tool_calls")
    if not value:
        return ()
    parsed = _parse_calls(value)
    if not parsed:
        raise _wrong(f"tool_calls of {where}", number, value, "a list of {name, arguments}")
    return parsed


def _parse_calls(value: object) -> tuple[Call, ...]:
    """Read calls from JSON text, one object or a list; an empty tuple if they are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return ()
    items = value if isinstance(value, (list, tuple)) else [value]
    calls = []
    for item in items:
        inner = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return ()
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            with suppress(json.JSONDecodeError):  # not JSON: kept as the text it is
                arguments = json.loads(arguments)
        calls.append(Call(name=inner["name"], arguments=arguments))
    return tuple(calls)


def _tools(row: Row, number: int) -> tuple[Any, ...]:
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError:
            raise _wrong("'tools'", number, value, "JSON") from None
    if not value:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise _wrong("'tools'", number, value, "a list of functions")
    return tuple(item if "function" in item else {"type": "function", "function": item} for item in value)
