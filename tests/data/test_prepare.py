"""From settings to samples: what is held out, dropped, cut and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.data.batch import IGNORE
from decal.data.batches import Batches
from decal.data.prepare import Prepared, prepare
from decal.data.samples import Samples, Stream
from decal.errors import DataError
from decal.spec import DataConfig
from tests.data.chat_styles import STYLES, styled, tokenizer
from tests.data.conftest import Write


def chat(question: str, answer: str = "Paris.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [chat(f"What is the capital number {n}?", f"City {n}.") for n in range(40)]


def run(path: str, *, maker: Any = None, seed: int = 0, **settings: Any) -> Prepared:
    return prepare(DataConfig(path=path, **settings), maker or styled("chatml"), seed=seed)


def texts(samples: Any, maker: Any = None) -> list[str]:
    maker = maker or styled("chatml")
    return [maker.decode([label for label in one.labels if label != IGNORE]) for one in samples]


def test_the_ledger_counts_every_row(write: Write) -> None:
    long = chat("Hello " * 200)
    path = write(chat("Hi"), {"messages": chat("Hi")["messages"][:1]}, chat("Hi", " "), long, *ROWS[:2])
    prepared = run(path, max_length=64)
    ledger = prepared.ledger
    assert (ledger.rows, ledger.used) == (6, 3)
    assert ledger.dropped == {"no assistant turn to learn": 2, "longer than max_length": 1}
    assert isinstance(prepared.train, Samples)
    assert ledger.tokens == sum(len(one.ids) for one in prepared.train)
    assert ledger.loss_tokens == sum(label != IGNORE for one in prepared.train for label in one.labels)
    assert ledger.longest == max(len(one.ids) for one in prepared.train)
    assert ledger.loss_by_role == {"assistant": 1.0, "prompt": 0.0}
    assert ledger.fill == ledger.tokens / (64 * 2)
    assert ledger.shape == "messages in 'messages'"
    assert (ledger.cut, ledger.stops_lost, ledger.without_stop, ledger.partial) == (0, 0, 0, False)
    assert "6 rows, 3 used" in ledger.text()
    assert "dropped 1: longer than max_length" in ledger.text()
    assert json.loads(json.dumps(ledger.to_dict()))["used"] == 3
    maker = styled("chatml")
    assert prepared.stop_ids == tuple(sorted(maker.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])))
    assert prepared.pad_id == maker.eos_token_id
    assert prepared.template == STYLES["chatml"][0]


def test_cutting_counts_what_it_takes(write: Write) -> None:
    whole = chat("Hi", "Yes.")
    no_stop = chat("Hi", "Yes, " * 60)
    no_reply = chat("Hi " * 100)
    two = {"messages": [*whole["messages"], *no_stop["messages"]]}
    prepared = run(write(whole, no_stop, no_reply, two), max_length=40, too_long="cut")
    ledger = prepared.ledger
    assert (ledger.rows, ledger.used, ledger.cut) == (4, 3, 2)
    assert ledger.dropped == {"reply beyond max_length": 1}
    assert ledger.stops_lost == 2
    assert ledger.without_stop == 1
    assert isinstance(prepared.train, Samples)
    assert max(len(one.ids) for one in prepared.train) == 40
    assert "cut 2 at max_length, 2 of them lost their stop token" in ledger.text()


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"messages": [{"role": "user", "content": "x"}]}] * 3, {}, "no row .* 3 no assistant turn .*end in a reply"),
        (
            [chat("Hi " * 100)],
            {"max_length": 20},
            "1 longer than max_length.* Raise max_length .now 20., or set too_long",
        ),
        ([chat("Hi " * 100)], {"max_length": 20, "too_long": "cut"}, "the prompts alone fill it"),
        (
            [chat("Hi", "Yes, " * 100)],
            {"max_length": 40, "too_long": "cut"},
            "no row trains a stop token.*1 of 1 row cut",
        ),
        ([{"text": " "}], {}, "no row"),
    ],
)
def test_nothing_left_to_learn_is_an_error(write: Write, rows: list[Any], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        run(write(*rows), **settings)


def test_a_template_that_refuses_every_row_is_an_error(write: Write) -> None:
    row = chat("Hi")
    row["messages"].reverse()
    with pytest.raises(
        DataError, match=r"refuses every row of .*the chat template of .*, 1 row; row 1: roles must alternate"
    ):
        run(write(row), maker=styled("mistral"))


def test_a_template_that_writes_no_reply_is_named(write: Write, tmp_path: Path) -> None:
    file = tmp_path / "mute.jinja"
    file.write_text("hello", encoding="utf-8")
    with pytest.raises(DataError, match=r"the template writes none of the reply.*got: .*mute\.jinja, 3 rows of"):
        run(write(*[chat("Hi")] * 3), chat_template=str(file))


def test_loss_on_all_says_how_much_lies_outside_replies(write: Write) -> None:
    ledger = run(write(*ROWS), loss_on="all").ledger
    assert 0.5 < ledger.loss_by_role["prompt"] < 1
    assert ledger.loss_tokens == ledger.tokens - ledger.used
    assert "of the loss is on text that is no reply" in ledger.text()


def test_pairs_go_through_the_chat_template_if_there_is_one(write: Write) -> None:
    path = write({"prompt": "Where?", "completion": "Here."})
    with_template = run(path)
    maker = styled("chatml")
    assert maker.decode(with_template.train[0].ids) == (  # type: ignore[index]
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nHere.<|im_end|>\n"
    )
    raw = tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>")
    without = run(path, maker=raw)
    assert without.template is None
    assert isinstance(without.train, Samples)
    assert raw.decode(without.train[0].ids) == "Where?Here.</s>"
    assert texts(without.train, raw) == ["Here.</s>"]
    assert without.stop_ids == (raw.eos_token_id,)


def test_a_column_template_is_raw_text(write: Write) -> None:
    path = write({"text": "my card", "label": "lost"}, {"text": "hi", "label": "greeting"})
    prepared = run(path, template="{{text}} -> {{label}}")
    maker = styled("chatml")
    assert isinstance(prepared.train, Samples)
    assert [maker.decode(one.ids) for one in prepared.train] == [
        "my card -> lost<|endoftext|>",
        "hi -> greeting<|endoftext|>",
    ]
    assert texts(prepared.train) == [" lost<|endoftext|>", " greeting<|endoftext|>"]
    assert prepared.ledger.notes == ()  # no token holds both prompt and label


def test_plain_text_is_learnt_whole_and_ends(write: Write) -> None:
    prepared = run(write({"text": "Hello there."}, {"text": "The capital"}))
    assert isinstance(prepared.train, Samples)
    assert prepared.train[0].labels == [IGNORE, *prepared.train[0].ids[1:]]
    assert prepared.train[0].ids[-1] == styled("chatml").eos_token_id
    assert prepared.ledger.loss_by_role == {"text": 1.0, "prompt": 0.0}


def test_bos_is_put_before_raw_text_once(write: Write) -> None:
    from tokenizers import processors

    maker = tokenizer(("<s>", "</s>"), bos="<s>", eos="</s>")
    maker.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", maker.bos_token_id), ("</s>", maker.eos_token_id)]
    )
    prepared = run(write({"text": "Hello"}, {"text": "<s>Hello"}), maker=maker)
    assert isinstance(prepared.train, Samples)
    assert [maker.decode(one.ids) for one in prepared.train] == ["<s>Hello</s>", "<s>Hello</s>"]


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_rows_are_not_trained_on(write: Write, streaming: bool) -> None:
    path = write(*ROWS)
    prepared = run(path, eval_rows=7, streaming=streaming)
    assert prepared.evaluation is not None
    held = texts(prepared.evaluation)
    source = prepared.train.epoch(0) if isinstance(prepared.train, Stream) else prepared.train
    trained = texts(source)
    assert len(held) == 7
    assert sorted(held + trained) == sorted(f"City {n}.<|im_end|>" for n in range(40))
    assert prepared.eval_ledger is not None
    assert prepared.eval_ledger.source == f"{path}, held out"
    again = run(path, eval_rows=7, streaming=streaming)
    assert again.eval_ledger == prepared.eval_ledger
    other = run(path, eval_rows=7, seed=1).evaluation
    assert streaming or (other is not None and texts(other) != held)


def test_evaluation_from_its_own_file_or_split(write: Write, tmp_path: Any) -> None:
    write(*ROWS[:30], name="set/my.train.jsonl")
    write(*ROWS[28:], name="set/my.valid.jsonl")
    folder = str(tmp_path / "set")
    by_split = run(folder, eval_split="validation")
    by_path = run(f"{folder}/my.train.jsonl", eval_path=f"{folder}/my.valid.jsonl")
    by_folder = run(f"{folder}/my.train.jsonl", eval_path=folder)
    for prepared in (by_split, by_path, by_folder):
        assert prepared.eval_ledger is not None
        assert prepared.eval_ledger.used == 12
        assert prepared.eval_ledger.notes == ("2 samples of these also in the training data",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval_split": "test"}, "a single file has no splits"),
        ({"eval_rows": 40}, "leaves no row to train on .got: 40 of 40"),
    ],
)
def test_impossible_evaluations(write: Write, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        run(write(*ROWS), **settings)


def test_the_digest_knows_the_samples_and_not_their_order(write: Write) -> None:
    digests = [run(write(*rows)).ledger.digest for rows in (ROWS, ROWS[::-1], ROWS[1:])]
    digests.append(run(write(*ROWS), loss_on="all").ledger.digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_columns_that_are_not_used_are_named(write: Write) -> None:
    assert run(write({**ROWS[0], "id": 1, "source": "x"})).ledger.notes == ("columns not used: id, source",)


def test_limit_takes_the_first_rows(write: Write) -> None:
    assert run(write(*ROWS), limit=5).ledger.rows == 5


def test_a_stream_counts_its_beginning_and_resumes(write: Write) -> None:
    path = write(*ROWS)
    prepared = run(path, streaming=True)
    assert isinstance(prepared.train, Stream)
    assert prepared.ledger.partial
    assert prepared.ledger.used == 40
    assert prepared.ledger.notes == ("a stream: this ledger counts its first 512 rows",)
    assert prepared.ledger.digest == run(path).ledger.digest
    assert texts(prepared.train.epoch(0)) == texts(prepared.train.epoch(0)) != texts(prepared.train.epoch(1))

    def fresh() -> Batches:
        return Batches(run(path, streaming=True).train, length=64, micro_batch=2, pad_id=0, seed=0)

    whole = [batch.input_ids.tolist() for step in fresh().epoch() for batch in step]
    half = fresh()
    steps = iter(half)
    for _ in range(3):
        next(steps)
    resumed = fresh()
    resumed.load_state_dict(half.state_dict())
    assert [batch.input_ids.tolist() for step in resumed.epoch() for batch in step] == whole[3:]


def test_a_wrong_row_names_its_number(write: Write) -> None:
    with pytest.raises(DataError, match=r"row 3: the content of messages\[1\] must be text"):
        run(write(*ROWS[:2], {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}))
