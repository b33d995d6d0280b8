"""A run that takes a second: a tiny model folder, a few rows of data, settings with dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from decal.spec import RunConfig
from tests.integration import tiny

ROWS = 22


def make_files(folder: Path, rows: int = ROWS) -> Path:
    """Write model/ and data.jsonl; return the folder."""
    tiny.save_model(folder / "model")
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for i in range(rows):
            thing = tiny.SUBJECTS[i % len(tiny.SUBJECTS)]
            question = tiny.QUESTIONS[i % len(tiny.QUESTIONS)].format(thing)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{thing} is {i}."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder


def config(folder: Path, *, output: str = "run", data: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """Return settings for 10 steps of 2 x 1 packed rows, dropout on, evaluated and saved now and then."""
    return RunConfig(
        model=str(folder / "model"),
        data={"path": str(folder / "data.jsonl"), "max_length": 128, "eval_rows": 4, **(data or {})},
        lora={"r": 4, "lora_dropout": 0.2},
        train={
            "steps": 10,
            "micro_batch": 1,
            "accumulate": 2,
            "lr": 3e-2,
            "device": "cpu",
            "eval_every": 4,
            "save_every": 3,
            "check": False,  # tests/checks, tests/planning and tests/failures/test_healthy.py train with it
            **train,
        },
        output=str(folder / output),
    )
