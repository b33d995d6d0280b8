"""Recognising the shape of rows and turning them into one form."""

from __future__ import annotations

from typing import Any

import pytest

from decal.data.shapes import Call, Chat, Pair, Passage, Turn, recognise
from decal.errors import DataError

USER = Turn(role="user", content="Hi")
REPLY = Turn(role="assistant", content="Hello")
SYSTEM = Turn(role="system", content="Be kind.")
CALL = Turn(role="assistant", content="", calls=(Call(name="f", arguments={"x": 1}),))
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FUNCTION = {"type": "function", "function": {"name": "f"}}

CASES: list[tuple[dict[str, Any], str, Any]] = [
    ({"messages": SAID}, "messages", Chat(turns=(USER, REPLY))),
    ({"conversation": SAID, "system": "Be kind."}, "messages", Chat(turns=(SYSTEM, USER, REPLY))),
    ({"messages": SAID, "tools": '[{"name": "f"}]'}, "messages", Chat(turns=(USER, REPLY), tools=(FUNCTION,))),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
        "messages",
        Chat(turns=(USER,)),
    ),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
                {"role": "assistant", "content": "Hello", "weight": 0},
            ]
        },
        "messages",
        Chat(turns=(CALL, Turn(role="assistant", content="Hello", learn=False))),
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        "sharegpt",
        Chat(turns=(USER, CALL, Turn(role="tool", content="3"), REPLY)),
    ),
    ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion", Pair(prompt="Hi", completion="Hello", as_chat=True)),
    ({"prompt": SAID[:1], "completion": SAID[1:]}, "prompt_completion", None),
    ({"instruction": "Hi", "output": "Hello"}, "instruction", Chat(turns=(USER, REPLY))),
    ({"instruction": "Hi", "input": "", "response": "Hello"}, "instruction", Chat(turns=(USER, REPLY))),
    (
        {"instruction": "Hi", "context": "there", "output": "Hello", "system": "Be kind."},
        "instruction",
        Chat(turns=(SYSTEM, Turn(role="user", content="Hi\n\nthere"), REPLY)),
    ),
    ({"text": "Hi"}, "text", Passage(text="Hi")),
]


@pytest.mark.parametrize(("row", "name", "wanted"), CASES)
def test_recognises_and_reads(row: dict[str, Any], name: str, wanted: Any) -> None:
    shape = recognise(row)
    assert shape.name == name
    example = shape.read(row, 1)
    if wanted is None:  # conversational prompt and completion: only the completion is learnt
        wanted = Chat(turns=(Turn(role="user", content="Hi", learn=False), REPLY))
    assert example == wanted
    assert recognise(row, shape=name).read(row, 1) == wanted


def test_template_splits_before_the_last_column() -> None:
    row = {"text": "my card", "score": 3, "label": "lost"}
    shape = recognise(row, template="{{ text }} ({{score}}) -> {{label}}.")
    assert shape.read(row, 1) == Pair(prompt="my card (3) ->", completion=" lost.")
    assert shape.name == "template"
    assert shape.unused({**row, "id": 1}) == ["id"]


def test_text_beside_a_label_must_be_decided() -> None:
    row = {"text": "my card", "label": "lost"}
    with pytest.raises(
        DataError, match=r"label would never be learnt .*'\{\{text\}\} -> \{\{label\}\}', or shape: text"
    ):
        recognise(row)
    assert recognise(row, shape="text").read(row, 1) == Passage(text="my card")


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        (
            {"question": "a", "answer": "b"},
            {},
            r"no shape .*columns question, answer.*'\{\{question\}\} -> \{\{answer\}\}'",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "preference pairs"),
        ({"text": "a"}, {"shape": "messages"}, "not of the shape 'messages'"),
        ({"text": "a"}, {"shape": "template"}, "needs a template"),
        ({"text": "a"}, {"template": "a -> b"}, "names no column"),
        ({"text": "a"}, {"template": "{{txt}}"}, "not there: 'txt'; nearest is 'text'"),
        ({"text": "a"}, {"template": "{{text}}", "shape": "text"}, "contradict"),
        ({"messages": []}, {}, r"row 1, which tells the shape of all: 'messages' must be a list .*got: list \[\]"),
        ({"messages": None}, {}, r"'messages' must be a list of messages .*got: null.*Write it as \[\{"),
        ({"messages": None}, {"shape": "messages"}, r"'messages' must be a list of messages .*got: null"),
        ({"messages": [{"text": "a"}]}, {}, r"'messages' must be a list of messages .*got: keys text"),
    ],
)
def test_unknown_shapes_say_what_was_seen(row: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        recognise(row, **settings)


@pytest.mark.parametrize(
    ("first", "row", "words"),
    [
        ({"text": "a"}, {"text": None}, "row 7: 'text' must be text .got: null"),
        ({"text": "a"}, {"text": 3}, "row 7: 'text' must be text .got: number 3"),
        (
            {"messages": SAID},
            {"messages": None},
            r"row 7: 'messages' must be a list of messages .got: null.*Write it as",
        ),
        ({"messages": SAID}, {"text": "a"}, "row 7 has no 'messages', which the first row has .got: columns text"),
        ({"messages": SAID}, {"messages": [*SAID, "a"]}, r"row 7: messages\[2\] must be a message .* .got: text \"a\""),
        (
            {"messages": SAID},
            {"messages": [*SAID, {"role": "user", "content": None}]},
            r"row 7: the content of messages\[2\] must be text .got: null",
        ),
        (
            {"messages": SAID},
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
            "not on images",
        ),
        ({"messages": SAID}, {"messages": [{"role": "narrator", "content": "x"}]}, "unknown role .got: 'narrator'"),
        ({"messages": SAID}, {"messages": SAID, "tools": "{"}, "row 7: 'tools' must be JSON"),
        (
            {"messages": SAID},
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"x": 1}]}]},
            r"tool_calls of messages\[0\] must be a list of",
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 1.5}, "row 7: 'completion' must be text"),
        ({"instruction": "a", "output": "b"}, {"instruction": "a"}, "row 7 has no 'output'.*got: columns instruction"),
    ],
)
def test_wrong_cells_name_their_row(first: dict[str, Any], row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        recognise(first).read(row, 7)


def test_template_cells_may_be_numbers_but_not_null() -> None:
    shape = recognise({"a": "x", "b": 1}, template="{{a}}: {{b}}")
    assert shape.read({"a": 2.5, "b": True}, 1) == Pair(prompt="2.5:", completion=" true")
    with pytest.raises(DataError, match=r"row 9: 'b' must be text or a number .got: null"):
        shape.read({"a": "x", "b": None}, 9)


@pytest.mark.parametrize(("turns", "has"), [((USER,), False), ((USER, REPLY), True), ((CALL,), True)])
def test_has_reply(turns: tuple[Turn, ...], has: bool) -> None:
    assert Chat(turns=turns).has_reply is has
    assert not Chat(turns=(Turn(role="assistant", content=" \n"),)).has_reply
