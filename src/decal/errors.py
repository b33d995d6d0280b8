"""What the user did wrong, said so that it can be mended: what, got, fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DecalError(ValueError):
    """An error of the user's input; its text says what is wrong, what was given and how to mend it.

    A ValueError, so that scripts written against other libraries catch it where they catch theirs.
    """

    def __init__(self, what: str, *, got: object = None, fix: str) -> None:
        self.what = what
        self.got = got
        self.fix = fix
        text = what if got is None else f"{what} (got: {got})"
        super().__init__(f"{text}. {fix}")


class ConfigError(DecalError):
    """A setting is unknown, of the wrong type or without sense."""


class TargetError(DecalError):
    """A target pattern matched nothing, or something that cannot be adapted."""


class AdapterError(DecalError):
    """An adapter file does not fit the model, is damaged, or is of a kind that decal refuses."""


class DataError(DecalError):
    """A data set is empty, broken, of an unknown shape, or trains nothing."""


class RunError(DecalError):
    """A run folder cannot be used as asked: it holds another run, or no checkpoint."""


class Unsupported(DecalError, NotImplementedError):
    """Something that other libraries offer and decal does not; the text names the way to go."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; nearest is 'x'` for the known word closest to `word`, or an empty string."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; nearest is {matches[0]!r}" if matches else ""
