"""Ways in which a file is damaged or wrong, each drawn from a generator: the same seed damages in the same way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import yaml

Damage = Callable[[bytes, random.Random], bytes]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**30, -(10**30), 1e308, 0.5, "", "16", "text", "\0", "é" * 300, [], {}, [[]],
    [None], ["text", 3], {"a": 1}, [{"a": []}],
)  # fmt: skip


def truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One bit, anywhere."""
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def flipped_early(data: bytes, draw: random.Random) -> bytes:
    """One bit in the first part, where formats keep their heads."""
    first = min(len(data), 2048)
    return flipped(data[:first], draw) + data[first:]


def zeroed(data: bytes, draw: random.Random) -> bytes:
    """A stretch of zeros, as a file system leaves after a power cut."""
    at, length = draw.randrange(len(data)), draw.choice((1, 16, 512, 4096))
    return data[:at] + bytes(min(length, len(data) - at)) + data[at + length :]


def emptied(data: bytes, draw: random.Random) -> bytes:
    return b""


def garbage(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice((1, 9, len(data))))


def overwritten(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(8) + data[at + 8 :]


def doubled(data: bytes, draw: random.Random) -> bytes:
    """The file written twice, one after the other."""
    return data + data


def cut_out(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice((1, 8, 300)) :]


def marked(data: bytes, draw: random.Random) -> bytes:
    """With a byte order mark, as editors of Windows write it."""
    return b"\xef\xbb\xbf" + data


def in_utf16(data: bytes, draw: random.Random) -> bytes:
    return data.decode("utf-8", "replace").encode("utf-16")


def with_nul(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + b"\0" + data[at:]


def not_utf8(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.choice((b"\xe9", b"\xff\xfe", b"\xed\xa0\x80")) + data[at:]


ANY: dict[str, Damage] = {
    "truncated": truncated,
    "bit flipped": flipped,
    "bit flipped early": flipped_early,
    "zeroed": zeroed,
    "emptied": emptied,
    "garbage": garbage,
    "overwritten": overwritten,
    "written twice": doubled,
    "cut out": cut_out,
}
TEXT: dict[str, Damage] = {
    "byte order mark": marked,
    "UTF-16": in_utf16,
    "NUL": with_nul,
    "not UTF-8": not_utf8,
}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inner for path in places(part, (*at, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return the value with another at the end of a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """Return the value without what lies at the end of a path."""
    if len(path) == 1:
        copy = dict(value) if isinstance(value, dict) else list(value)
        del copy[path[0]]
        return copy
    return replaced(value, path[:1], without(value[path[0]], path[1:]))


def swapped(value: Any, draw: random.Random) -> Any:
    """Another value, mostly of another type, somewhere; near the top as often as deep down."""
    found = places(value)
    depth = draw.choice([len(path) for path in found])
    return replaced(value, draw.choice([path for path in found if len(path) == depth]), draw.choice(VALUES))


def lost(value: Any, draw: random.Random) -> Any:
    """One key or item less."""
    found = [path for path in places(value) if path]
    return without(value, draw.choice(found)) if found else None


def deep(value: Any, draw: random.Random) -> str:
    return "[" * 100_000 + "]" * 100_000


def twice(value: Any, draw: random.Random) -> str:
    """An object in which a key stands twice, with two values."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    key = draw.choice(list(value))
    return json.dumps(value)[:-1] + f", {json.dumps(key)}: {json.dumps(draw.choice(VALUES))}}}"


def in_json(change: Callable[[Any, random.Random], Any]) -> Damage:
    """Return the damage that changes the value of a JSON file; a text that it returns is the new file."""

    def damage(data: bytes, draw: random.Random) -> bytes:
        new = change(json.loads(data), draw)
        return (new if isinstance(new, str) and change in (deep, twice) else json.dumps(new)).encode()

    return damage


def in_line(change: Callable[[Any, random.Random], Any]) -> Damage:
    """Return the damage that changes the value of one line of a JSON-lines file."""

    def damage(data: bytes, draw: random.Random) -> bytes:
        lines = data.split(b"\n")
        at = draw.randrange(len(lines) - 1)
        lines[at] = in_json(change)(lines[at], draw)
        return b"\n".join(lines)

    return damage


def in_yaml(change: Callable[[Any, random.Random], Any]) -> Damage:
    """Return the damage that changes the value of a YAML file."""

    def damage(data: bytes, draw: random.Random) -> bytes:
        new = change(yaml.safe_load(data), draw)
        return (new if isinstance(new, str) else yaml.safe_dump(new)).encode()

    return damage


CHANGES: dict[str, Callable[[Any, random.Random], Any]] = {
    "other value": swapped,
    "another value": swapped,  # twice as often: there are the most of these
    "lost value": lost,
    "deep nesting": deep,
    "doubled key": twice,
}
KINDS: dict[str, dict[str, Damage]] = {
    "bytes": ANY,
    "text": {**ANY, **TEXT},
    "json": {**ANY, **TEXT, **{name: in_json(change) for name, change in CHANGES.items()}},
    "lines": {**ANY, **TEXT, **{name: in_line(change) for name, change in CHANGES.items()}},
    "yaml": {**ANY, **TEXT, **{name: in_yaml(change) for name, change in CHANGES.items()}},
}
