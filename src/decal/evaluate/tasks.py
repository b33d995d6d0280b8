"""Exact-match accuracy: the model answers freely, and its whole reply must be the wanted one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from decal.data import shapes
from decal.data.shapes import Chat, Pair, Row, Turn
from decal.errors import DataError
from decal.evaluate.prompts import Prompts
from decal.model.generate import generate


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question, the wanted reply and the reply that came."""

    question: str
    wanted: str
    reply: str

    @property
    def right(self) -> bool:
        return self.reply.strip() == self.wanted.strip()


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """How many whole replies were exactly the wanted ones; white space around them does not count."""

    answers: tuple[Answer, ...]

    @property
    def right(self) -> int:
        return sum(answer.right for answer in self.answers)

    @property
    def accuracy(self) -> float:
        """Share of right replies, 0 to 1."""
        return self.right / len(self.answers)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked (the turns before the last reply) and the wanted reply."""

    turns: tuple[Turn, ...]
    wanted: str


def questions(rows: Iterable[Row]) -> list[Question]:
    """Read rows of any chat shape; the last reply of each is what the model must say. Raises DataError for others."""
    found: list[Question] = []
    shape = None
    for number, row in enumerate(rows, start=1):
        shape = shape or shapes.recognise(row)
        example = shape.read(row, number)
        if isinstance(example, Pair) and example.as_chat:
            example = example.chat()
        if not isinstance(example, Chat) or len(example.turns) < 2 or example.turns[-1].role != "assistant":
            raise DataError(
                f"row {number} does not end in a reply, so there is nothing to compare with",
                got=shape.says,
                fix="Give conversations that end with the assistant's words.",
            )
        found.append(Question(turns=example.turns[:-1], wanted=example.turns[-1].content))
    if not found:
        raise DataError("there is no row to answer", fix="Give at least one.")
    return found


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[Question],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExactMatch:
    """Answer greedily and freely (no list of labels is given) and compare.

    `max_new_tokens` defaults to the longest wanted reply and its stop token, and 2 more. `on_progress` hears
    (answered, all) after each batch.
    """
    prompts = Prompts(tokenizer)
    if max_new_tokens is None:
        max_new_tokens = 3 + max(len(ids) for ids in tokenizer([q.wanted for q in asked])["input_ids"])
    texts = [prompts.conversation(question.turns) for question in asked]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: little padding
    replies = [""] * len(texts)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        said = generate(
            model,
            tokenizer,
            [texts[i] for i in rows],
            max_new_tokens=max_new_tokens,
            stop_ids=prompts.stop_ids,
            batch_size=batch_size,
        )
        for i, reply in zip(rows, said, strict=True):
            replies[i] = reply
        if on_progress is not None:
            on_progress(first + len(rows), len(order))
    answers = (
        Answer(question=question.turns[-1].content, wanted=question.wanted, reply=reply)
        for question, reply in zip(asked, replies, strict=True)
    )
    return ExactMatch(answers=tuple(answers))
