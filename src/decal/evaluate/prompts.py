"""How a question is put to a model, and at which tokens its reply ends: both exactly as training wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from decal.data import chat
from decal.data.encode import Encoder
from decal.data.shapes import Chat, Turn
from decal.errors import DataError
from decal.spec import DataConfig


class Prompts:
    """The prompts of one tokenizer. Give it the tokenizer that lies with the adapter: it holds the template in use.

    `stop_ids` are the tokens at which a reply ends; `notes` say what had to be assumed.
    """

    def __init__(self, tokenizer: Any) -> None:
        form = chat.choose(tokenizer, None)
        self.has_template = form is not None
        self._format = form or chat.default(tokenizer)
        tokenizer.chat_template = self._format.template
        self._bos = str(tokenizer.bos_token) if chat.adds_bos(tokenizer) else ""
        self.stop_ids: tuple[int, ...] = tuple(sorted(Encoder(DataConfig(path=""), tokenizer).stop_ids))
        self.notes: tuple[str, ...] = tuple(self._format.notes)

    def conversation(self, turns: Sequence[Turn]) -> str:
        """Return the conversation up to the point where the assistant is to speak."""
        try:
            return self._format.text(Chat(turns=tuple(turns)), generation_prompt=True)
        except chat.Refused as refusal:
            raise DataError(
                "the chat template refuses this conversation",
                got=str(refusal),
                fix="Begin with a user turn and let the roles take turns.",
            ) from None

    def question(self, text: str, *, system: str | None = None) -> str:
        """Return the prompt for one message of a user."""
        before = () if system is None else (Turn(role="system", content=system),)
        return self.conversation((*before, Turn(role="user", content=text)))

    def raw(self, text: str) -> str:
        """Return the prompt of a model that goes on with a plain text."""
        return self._bos + text
