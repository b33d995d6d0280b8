"""Twenty healthy runs of different shapes: no check fails, and the watch has nothing to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decal.bundled import MODEL_DIR
from decal.data import tickets
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.spec import RunConfig

LORA: dict[str, Any] = {"r": 8}
TRAIN: dict[str, Any] = {"steps": 40, "lr": 2e-3, "micro_batch": 1, "device": "cpu", "eval_every": 10}
# name: settings of the run beside those above, by section
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"lora": {"r": 1}},
    "rank 64": {"lora": {"r": 64}, "train": {"lr": 1e-3}},
    "alpha is r": {"lora": {"r": 16, "lora_alpha": 16}},
    "rsLoRA": {"lora": {"r": 16, "lora_alpha": 8, "use_rslora": True}},
    "DoRA": {"lora": {"use_dora": True}},
    "PiSSA": {"lora": {"init_lora_weights": "pissa"}, "train": {"lr": 5e-4}},
    "OLoRA": {"lora": {"init_lora_weights": "olora"}, "train": {"lr": 2e-4}},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "attention alone": {"lora": {"target_modules": "attention"}},
    "two targets": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "LoRA+": {"train": {"loraplus_lr_ratio": 4.0, "lr": 1e-3}},
    "accumulated": {"train": {"accumulate": 4, "steps": 20}},
    "unpacked": {"data": {"packing": False}, "train": {"micro_batch": 4}},
    "linear, no warm-up": {"train": {"schedule": "linear", "warmup": 0}},
    "constant, decayed": {"train": {"schedule": "constant", "weight_decay": 0.01}},
    "8-bit optimizer": {"train": {"optimizer": "adamw8bit"}},
    "4-bit base": {"quantize": "nf4"},
    "recomputed": {"train": {"gradient_checkpointing": True}},
    "all weights": {"train": {"method": "full", "lr": 2e-4}},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tickets") / "train.jsonl"
    tickets.write_jsonl(file, tickets.generate(1_200, split="train"))
    return file


def run(rows: Path, output: Path, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Train the bundled model and return the run's events."""
    settings = {
        "model": str(MODEL_DIR),
        "output": str(output),
        "quantize": changes.get("quantize"),
        "data": {"path": str(rows), "max_length": 256, "eval_rows": 40, **changes.get("data", {})},
        "lora": {**LORA, **changes.get("lora", {})},
        "train": {**TRAIN, **changes.get("train", {})},
    }
    return RunDir(finetune(RunConfig(**settings)).run).events()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_said_of_a_healthy_run(name: str, rows: Path, tmp_path: Path) -> None:
    events = run(rows, tmp_path / "run", RUNS[name])
    checks = [event for event in events if event["kind"] == "check"]
    assert checks
    assert [event for event in checks if event["status"] == "failed"] == []
    assert [event["text"] for event in events if event["kind"] == "advice"] == []
    evaluations = [event["loss"] for event in events if event["kind"] == "eval"]
    assert evaluations[-1] < evaluations[0], json.dumps(evaluations)  # healthy: it learns what it is measured on


def test_there_are_twenty() -> None:
    assert len(RUNS) == 20
