"""The eight prompts that an adapter is sealed with, and whether a tokenizer writes them in the sealed ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from decal.data import chat
from decal.data.shapes import Chat, Turn
from decal.errors import DataError
from decal.files import compared, vocabulary
from decal.files.compared import Part, State
from decal.files.sealed import Seal
from decal.words import counted

# Ours, and never the user's rows: an adapter's folder is published. Each asks for another kind of text.
PROMPTS = (
    "What can you do for me?",
    "Write a short poem about the sea.",
    "List three fruits, one on each line.",
    "Translate into French: The train leaves at nine.",
    "def mean(values):",
    '{"name": "Ada", "age": 36, "city":',
    "17 + 25 =",
    "Summarise: the meeting moved to Monday, and nobody told Sam.",
)
LONGEST = 128  # tokens of a prompt: a template may write a page of its own before it
SHOWN = 6  # tokens in an error, from the first that differs


def token_ids(tokenizer: Any) -> tuple[list[tuple[int, ...]], bool]:
    """Return the ids of the eight prompts, and whether the chat template wrote them.

    Where there is no template, or it refuses them, they are written as they are.
    """
    form = chat.choose(tokenizer, None)
    if form is not None:
        chats = [Chat(turns=(Turn(role="user", content=text),)) for text in PROMPTS]
        try:
            texts = [form.text(one, generation_prompt=True) for one in chats]
            return [_ids(tokenizer, text, special=False)[-LONGEST:] for text in texts], True
        except chat.Refused:
            pass  # one that asks for a system turn first, say: it will refuse the user's questions, too, and say so
    return [_ids(tokenizer, text, special=True)[:LONGEST] for text in PROMPTS], False


def _ids(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])


def parts(seal: Seal, tokenizer: Any, libraries: dict[str, str | None]) -> list[Part]:
    """Compare the tokenizer, its chat template, and the prompts' ids with the sealed ones."""
    now = vocabulary.tokens_of(tokenizer)
    ids = prompts(seal, tokenizer)
    same_libraries = seal.versions is not None and all(
        seal.versions.get(name) == libraries.get(name) for name in ("transformers", "tokenizers")
    )
    rewritten = ids.state is State.ok and not same_libraries
    return [compared.vocabulary(seal, now, rewritten=rewritten), compared.template(seal, now), ids]


def refuse(seal: Seal, tokenizer: Any, libraries: dict[str, str | None], *, where: str) -> None:
    """Raise AdapterError if prompts would be written in other ids than those that the adapter was trained with."""
    if seal.tokens is None:
        return
    *own, ids = parts(seal, tokenizer, libraries)
    shown = f"; {ids.got}" if ids.state is State.differs else ""
    compared.refuse((_with(part, shown) for part in own), where=where)
    compared.refuse([ids], where=where)


def _with(part: Part, shown: str) -> Part:
    return Part(name=part.name, state=part.state, says=part.says, got=f"{part.got}{shown}", fix=part.fix)


def prompts(seal: Seal, tokenizer: Any) -> Part:
    """Compare the ids of the eight prompts."""
    name = "prompt ids"
    if seal.reference is None:
        return Part(name=name, state=State.not_sealed, says="")
    if "strftime_now" in (vocabulary.template_of(tokenizer) or ""):
        return Part(name=name, state=State.not_compared, says="the chat template writes today's date")
    sealed = [one.ids for one in seal.reference.answers]
    try:
        found, _ = token_ids(tokenizer)
    except DataError as error:
        return _differs(name, error.what)
    for number, (before, now) in enumerate(zip(sealed, found, strict=False), start=1):
        if before != now:
            at = next(
                (i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now))
            )
            return _differs(
                name,
                f"prompt {number} from token {at + 1}: {_text(tokenizer, now[at:])}, where "
                f"{_text(tokenizer, before[at:])} is sealed",
            )
    return Part(
        name=name,
        state=State.ok,
        says=f"{counted(len(sealed), 'prompt')}, {counted(sum(len(ids) for ids in sealed), 'token')}",
    )


def _differs(name: str, got: str) -> Part:
    return Part(
        name=name,
        state=State.differs,
        says="is asked in other tokens than those that it was trained with",
        got=got,
        fix="Use the tokenizer and chat template that were saved with the adapter, unedited.",
    )


def _text(tokenizer: Any, ids: Iterable[int]) -> str:
    """Return the first of these ids as text; as numbers where this tokenizer has no such token."""
    first = list(ids)[:SHOWN]
    return repr(tokenizer.decode(first)) if all(i < len(tokenizer) for i in first) else repr(first)
