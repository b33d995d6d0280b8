"""Write a conversation as text with a chat template, and find where in it the assistant speaks.

The spans are found in one of three ways, the first that holds:

1. the template marks the replies itself with `{% generation %}` (transformers' convention);
2. marks: the conversation is rendered once more with private characters around each reply; if the text without them
   equals the true text, they stand where the reply stands. What the template puts between the generation prompt and
   the reply (such as an empty `<think>` block) belongs to the reply: the model must write it;
3. prefixes: the reply is what `messages[:i+1]` renders beyond `messages[:i]` with the generation prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from decal.data.shapes import Call, Chat, Turn
from decal.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]  # first character, character after the last

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ '### ' + m['role'] | capitalize + ':\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)
OPEN, CLOSE = "\ue0d0", "\ue0d1"  # private-use characters: no data and no template holds them
PROBE = "decalprobe"  # a word that no template holds


class Refused(Exception):
    """The template cannot write this conversation (roles that do not alternate, say)."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text; `spans` are the characters of the replies to learn."""

    text: str
    spans: tuple[Span, ...]


class ChatFormat:
    """One tokenizer's chat template: how conversations become text.

    `template` is the Jinja source in use (to be kept with the adapter), `notes` say what was adapted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, *, notes: Sequence[str] = ()) -> None:
        self.template = template
        self.notes: dict[str, None] = dict.fromkeys(notes)  # an ordered set
        self._special = dict(tokenizer.special_tokens_map)
        self._marked = "endgeneration" in template
        self._supports: dict[str, bool] = {}
        self.generation_prompt, self._lead = self._learn_header()

    def write(self, chat: Chat) -> Rendered:
        """Return the text and the reply spans; raise Refused if the template cannot write this conversation."""
        turns = self._adapt(chat)
        messages = [_message(turn) for turn in turns]
        tools = list(chat.tools) if chat.tools and self._knows("tools") else None
        learnt = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learn]
        text, tagged = self._render(messages, tools)
        if self._marked:
            return Rendered(text=text, spans=_tagged(tagged, turns))
        marks = self._marks(text, messages, tools, learnt, both=True)
        if not marks:
            marks = self._marks(text, messages, tools, learnt, both=False)
        spans = [marks[i] if i in marks else self._prefix(text, messages, tools, i) for i in learnt]
        return Rendered(text=text, spans=tuple(spans))

    def text(self, chat: Chat, *, generation_prompt: bool = False) -> str:
        """Return the conversation as text."""
        messages = [_message(turn) for turn in self._adapt(chat)]
        return self._render(messages, None, generation_prompt=generation_prompt)[0]

    # --- rendering ---

    def _render(
        self, messages: list[Message], tools: list[Any] | None, *, generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, tagged = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=generation_prompt,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise Refused(str(error)) from error
        return texts[0], (tagged[0] if self._marked else [])

    def _learn_header(self) -> tuple[str, str]:
        """Return the generation prompt, and what the template puts between it and the words of a reply."""
        question: Message = {"role": "user", "content": PROBE}
        try:
            plain = self._render([question], None)[0]
            asked = self._render([question], None, generation_prompt=True)[0]
            answered = self._render([question, {"role": "assistant", "content": PROBE}], None)[0]
        except Refused:
            return "", ""
        prompt = asked.removeprefix(plain) if asked.startswith(plain) else ""
        at = answered.rfind(PROBE)
        lead = answered[len(asked) : at] if answered.startswith(asked) and at > len(asked) else ""
        return prompt, lead

    def _marks(
        self, text: str, messages: list[Message], tools: list[Any] | None, learnt: list[int], *, both: bool
    ) -> dict[int, Span]:
        """Return the spans of the replies that marks can show; empty if the marks change or leave the text.

        `both=False` marks the ends alone: some templates take the reply apart at its start (`<think>`).
        """
        shown = [i for i in learnt if messages[i]["content"].strip() and "tool_calls" not in messages[i]]
        if not shown or not (both or self.generation_prompt):
            return {}
        marked = list(messages)
        for i in shown:
            marked[i] = {**messages[i], "content": _mark(messages[i]["content"], OPEN if both else "")}
        try:
            pieces = self._render(marked, tools)[0].split(CLOSE)
        except Refused:
            return {}
        if len(pieces) != len(shown) + 1 or "".join(pieces).replace(OPEN, "") != text:
            return {}
        spans: dict[int, Span] = {}
        last = 0
        for i, piece in zip(shown, pieces, strict=False):
            before, opened, _ = piece.rpartition(OPEN)
            end = last + len(piece) - len(opened)
            start = last + len(before) if opened else end
            if both and not opened:
                return {}
            if text.endswith(self.generation_prompt + self._lead, last, start):
                start -= len(self._lead)
            elif self.generation_prompt and not text.endswith(self.generation_prompt, last, start):
                prompt_at = text.rfind(self.generation_prompt, last, start)
                if prompt_at >= 0:
                    start = prompt_at + len(self.generation_prompt)
                elif not both:
                    return {}
            spans[i] = (start, end)
            last = end
        return spans

    def _prefix(self, text: str, messages: list[Message], tools: list[Any] | None, i: int) -> Span:
        """Return the span of reply i as what messages[:i+1] renders beyond messages[:i] and the generation prompt."""
        before = self._render(messages[:i], tools, generation_prompt=True)[0] if i else self.generation_prompt
        after = self._render(messages[: i + 1], tools)[0]
        for part, name in ((before, f"the first {i} messages"), (after, f"the first {i + 1} messages")):
            if not text.startswith(part):
                at = next(k for k, (a, b) in enumerate(zip(text + "\0", part, strict=False)) if a != b)
                raise DataError(
                    f"the chat template writes {name} otherwise within the whole conversation, "
                    f"so the reply cannot be found: alone {part[at : at + 40]!r}, whole {text[at : at + 40]!r}",
                    got=f"after {text[max(at - 60, 0) : at]!r}",
                    fix="Use a template that marks replies with {% generation %}, or split the conversation.",
                )
        return len(before), len(after)

    # --- what the template can say ---

    def _adapt(self, chat: Chat) -> list[Turn]:
        """Return the turns with what the template cannot say written in a way it can; each such change is noted."""
        turns = list(chat.turns)
        if chat.tools and not self._knows("tools"):
            self._note("the chat template has no place for tools: they are written as JSON in the system turn")
            said = "Tools:\n" + json.dumps(list(chat.tools), ensure_ascii=False)
            if turns and turns[0].role == "system":
                turns[0] = Turn(role="system", content=f"{turns[0].content}\n\n{said}")
            else:
                turns.insert(0, Turn(role="system", content=said))
        if any(turn.calls for turn in turns) and not self._knows("calls"):
            self._note("the chat template has no tool calls: they are written as JSON in the assistant's turn")
            turns = [_calls_as_text(turn) if turn.calls else turn for turn in turns]
        if any(turn.role == "tool" for turn in turns) and not self._knows("tool"):
            self._note("the chat template has no tool turns: tool results are written as user turns")
            turns = [Turn(role="user", content=t.content) if t.role == "tool" else t for t in turns]
        if turns and turns[0].role == "system" and not self._knows("system"):
            self._note("the chat template has no system turn: it is written at the start of the first user turn")
            turns = _system_into_user(turns)
        return turns

    def _note(self, text: str) -> None:
        self.notes[text] = None

    def _knows(self, what: str) -> bool:
        """Whether a probe conversation comes out with its probe word: templates that drop or refuse it do not."""
        if what not in self._supports:
            self._supports[what] = self._probe(what)
        return self._supports[what]

    def _probe(self, what: str) -> bool:
        user, reply = Turn(role="user", content="hello"), Turn(role="assistant", content="hello")
        call = Turn(role="assistant", content="", calls=(Call(name="f" if what == "tool" else PROBE, arguments={}),))
        tools: list[Any] | None = None
        if what == "system":
            turns = [Turn(role="system", content=PROBE), user, reply]
        elif what == "calls":
            turns = [user, call]
        elif what == "tool":
            middle = call if self._knows("calls") else reply
            turns = [user, middle, Turn(role="tool", content=PROBE), reply]
        else:
            turns = [user, reply]
            schema = {"type": "object", "properties": {}}
            tools = [{"type": "function", "function": {"name": PROBE, "description": "", "parameters": schema}}]
        try:
            return PROBE in self._render([_message(turn) for turn in turns], tools)[0]
        except Refused:
            return False


def choose(tokenizer: PreTrainedTokenizerBase, template: str | None) -> ChatFormat | None:
    """Return the format of a template's text, else of the tokenizer's own template; None if there is neither."""
    if template is not None:
        return ChatFormat(tokenizer, template)
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        own = own.get("default")
    return ChatFormat(tokenizer, own) if own else None


def default(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Return the stated default for a tokenizer without a chat template: ChatML if it has the tokens, else PLAIN."""
    known = tokenizer.get_vocab()
    if "<|im_start|>" in known and "<|im_end|>" in known:
        return ChatFormat(tokenizer, CHATML, notes=["the tokenizer has no chat template: ChatML is used"])
    if tokenizer.eos_token is None:
        raise DataError(
            "the tokenizer has neither a chat template nor an end-of-sequence token, so no reply could end",
            fix="Set tokenizer.eos_token, or give chat_template.",
        )
    bos = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    note = "the tokenizer has no chat template: '### User:\\n...\\n\\n### Assistant:\\n...' + eos is used"
    return ChatFormat(tokenizer, bos + PLAIN, notes=[note])


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token in front of a plain text."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bool(ids and ids[0] == tokenizer.bos_token_id)


