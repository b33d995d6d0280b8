"""Read the cells of a row: text, numbers, messages and their calls. What is none is an error that names the row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from decal.errors import DataError
from decal.reading import one_line

Row = Mapping[str, Any]
Message = Mapping[str, Any]

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
MESSAGES = (
    'Write it as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], or delete this row.'
)
KINDS = {
    "NoneType": "null",
    "str": "text",
    "int": "number",
    "float": "number",
    "bool": "true or false",
    "dict": "object",
}


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


def shown(value: object) -> str:
    kind = KINDS.get(type(value).__name__, type(value).__name__)
    return kind if value is None else f"{kind} {json.dumps(value, ensure_ascii=False, default=str)[:60]}"


def _wrong(what: str, number: int, value: object, wanted: str = "text", *, fix: str = "") -> DataError:
    fix = fix or "Correct or delete this row."
    return DataError(f"row {number}: {what} must be {wanted}", got=shown(value), fix=fix)


def _there(row: Row, name: str, number: int) -> Any:
    """Return a cell. Raises DataError where the row lacks the column."""
    if name not in row:
        raise DataError(
            f"row {number} has no {name!r}, which the first row has",
            got=f"columns {', '.join(map(str, row)) or 'none'}",
            fix="Correct or delete this row: all rows must be of one shape.",
        )
    return row[name]


def text(row: Row, name: str, number: int) -> str:
    value = _there(row, name, number)
    if not isinstance(value, str):
        raise _wrong(repr(name), number, value)
    return value


def text_or_number(row: Row, name: str, number: int) -> str:
    """A template's column: text or a plain number (a class, a count)."""
    value = _there(row, name, number)
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return json.dumps(value)
    raise _wrong(repr(name), number, value, "text or a number")


def system(row: Row, number: int) -> tuple[Turn, ...]:
    if not row.get("system"):
        return ()
    return (Turn(role="system", content=text(row, "system", number)),)


def unlearnt(turn: Turn) -> Turn:
    return Turn(role=turn.role, content=turn.content, calls=turn.calls, reasoning=turn.reasoning, learn=False)


def turns(row: Row, column: str, number: int) -> tuple[Turn, ...]:
    value = _there(row, column, number)
    if not isinstance(value, (list, tuple)):
        raise _wrong(repr(column), number, value, "a list of messages", fix=MESSAGES)
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise _wrong(f"{column}[{i}]", number, message, "a message with role and content", fix=MESSAGES)
    return tuple(_turn(message, f"{column}[{i}]", number) for i, message in enumerate(value))


def _turn(message: Message, where: str, number: int) -> Turn:
    said = message.get("role", message.get("from"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise DataError(
            f"row {number}: {where} has an unknown role", got=one_line(repr(said), 60), fix=f"Known: {known}."
        )
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


def tools(row: Row, number: int) -> tuple[Any, ...]:
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
