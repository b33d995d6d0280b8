"""Silent failures of data: what is learnt, what is cut, where a reply ends. Each fault is planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.data.prepare import Prepared, prepare
from decal.errors import DecalError
from decal.spec import DataConfig
from tests.failures.page import told
from tests.integration import tiny


def prepared(folder: Path, *, tokenizer: Any = None, rows: int = 10, **settings: Any) -> Prepared:
    """Return the data of `rows` short conversations."""
    file = tiny.write_messages(folder / "rows.jsonl", rows)
    return prepare(DataConfig(path=str(file), **settings), tokenizer or tiny.tokenizer())


def ledger(data: Prepared, about: str) -> str:
    """Return the one note of the ledger that has these words."""
    (line,) = [note for note in data.ledger.notes if about in note]
    return line


def test_17_a_stop_token_that_is_also_the_padding_is_learnt(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    data = prepared(tmp_path, tokenizer=tokenizer)
    assert data.pad_id in data.stop_ids
    assert data.ledger.without_stop == 0
    assert all(sample.labels[-2] == data.pad_id for sample in data.train)  # behind it stands a line's end alone


def test_17_replies_that_end_in_no_stop_token(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "word " * 40}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": long}) + "\n")
    with pytest.raises(DecalError) as error:
        prepare(DataConfig(path=str(tmp_path / "long.jsonl"), max_length=64, too_long="cut"), tiny.tokenizer())
    told("17a", error.value)


def test_18_the_loss_lies_on_replies_and_says_where_it_does_not(tmp_path: Path) -> None:
    assert prepared(tmp_path).ledger.loss_by_role["prompt"] == 0
    told("18a", ledger(prepared(tmp_path, loss_on="all"), "of the loss"))


def test_19_rows_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    told("19a", ledger(prepared(tmp_path, rows=24, max_length=64), "longer than"))
    told("19b", ledger(prepared(tmp_path, rows=24, max_length=64, too_long="cut"), "stop token lost to"))
    with pytest.raises(DecalError) as error:
        prepared(tmp_path, max_length=16)
    told("19c", error.value)


def template(folder: Path, text: str) -> str:
    file = folder / "template.jinja"
    file.write_text(text)
    return str(file)


def test_20_a_template_that_marks_or_writes_no_reply(tmp_path: Path) -> None:
    empty = template(tmp_path, tiny.CHAT_TEMPLATE + "{% generation %}{% endgeneration %}")
    with pytest.raises(DecalError) as unmarked:
        prepared(tmp_path, chat_template=empty)
    told("20a", unmarked.value)
    mute = template(tmp_path, "{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}")
    with pytest.raises(DecalError) as unwritten:
        prepared(tmp_path, chat_template=mute)
    told("20b", unwritten.value)


def test_21_two_bos_tokens(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    twice = template(tmp_path, "{{ bos_token }}{{ bos_token }}" + tiny.CHAT_TEMPLATE)
    with pytest.raises(DecalError) as error:
        prepared(tmp_path, tokenizer=tokenizer, chat_template=twice)
    told("21a", error.value)
