"""Write a conversation as text with a chat template, and find where in it the assistant speaks.

The spans are found in one of three ways, the first that holds:

1. the template marks the replies itself with `{% generation %}` (transformers' convention);
2. marks: the conversation is rendered once more with private characters around each reply; if the text without them
   equals the true text, they stand where the reply stands. What the template puts between the generation prompt and
   the reply (such as an empty `<think>` block) belongs to the reply: the model must write it;
3. prefixes: the reply is what `messages[:i+1]` renders beyond `messages[:i]` with the generation prompt; where the
   template writes a past reply otherwise than a last one, it lies between the header and the tail of replies around
   one mark. If that fails too, it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from decal.data.shapes import Call, Chat, Turn
from decal.errors import DataError
from decal.reading import one_line

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
PROBES = ("decalproba", "decalprobb", "decalprobc", "decalprobd")  # words that no template holds
PROBE = PROBES[0]


class Refused(Exception):
    """The template cannot write this conversation (roles that do not alternate, say)."""


class Unwritten(Exception):
    """The template writes the same whatever the assistant says."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text; `spans` are the characters of the replies to learn, `worded` says which are not empty."""

    text: str
    spans: tuple[Span, ...]
    worded: tuple[bool, ...]


class ChatFormat:
    """One tokenizer's chat template: how conversations become text.

    `template` is the Jinja source in use (to be kept with the adapter), `name` is for errors, `notes` say what was
    adapted. Raises DataError for a template that is no Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        name: str = "the chat template",
        notes: Sequence[str] = (),
    ) -> None:
        self.template = template
        self._name = name
        self.notes: dict[str, None] = dict.fromkeys(notes)  # an ordered set
        self._special = dict(tokenizer.special_tokens_map)
        self._marked = "endgeneration" in template
        self._supports: dict[str, bool] = {}
        self._header, self._lead, self._tail = self._learn_frame()
        if "strftime_now" in template:
            self._note("the chat template may write today's date: on another day the same rows give other tokens")

    def write(self, chat: Chat) -> Rendered:
        """Return the text and the reply spans.

        Raises Refused if the template cannot write this conversation, Unwritten if it never writes a reply.
        """
        if not self._knows("reply"):
            raise Unwritten
        turns = self._adapt(chat)
        messages = [_message(turn) for turn in turns]
        tools = list(chat.tools) if chat.tools and self._knows("tools") else None
        learnt = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learn]
        text, tagged = self._render(messages, tools)
        if self._marked:
            marked = _tagged(tagged, turns)
            return Rendered(text=text, spans=marked, worded=(True,) * len(marked))
        spans = self._marks(text, messages, tools, learnt)
        for i in learnt:
            if i not in spans:
                spans[i] = self._prefix(text, messages, tools, i)
        worded = tuple(bool(turns[i].content.strip() or turns[i].calls) for i in learnt)
        return Rendered(text=text, spans=tuple(spans[i] for i in learnt), worded=worded)

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
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is no Jinja: line {error.lineno}: {one_line(str(error.message), 80)}",
                got=self._name,
                fix="Correct it, or give another data.chat_template.",
            ) from None
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise Refused(str(error)) from error
        return texts[0], (tagged[0] if self._marked else [])

    def _learn_frame(self) -> tuple[str, str, str]:
        """Return what the template puts around a reply, as (header, lead, tail).

        The header stands in the generation prompt too; the lead between it and the words must be generated; the tail
        is what follows the words, amid a conversation and at its end alike.
        """
        said = [{"role": "assistant" if i % 2 else "user", "content": word} for i, word in enumerate(PROBES)]
        try:
            plain, asked, one, two = (
                self._render(messages, None, generation_prompt=prompt)[0]
                for messages, prompt in ((said[:1], False), (said[:1], True), (said[:2], False), (said, False))
            )
        except Refused:
            return "", "", ""
        words, last = two.rfind(PROBES[1]), two.rfind(PROBES[3])
        tail = _common(two[words + len(PROBES[1]) :], two[last + len(PROBES[3]) :]) if 0 < words < last else ""
        prompt = asked[len(_common(plain, asked)) :]
        if not prompt:
            return "", one[len(asked) : one.rfind(PROBES[1])] if one.startswith(asked) else "", tail
        between = one[one.find(PROBES[0]) + len(PROBES[0]) : max(one.rfind(PROBES[1]), 0)]
        header = next((prompt[:k] for k in range(len(prompt), len(prompt) // 2, -1) if prompt[:k] in between), "")
        if header != prompt:
            left = prompt[len(header) :]
            self._note(f"the generation prompt ends in {left!r}, which stands before no reply in training")
        lead = between[between.rfind(header) + len(header) :] if header else ""
        return header, lead, tail

    def _marks(self, text: str, messages: list[Message], tools: list[Any] | None, learnt: list[int]) -> dict[int, Span]:
        """Return the spans of the replies that marks can show; empty if the marks change the text or get lost."""
        shown = [i for i in learnt if messages[i]["content"].strip() and "tool_calls" not in messages[i]]
        if not shown:
            return {}
        marked = list(messages)
        for i in shown:
            marked[i] = {**messages[i], "content": _mark(messages[i]["content"])}
        try:
            pieces = self._render(marked, tools)[0].replace(CLOSE, OPEN).split(OPEN)
        except Refused:
            return {}
        if len(pieces) != 2 * len(shown) + 1 or "".join(pieces) != text:
            return {}
        spans: dict[int, Span] = {}
        last = 0
        for i, before, words in zip(shown, pieces[::2], pieces[1::2], strict=False):
            start = last + len(before)
            end = start + len(words)
            spans[i] = (self._start(text, messages[i]["content"], last, start), end)
            last = end
        return spans

    def _start(self, text: str, content: str, last: int, start: int) -> int:
        """Return where generation of a reply starts, whose first visible character stands at `start`."""
        own = content[: len(content) - len(content.lstrip())]  # the reply's own blanks, which a template may trim
        for lead in (self._lead + own, self._lead, own, ""):
            if text.endswith(self._header + lead, last, start):
                return start - len(lead)
        header = text.rfind(self._header, last, start) if self._header else -1
        return header + len(self._header) if header >= 0 else start

    def _prefix(self, text: str, messages: list[Message], tools: list[Any] | None, i: int) -> Span:
        """Return the span of reply i as what messages[:i+1] renders beyond messages[:i] and the generation prompt."""
        try:
            before = self._render(messages[:i], tools, generation_prompt=True)[0] if i else self._header
            after = self._render(messages[: i + 1], tools)[0]
        except Refused:  # a part of a conversation may be against the template's rules
            found = self._landmark(text, messages, tools, i)
            if found is None:
                raise
            return found
        for part, count in ((before, i), (after, i + 1)):
            if not text.startswith(part):
                found = self._landmark(text, messages, tools, i)
                if found is None:
                    raise _parting(text, part, count)
                return found
        return len(before), len(after)

    def _landmark(self, text: str, messages: list[Message], tools: list[Any] | None, i: int) -> Span | None:
        """Return the span of reply i from the header before and the tail behind one mark inside it, if all are there.

        For templates that write a past reply otherwise than a last one (without its thoughts, say).
        """
        if not self._header.strip() or not self._tail.strip():
            return None
        marked = list(messages)
        marked[i] = _landmarked(messages[i])
        try:
            before, *rest = self._render(marked, tools)[0].split(CLOSE)
        except Refused:
            return None
        if len(rest) != 1 or before + rest[0] != text:
            return None
        start, end = before.rfind(self._header), text.find(self._tail, len(before))
        return (start + len(self._header), end + len(self._tail)) if start >= 0 and end >= 0 else None

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
        """Whether a probe conversation comes out with its probe word: templates that drop or refuse it do not.

        A reply is known if another one gives another text (it may be rewritten), or if the probe is refused.
        """
        if what not in self._supports:
            self._supports[what] = self._probe(what)
        return self._supports[what]

    def _probe(self, what: str) -> bool:
        user, reply = Turn(role="user", content="hello"), Turn(role="assistant", content="hello")
        if what == "reply":
            two = [[_message(user), {"role": "assistant", "content": word}] for word in PROBES[:2]]
            try:
                return self._render(two[0], None)[0] != self._render(two[1], None)[0]
            except Refused:
                return True
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


def choose(
    tokenizer: PreTrainedTokenizerBase, template: str | None, *, name: str = "the chat template"
) -> ChatFormat | None:
    """Return the format of a template's text, else of the tokenizer's own template; None if there is neither."""
    if template is not None:
        return ChatFormat(tokenizer, template, name=name)
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        own = own.get("default")
    return ChatFormat(tokenizer, own, name=name) if own else None


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


def _parting(text: str, part: str, count: int) -> DataError:
    at = len(_common(text, part))
    return DataError(
        f"the chat template writes the first {count} messages otherwise within the whole, so no reply can be found",
        got=f"after {text[max(at - 30, 0) : at]!r} alone {part[at : at + 30]!r}, whole {text[at : at + 30]!r}",
        fix="Use a template that marks replies with {% generation %}, or split the conversation.",
    )


def _common(a: str, b: str) -> str:
    """Return the longest text with which both begin."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(character for character, _ in same)


def _mark(content: str) -> str:
    """Put the marks inside the outer white space, so that templates that trim still see it at the edge."""
    words = content.strip()
    start = content.index(words)
    return content[:start] + OPEN + words + CLOSE + content[start + len(words) :]


def _landmarked(message: Message) -> Message:
    """Put one mark at the end of the words, or of the last called function's name."""
    if message["content"].strip() or not message.get("tool_calls"):
        end = len(message["content"].rstrip())
        return {**message, "content": message["content"][:end] + CLOSE + message["content"][end:]}
    *calls, last = message["tool_calls"]
    function = {**last["function"], "name": last["function"]["name"] + CLOSE}
    return {**message, "tool_calls": [*calls, {**last, "function": function}]}


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