def _message(turn: Turn) -> Message:
    """A turn in the words of transformers' templates."""
    message: Message = {"role": turn.role, "content": turn.content}
    if turn.reasoning is not None:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def _mark(content: str, opening: str) -> str:
    """Put the marks inside the outer white space, so that templates that trim still see it at the edge."""
    words = content.strip()
    start = content.index(words)
    return content[:start] + opening + words + CLOSE + content[start + len(words) :]


def _tagged(spans: Sequence[Span], turns: Sequence[Turn]) -> tuple[Span, ...]:
    replies = [turn for turn in turns if turn.role == "assistant"]
    if all(turn.learn for turn in replies):
        return tuple((start, end) for start, end in spans if end > start)
    if len(spans) != len(replies):
        raise Refused(f"{len(spans)} generation blocks for {len(replies)} assistant turns, some of which have weight 0")
    return tuple(span for span, turn in zip(spans, replies, strict=True) if turn.learn)


def _calls_as_text(turn: Turn) -> Turn:
    said = [turn.content] if turn.content.strip() else []
    for call in turn.calls:
        said.append(json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False))
    return Turn(role="assistant", content="\n".join(said), reasoning=turn.reasoning, learn=turn.learn)


def _system_into_user(turns: list[Turn]) -> list[Turn]:
    system, *rest = turns
    for i, turn in enumerate(rest):
        if turn.role == "user":
            rest[i] = Turn(role="user", content=f"{system.content}\n\n{turn.content}")
            return rest
    return [Turn(role="user", content=system.content), *rest]
