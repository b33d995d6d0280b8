"""The loss mask over chat templates: exactly the assistant's words and the token that ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from decal.data import chat
from decal.data.batch import IGNORE
from decal.data.encode import Encoder
from decal.data.ledger import REFUSED, UNWRITTEN, Tally
from decal.data.mask import Sample
from decal.data.shapes import Call, Chat, Turn
from decal.errors import DataError
from decal.spec import DataConfig
from tests.data.chat_styles import STYLES, styled, tokenizer

TALK = (
    Turn(role="user", content="What is the capital of France?"),
    Turn(role="assistant", content="The capital is Paris."),
    Turn(role="user", content="And 東京? 🙂"),
    Turn(role="assistant", content="That is in Japan 🗾,\nnot in France…"),
)
PADDED = (Turn(role="user", content=" Hello there \n"), Turn(role="assistant", content="\n  Hello, user. \n"))
TRIMMING = {"llama3", "gemma"}
CALL = Turn(role="assistant", content="", calls=(Call(name="weather", arguments={"city": "Paris"}),))
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOOL_TALK = (TALK[0], CALL, Turn(role="tool", content='{"sun": 1}'), TALK[1])


def encode(maker: Any, *talks: tuple[Turn, ...], tools: tuple[Any, ...] = (), **settings: Any) -> list[Sample]:
    encoder = Encoder(DataConfig(path="none", **{"max_length": 8192, **settings}), maker)
    numbered = [(i, Chat(turns=turns, tools=tools)) for i, turns in enumerate(talks, start=1)]
    return list(encoder.encode(numbered, Tally()))


def learnt(maker: Any, sample: Sample) -> str:
    return str(maker.decode([label for label in sample.labels if label != IGNORE]))


def messages(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    return [chat._message(turn) for turn in turns]


@pytest.mark.parametrize("talk", [TALK[:2], TALK, PADDED], ids=["one", "two", "padded"])
@pytest.mark.parametrize("name", STYLES)
def test_learns_the_replies_and_their_stop_token(name: str, talk: tuple[Turn, ...]) -> None:
    maker = styled(name)
    (sample,) = encode(maker, talk)
    assert sample.ids == maker.apply_chat_template(messages(talk))["input_ids"]
    replies = [turn.content for turn in talk if turn.role == "assistant"]
    if name in TRIMMING:
        replies = [reply.strip() for reply in replies]
    lead = {"mistral": " "}.get(name, "")
    wanted = [lead + reply + STYLES[name][4] for reply in replies]
    if name == "thinking":
        wanted = [reply.lstrip("\n") for reply in wanted]
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
    assert learnt(maker, sample) == "".join(wanted)


@pytest.mark.parametrize("talk", [TALK, PADDED], ids=["two", "padded"])
@pytest.mark.parametrize("name", sorted(set(STYLES) - {"thinking", "phi3"}))
def test_marks_find_what_prefixes_find(name: str, talk: tuple[Turn, ...]) -> None:
    """Oracle: each reply is what messages[:i+1] renders beyond messages[:i] with the generation prompt."""
    maker = styled(name)
    written = chat.ChatFormat(maker, maker.chat_template).write(Chat(turns=talk))
    for (start, end), i in zip(written.spans, range(1, len(talk), 2), strict=True):
        render = maker.apply_chat_template
        before = render(messages(talk[:i]), tokenize=False, add_generation_prompt=True)
        after = render(messages(talk[: i + 1]), tokenize=False)
        white = len(after) - len(before) - len((after[len(before) :]).lstrip())  # outer blanks: the stop's part
        assert len(before) <= start <= len(before) + white
        assert written.text[:end] == after[:end]
        tail = after[end:].strip()
        assert tail in ("", STYLES[name][4])


def test_equals_transformers_generation_mask() -> None:
    template = (
        STYLES["chatml"][0]
        .replace(
            "m['content'] + '<|im_end|>\n' }}",
            "}}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
            "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
        )
        .replace("+ }}", "}}")
    )
    maker = styled("chatml")
    maker.chat_template = template
    (sample,) = encode(maker, TALK)
    theirs = maker.apply_chat_template(messages(TALK), return_dict=True, return_assistant_tokens_mask=True)
    assert sum(theirs["assistant_masks"]) > 10
    assert [label != IGNORE for label in sample.labels] == [bool(m) for m in theirs["assistant_masks"]]
    maker.chat_template = template.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert encode(maker, TALK) == [sample]  # the stop token is learnt though the template leaves it out


PAIRS = ["cohere", "gemma", "gemma3", "llama3", "lfm2_v2", "phi3", "qwen2_5", "qwen3_instruct_2507", "qwen3_vl"]


def trl_pair(name: str) -> tuple[Any, str]:
    folder = Path(trl.__file__).parent / "chat_templates"
    special: tuple[str, ...] = (
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|end|>",
    )
    special += ("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<bos>", "<eos>")
    special += ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
    plain = (folder / f"{name}.jinja").read_text()
    return tokenizer(special, bos="<bos>", eos="<eos>", template=plain), (folder / f"{name}_training.jinja").read_text()


@pytest.mark.parametrize("name", PAIRS)
def test_agrees_with_trls_training_templates(name: str) -> None:
    """TRL marks replies by hand; we find them in the model's own template. TRL also learns blanks around them."""
    maker, training = trl_pair(name)
    (sample,) = encode(maker, TALK)
    theirs = maker.apply_chat_template(
        messages(TALK), chat_template=training, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sample.ids == theirs["input_ids"]
    ours = [label != IGNORE for label in sample.labels]
    differ = [i for i, (a, b) in enumerate(zip(ours, theirs["assistant_masks"], strict=True)) if a != bool(b)]
    assert sum(ours) > 20
    assert all(maker.decode([sample.ids[i]]).strip() in ("", "<eos>") and not ours[i] for i in differ)


def test_learns_tool_calls_where_the_template_rewrites_the_past() -> None:
    """Qwen3 drops the thoughts of past replies: no prefix is stable, yet calls and replies are found."""
    maker, _ = trl_pair("qwen3")
    (sample,) = encode(maker, TOOL_TALK, tools=(TOOL,))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert learnt(maker, sample) == call + "<think>\n\n</think>\n\nThe capital is Paris.<|im_end|>"
    assert '"description": "Tell it."' in maker.decode(sample.ids)
    assert sample.ids == maker.apply_chat_template(messages(TOOL_TALK), tools=[TOOL])["input_ids"]


def test_learns_thoughts_of_the_last_reply_only_as_the_template_does() -> None:
    thoughtful = "<think>\nFrance, so Paris.\n</think>\n\nParis."
    talk = (TALK[0], Turn(role="assistant", content=thoughtful), TALK[2], Turn(role="assistant", content=thoughtful))
    maker = styled("thinking")
    (sample,) = encode(maker, talk)
    assert learnt(maker, sample) == f"Paris.<|im_end|>{thoughtful}<|im_end|>"


def test_a_past_that_cannot_be_found_is_an_error() -> None:
    maker = styled("chatml")
    maker.chat_template = STYLES["chatml"][0].replace("m['content'] +", "(m['content'] if loop.last else '...') +")
    with pytest.raises(DataError, match=r"first 1 messages otherwise .* alone 'What is the capital"):
        encode(maker, TALK)


def test_the_token_that_ends_a_reply_amid_a_conversation_may_differ() -> None:
    """As gpt-oss does: a past reply ends in one token, the last in another."""
    maker = styled("chatml")
    maker.chat_template = STYLES["chatml"][0].replace(
        "m['content'] + '<|im_end|>", "m['content'] + ('<|endoftext|>' if loop.last else '<|im_end|>') + '"
    )
    (sample,) = encode(maker, TALK)
    assert learnt(maker, sample) == f"{TALK[1].content}<|im_end|>{TALK[3].content}<|endoftext|>"


def test_a_template_that_counts_characters_is_not_misled_by_marks() -> None:
    maker = styled("chatml")
    maker.chat_template = STYLES["chatml"][0].replace(
        "'<|im_end|>", "'<|im_end|>' + (m['content'] | length | string) * 30 + '"
    )
    talk = (TALK[0], Turn(role="assistant", content="Paris 123"), TALK[2], Turn(role="assistant", content="Osaka 123"))
    (sample,) = encode(maker, talk)
    assert learnt(maker, sample) == "Paris 123<|im_end|>Osaka 123<|im_end|>"
    written = chat.ChatFormat(maker, maker.chat_template).write(Chat(turns=talk))
    assert [written.text[a:b] for a, b in written.spans] == [
        f"{city} 123<|im_end|>{'9' * 30}\n" for city in ("Paris", "Osaka")
    ]


def test_a_generation_prompt_that_stands_before_no_reply_is_noted() -> None:
    maker = styled("chatml")
    maker.chat_template = STYLES["chatml"][0].replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    encoder = Encoder(DataConfig(path="none"), maker)
    assert encoder.notes == ("the generation prompt ends in '<think>\\n', which stands before no reply in training",)
    (sample,) = encode(maker, TALK[:2])
    assert learnt(maker, sample) == "The capital is Paris.<|im_end|>"


def test_what_a_template_cannot_say_is_written_in_a_way_it_can() -> None:
    maker = styled("gemma")
    system = Turn(role="system", content="Be brief.")
    encoder = Encoder(DataConfig(path="none"), maker)
    (sample,) = encoder.encode([(1, Chat(turns=(system, *TOOL_TALK), tools=(TOOL,)))], Tally())
    text = maker.decode(sample.ids)
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nTools:\n[{")
    assert '<start_of_turn>user\n{"sun": 1}<end_of_turn>' in text
    assert learnt(maker, sample) == (
        '{"name": "weather", "arguments": {"city": "Paris"}}<end_of_turn>The capital is Paris.<end_of_turn>'
    )
    assert [note.partition(":")[0] for note in encoder.notes] == [
        "the chat template has no place for tools",
        "the chat template has no tool calls",
        "the chat template has no tool turns",
        "the chat template has no system turn",
    ]


def test_a_row_that_the_template_refuses_is_counted() -> None:
    encoder = Encoder(DataConfig(path="none"), styled("mistral"))
    tally = Tally()
    samples = list(encoder.encode([(7, Chat(turns=(TALK[1], *TALK[:2]))), (8, Chat(turns=TALK))], tally))
    assert len(samples) == 1
    assert tally.dropped == {REFUSED: 1}
    assert tally.first_refusal == "row 7: roles must alternate user/assistant"


def test_a_reply_before_any_question_is_learnt() -> None:
    maker = styled("llama3")
    (sample,) = encode(maker, (TALK[1], *TALK[:2]))
    assert learnt(maker, sample) == "The capital is Paris.<|eot_id|>" * 2


def test_weight_zero_is_not_learnt() -> None:
    talk = (TALK[0], Turn(role="assistant", content="Wrong.", learn=False), *TALK[2:])
    maker = styled("llama3")
    (sample,) = encode(maker, talk)
    assert learnt(maker, sample) == TALK[3].content + "<|eot_id|>"


def test_loss_on_all_learns_everything_but_the_first_token() -> None:
    (sample,) = encode(styled("llama3"), TALK, loss_on="all")
    assert sample.labels == [IGNORE, *sample.ids[1:]]


def test_a_template_that_marks_nothing_shows_the_row() -> None:
    maker = styled("chatml")
    maker.chat_template = STYLES["chatml"][0] + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match=r"marks no reply as generated \(got: .*The capital is Paris"):
        encode(maker, TALK)


MUTE = {
    "a constant": "hello",
    "a constant reply": "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else 'ok' }}<|im_end|>"
    "{% endfor %}",
    "questions alone": "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
    "questions that end": "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}",
    "marked": "{% for m in messages %}{% generation %}hello{% endgeneration %}<|im_end|>{% endfor %}",
}


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("template", MUTE.values(), ids=MUTE)
def test_a_template_that_writes_no_reply_trains_nothing(template: str, loss_on: Any) -> None:
    maker = styled("chatml")
    maker.chat_template = template
    tally = Tally()
    encoder = Encoder(DataConfig(path="none", loss_on=loss_on), maker)
    assert list(encoder.encode([(1, Chat(turns=TALK)), (2, Chat(turns=TALK[:2]))], tally)) == []
    assert tally.dropped == {UNWRITTEN: 2}


def test_a_reply_that_a_template_leaves_out_drops_its_row() -> None:
    """It writes replies, but not this one: the stop token alone would be learnt."""
    maker = styled("chatml")
    maker.chat_template = STYLES["chatml"][0].replace(
        "m['content'] + ", "(m['content'] if 'Japan' not in m['content'] else '') + "
    )
    tally = Tally()
    encoder = Encoder(DataConfig(path="none"), maker)
    (sample,) = encoder.encode([(1, Chat(turns=TALK)), (2, Chat(turns=TALK[:2]))], tally)
    assert learnt(maker, sample) == TALK[1].content + "<|im_end|>"
    assert tally.dropped == {UNWRITTEN: 1}


def test_an_empty_reply_amid_a_conversation_is_kept() -> None:
    maker = styled("chatml")
    (sample,) = encode(maker, (TALK[0], Turn(role="assistant", content=""), *TALK[2:]))
    assert learnt(maker, sample) == f"<|im_end|>{TALK[3].content}<|im_end|>"


def test_a_template_that_is_no_jinja_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}\n{{ m['content'] }\n{% endfor %}", encoding="utf-8")
    with pytest.raises(DataError, match=r"the chat template is no Jinja: line 2: .*got: .*mine\.jinja"):
        Encoder(DataConfig(path="none", chat_template=str(file)), styled("chatml"))


def test_two_bos_tokens_are_an_error() -> None:
    maker = styled("llama3")
    maker.chat_template = "{{ bos_token }}" + STYLES["llama3"][0]
    with pytest.raises(DataError, match="two BOS"):
        encode(maker, TALK)


def test_without_template_but_with_its_tokens_chatml_is_used() -> None:
    maker = styled("chatml")
    own = encode(maker, TALK)
    maker.chat_template = None
    encoder = Encoder(DataConfig(path="none"), maker)
    assert list(encoder.encode([(1, Chat(turns=TALK))], Tally())) == own
    assert encoder.notes == ("the tokenizer has no chat template: ChatML is used",)
    assert encoder.template == chat.CHATML


def test_without_template_the_plain_default_is_used() -> None:
    maker = tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>")
    encoder = Encoder(DataConfig(path="none"), maker)
    (sample,) = encoder.encode([(1, Chat(turns=TALK[:2]))], Tally())
    assert maker.decode(sample.ids) == (
        "### User:\nWhat is the capital of France?\n\n### Assistant:\nThe capital is Paris.</s>"
    )
    assert learnt(maker, sample) == "The capital is Paris.</s>"
    assert "### User" in encoder.notes[0]


def test_a_template_without_stop_token_gets_eos() -> None:
    maker = tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>")
    maker.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    encoder = Encoder(DataConfig(path="none"), maker)
    (sample,) = encoder.encode([(1, Chat(turns=TALK))], Tally())
    assert learnt(maker, sample).endswith("not in France…\n</s>")
    assert "</s> is added" in encoder.notes[0]


def test_no_eos_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no reply could end"):
        encode(tokenizer(), TALK)


def test_a_tokenizer_without_offsets_is_an_error() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="no character offsets"):
        Encoder(DataConfig(path="none"), Slow())


def test_template_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(STYLES["phi3"][0], encoding="utf-8")
    maker = styled("phi3")
    own = encode(maker, TALK)
    maker.chat_template = None
    assert encode(maker, TALK, chat_template=str(file)) == own
    with pytest.raises(DataError, match=r"no such chat template file; nearest is 'mine\.jinja'"):
        encode(maker, TALK, chat_template=str(tmp_path / "mine.jinj"))
