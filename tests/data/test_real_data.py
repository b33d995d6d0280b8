"""Real data sets and tokenizers that lie beside the repository; skipped where they are not there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from decal.data.batch import IGNORE
from decal.data.prepare import Prepared, prepare
from decal.data.samples import Samples
from decal.spec import DataConfig

SHARED = Path(__file__).parents[3] / "shared"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data and models are not beside the repository")
CHAT_NOTES = {
    "the chat template has no place for tools: they are written as JSON in the system turn",
    "the chat template has no tool calls: they are written as JSON in the assistant's turn",
}


def load(model: str) -> Any:
    return AutoTokenizer.from_pretrained(SHARED / "models" / model)


def run(name: str, maker: Any, **settings: Any) -> Prepared:
    return prepare(DataConfig(path=str(SHARED / "data" / f"{name}.jsonl.gz"), limit=300, **settings), maker)


def read(name: str) -> list[dict[str, Any]]:
    with gzip.open(SHARED / "data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][:300]


@pytest.mark.parametrize("model", ["prose-30m", "stories260K"])
@pytest.mark.parametrize(
    ("name", "shape", "unused"),
    [
        ("sgd_chat.train", "messages in 'messages'", "id, services"),
        ("dolly_short", "instruction, response", "id"),
        ("gpteacher_roleplay", "instruction, input, output", ""),
        ("glaive_toolcall_demo", "messages in 'messages'", ""),
        ("wikisql_1k.train", "prompt and completion", ""),
        ("taskmaster4_chat.train", "messages in 'messages'", "id, scenario"),
    ],
)
def test_shapes_and_ledgers(name: str, shape: str, unused: str, model: str) -> None:
    maker = load(model)
    prepared = run(name, maker, max_length=4096)
    ledger = prepared.ledger
    assert ledger.shape == shape
    assert ledger.rows == 300
    assert ledger.used >= 280
    assert ledger.without_stop == 0
    assert 0.2 < ledger.loss_tokens / ledger.tokens < 0.9
    assert ledger.fill is not None
    assert ledger.fill > 0.7
    assert (f"columns not used: {unused}" in ledger.notes) is bool(unused)
    assert (set(ledger.notes) >= CHAT_NOTES) is (name == "glaive_toolcall_demo")
    assert isinstance(prepared.train, Samples)
    stop = "<|im_end|>" if model == "prose-30m" else "</s>"
    for sample in prepared.train[:20]:
        assert maker.decode([label for label in sample.labels if label != IGNORE]).endswith(stop)
        assert sample.ids.count(maker.bos_token_id) == (0 if model == "prose-30m" else 1)


@pytest.mark.parametrize("model", ["prose-30m", "stories260K"])
def test_replies_survive_the_tokenizer(model: str) -> None:
    """What is learnt, decoded, is the reply of the row, byte fallback and all."""
    maker = load(model)
    prepared = run("dolly_short", maker, max_length=2048)
    rows = read("dolly_short")
    stop = "<|im_end|>" if model == "prose-30m" else "</s>"
    assert isinstance(prepared.train, Samples)
    for row, sample in zip(rows, prepared.train, strict=False):
        learnt = maker.decode([label for label in sample.labels if label != IGNORE])
        assert learnt.strip() == row["response"] + stop


def test_labels_by_a_column_template() -> None:
    maker = load("prose-30m")
    prepared = run("banking77.train", maker, template="{{text}} -> {{label}}")
    assert isinstance(prepared.train, Samples)
    first = prepared.train[0]
    assert maker.decode([label for label in first.labels if label != IGNORE]) == " card_arrival<|endoftext|>"
    assert prepared.ledger.used == 300
