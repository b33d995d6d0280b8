"""Checks of a job that is in order: they pass, with their numbers, and leave not a bit behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decal.checks import preflight, preview
from decal.checks.result import Check, failures
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.training.job import Job, prepare
from tests.training.tiny_run import config

QUICK = ["stop token", "packing", "reach", "accumulation", "round trip"]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_all_pass_in_their_order_with_a_number_each(job: Job) -> None:
    found = list(preflight.full(job))
    assert [check.name for check in found] == ["loss", "tokenizer", *QUICK, "overfit"]
    assert [check.measure for check in failures(found)] == []
    assert all(any(letter.isdigit() for letter in check.measure) for check in found)
    assert by_name(found)["stop token"].measure == "rows that learn <|endoftext|>, <|im_end|>: 18 of 18"
    assert by_name(found)["reach"].measure.startswith("28 of 28 matrices move (100.0% of entries)")


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"method": "full", "lr": 1e-3}},
        {"train": {"gradient_checkpointing": True, "optimizer": "adamw8bit"}},
        {"lora": {"use_dora": True, "r": 4}},
        {"lora": {"init_lora_weights": "pissa", "r": 4}},
        {"lora": {"target_modules": "all-linear", "bias": "all", "r": 4}},
        {"lora": {"target_modules": "all-linear", "modules_to_save": ["norm"], "r": 4}},
        {"quantize": "nf4"},
        {"data": {"packing": False}},
        {"data": {"loss_on": "all"}},
    ],
    ids=str,
)
def test_no_false_alarm(folder: Path, changes: dict[str, Any]) -> None:
    plain = config(folder, data=changes.get("data"), **{"lr": 2e-3, **changes.get("train", {})})
    lora = plain.lora.model_copy(update=changes.get("lora", {}))
    shape = plain.model_copy(update={"lora": lora, "quantize": None})
    if "quantize" in changes:
        shape = type(plain)(**{**plain.model_dump(), "quantize": changes["quantize"]})
    found = list(preflight.full(prepare(shape)))
    assert [check.measure for check in failures(found)] == []
    skipped = [check.name for check in found if check.status == "not applicable"]
    assert skipped == (
        ["packing"] if not shape.data.packing else ["round trip"] if shape.train.method == "full" else []
    )


def state(job: Job) -> list[Any]:
    numbers = [tensor.clone() for tensor in (*job.model.parameters(), *job.model.buffers(), torch.get_rng_state())]
    flags = [p.requires_grad for p in job.model.parameters()] + [m.training for m in job.model.modules()]
    grads = [p.grad for p in job.model.parameters()]
    kinds = [type(module) for module in job.model.modules()]
    names = [job.model.active_adapters, sorted(job.model.peft_config), dict(job.batches.state_dict())]
    return [numbers, flags, grads, kinds, names, random.getstate(), str(np.random.get_state())]


def test_everything_is_as_it_was_afterwards(job: Job) -> None:
    before = state(job)
    list(preflight.full(job))
    preview.rows(job, 3)
    after = state(job)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checked_run_ends_in_the_bits_of_an_unchecked_one(folder: Path, method: str) -> None:
    for name, check in (("checked", True), ("unchecked", False)):
        finetune(config(folder, output=f"{name}-{method}", check=check, steps=4, lr=1e-3, method=method))
    runs = [RunDir(folder / f"{name}-{method}") for name in ("checked", "unchecked")]
    for file in ("trainable.safetensors", "optimizer.safetensors", "rng.safetensors"):
        mine, other = (load_file(run.checkpoints()[-1] / file) for run in runs)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other)
    losses = [[event["loss"] for event in run.events() if event["kind"] == "step"] for run in runs]
    assert losses[0] == losses[1]
    events = [event for event in runs[0].events() if event["kind"] == "check"]
    assert [event["name"] for event in events] == ["loss", *QUICK]
    assert {event["status"] for event in events} <= {"passed", "not applicable"}
    assert not [event for event in runs[1].events() if event["kind"] == "check"]
