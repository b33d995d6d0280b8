"""`decal check --resume`: a killed run goes on with equal bits; a part that is not restored is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal.checks import resume
from decal.checks.resume import Short
from decal.errors import DecalError, RunError
from decal.recipes import check as recipe
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import state
from decal.training.job import prepare
from tests.checks.examples import shown
from tests.training.tiny_run import config, make_files


@pytest.mark.slow
def test_a_killed_run_ends_in_equal_bits(folder: Path) -> None:
    found = recipe.check_resume(config(folder, early_stopping=1, log_to=[]), steps=4)
    assert found.status == "passed", found.measure
    assert found.measure.startswith("killed, resumed, compared after step 4: ")
    assert found.measure.endswith("tensors, equal bits")
    assert not (folder / "run").exists()


def forget(*_: Any) -> None:
    """Restore nothing."""


class Died(BaseException):
    """What stands for a kill where no other process is needed."""


def die(settings: RunConfig, file: Path, *, step: int) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            raise Died

    with pytest.raises(Died):
        finetune(settings, on_event=stop)


def test_a_run_that_broke_off_ends_in_equal_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "kill", die)
    found = recipe.check_resume(config(folder), steps=4)
    assert found.status == "passed", found.measure


@pytest.mark.parametrize(
    ("part", "measure"),
    [("_restore_generators", "weights differ, such as"), ("_load_optimizer", "weights differ, such as")],
)
def test_what_is_not_restored_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch, part: str, measure: str) -> None:
    monkeypatch.setattr(recipe, "kill", die)
    monkeypatch.setattr(state, part, forget)
    found = recipe.check_resume(config(folder), steps=4)
    assert found.status == "failed"
    assert measure in found.measure
    assert found.fix == "Do not rely on --resume for these settings, and report it: the weight is not restored."
    if part == "_load_optimizer":
        shown("resume", found)


def test_a_run_that_ends_by_itself_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "decal.recipes.killed"]
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="trace\nOSError: disk full")

    monkeypatch.setattr(subprocess, "run", ends)
    with pytest.raises(RunError, match=r"ended by itself \(exit code 1\) \(got: OSError: disk full\)"):
        recipe.kill(config(tmp_path), tmp_path / "run.yaml", step=5)


def short_form(settings: RunConfig, folder: Path, *, steps: int = 6) -> Short:
    return resume.shortened(prepare(settings), folder, steps=steps)


def test_the_short_form_changes_what_makes_a_run_long_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    held_out = {"max_length": 512, "eval_rows": 0, "eval_path": str(folder / "data.jsonl")}
    settings = config(
        folder,
        data=held_out,
        micro_batch=3,
        accumulate=4,
        early_stopping=1,
        keep=1,
        steps=900,
        save_every=100,
        warmup=0.1,
        check=True,
        auto_stop=True,
    )
    short = short_form(settings, tmp_path / "short")
    before, now = settings.model_dump(), short.config.model_dump()
    apart = {
        f"{section}.{name}": now[section][name]
        for section in ("data", "lora", "train")
        for name in before[section]
        if before[section][name] != now[section][name]
    }
    assert apart == {
        "train.steps": 6,
        "train.save_every": 3,
        "train.eval_every": 3,
        "train.check": False,
        "train.auto_stop": False,
    }
    assert short.config.output == str(tmp_path / "short")
    assert short.says() == (
        "train.steps=6, train.save_every=3, train.eval_every=3 (few steps, a checkpoint in the middle); "
        "train.check=false, train.auto_stop=false (nothing but training)"
    )


def test_of_many_rows_only_those_that_the_steps_take_are_read(tmp_path: Path) -> None:
    folder = make_files(tmp_path, rows=400)
    settings = config(folder, data={"packing": False, "eval_rows": 50}, micro_batch=4, accumulate=5)
    short = short_form(settings, tmp_path / "short")
    # 350 rows are 18 steps, so six take a third, rounded up; 16 held-out rows beside them
    assert (short.config.data.limit, short.config.data.eval_rows) == (117 + resume.HELD_OUT, 16)
    assert "data.eval_rows=16, data.limit=133 (the rows that they need)" in short.says()


def test_a_stream_stays_one(folder: Path, tmp_path: Path) -> None:
    settings = config(folder, data={"streaming": True, "eval_rows": 0}, eval_every=None)
    short = short_form(settings, tmp_path).config
    assert short.data == settings.data
    assert short.train.eval_every is None


def test_a_warm_up_longer_than_the_short_form_is_cut(folder: Path, tmp_path: Path) -> None:
    assert short_form(config(folder, warmup=9), tmp_path).config.train.warmup == 3
    assert short_form(config(folder, warmup=5), tmp_path).config.train.warmup == 5


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"steps": None, "data": {"streaming": True}}, "a stream has no known length"),
        ({"eval_every": None, "early_stopping": 2, "data": {"eval_rows": 0}}, "train.early_stopping needs an evaluat"),
        ({"warmup": 10}, "train.warmup is not shorter than the run"),
    ],
)
def test_settings_that_would_not_run_are_refused_before_they_are_shortened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], what: str
) -> None:
    monkeypatch.setattr(recipe, "finetune", forget)
    with pytest.raises(DecalError, match=what):
        recipe.check_resume(config(folder, **settings))


def test_a_stream_that_broke_off_ends_in_equal_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "kill", die)
    settings = config(folder, data={"streaming": True}, early_stopping=1)
    told: list[Short] = []
    found = recipe.check_resume(settings, steps=4, on_short=told.append)
    assert found.status == "passed", found.measure
    assert "few steps" in told[0].says()


# --- planted differences -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins(folder: Path) -> tuple[Path, Path]:
    """A run with a checkpoint that holds every part, and a copy of it."""
    whole = finetune(config(folder, output="whole", steps=4, eval_every=2, save_every=4)).run
    return whole, Path(shutil.copytree(whole, whole.with_name("twin")))


def moved(file: str) -> Callable[[Path], None]:
    """Return what adds a thousandth to the largest value of a file's last tensor."""

    def plant(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / file)
        name = sorted(tensors)[-1]
        flat = tensors[name].flatten()
        at = int(flat.double().abs().argmax())
        flat[at] = flat[at] - 1 if flat.dtype == torch.uint8 else flat[at] * 1.001
        save_file({**tensors, name: flat.reshape(tensors[name].shape)}, checkpoint / file)

    return plant


def written(**changes: Any) -> Callable[[Path], None]:
    """Return what puts other values into state.json; `progress__step=5` means ["progress"]["step"]."""

    def plant(checkpoint: Path) -> None:
        held = json.loads((checkpoint / state.STATE).read_text())
        for key, value in changes.items():
            *above, name = key.split("__")
            inner = held
            for part in above:
                inner = inner[part]
            inner[name] = value
        (checkpoint / state.STATE).write_text(json.dumps(held))

    return plant


@pytest.mark.parametrize(
    ("plant", "measure", "part"),
    [
        (moved(state.TRAINABLE), "1 of 28 weights differ, such as base_model", "weight"),
        (moved(state.OPTIMIZER), "1 of 84 optimizer states differ, such as step:base_model", "optimizer state"),
        (moved(state.RNG), "1 of 1 random generators differ, such as cpu", "random generator"),
        (moved(resume.SAVED), "1 of 28 saved tensors differ, such as base_model", "saved tensor"),
        (written(progress__step=3), "progress.step is 3, in the whole run 4", "step, which sets the rate"),
        (written(progress__tokens=7), "progress.tokens is 7, in the whole run ", "progress"),
        (written(progress__best_loss=1.5), "progress.best_loss is 1.5, in the whole run ", "best evaluation"),
        (written(progress__best_step=1), "progress.best_step is 1, in the whole run ", "best evaluation"),
        (written(progress__worse=9), "progress.worse is 9, in the whole run ", "best evaluation"),
        (written(progress__skipped=2), "progress.skipped is 2, in the whole run 0", "progress"),
        (written(progress__watch__said=["spike"]), "progress.watch.said is ['spike'], in", "memory of the watch"),
        (written(data__position=0), "data.position is 0, in the whole run ", "position in the data"),
        (written(data__epoch=9), "data.epoch is 9, in the whole run ", "position in the data"),
        (written(scaler__scale=2.0), "scaler.scale is 2.0, in the whole run not there", "loss scale"),
        (written(random__python=[3, [1], None]), "random.python is [3, [1], None], in the", "random generator"),
        (written(random__numpy=["MT19937"]), "random.numpy is ['MT19937'], in the whole run ", "random generator"),
        (written(more=1), "the more differs: more is 1, in the whole run not there", "more"),
    ],
)
def test_a_difference_in_any_part_is_found_and_named(
    twins: tuple[Path, Path], plant: Callable[[Path], None], measure: str, part: str
) -> None:
    whole, twin = (RunDir(path) for path in twins)
    checkpoint = twin.checkpoints()[-1]
    kept = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    try:
        plant(checkpoint)
        found = resume.compare(twin, whole, device="cpu")
    finally:
        for file, held in kept.items():
            file.write_bytes(held)
    assert found.status == "failed", found.measure
    assert measure in found.measure
    assert found.fix == f"Do not rely on --resume for these settings, and report it: the {part} is not restored."


def test_only_times_may_differ(twins: tuple[Path, Path]) -> None:
    whole, twin = (RunDir(path) for path in twins)
    written(progress__seconds=1e6)(twin.checkpoints()[-1])
    assert resume.compare(twin, whole, device="cpu").status == "passed"


def test_on_a_card_what_is_measured_may_be_off_by_a_thousandth_and_positions_may_not() -> None:
    assert resume.same([1.0, [2.0, 3]], [1.0005, [2.0, 3]], resume.CUDA_TOLERANCE)
    assert not resume.same([1.0, [2.0, 3]], [1.0, [2.003, 3]], resume.CUDA_TOLERANCE)
    assert not resume.same(3, 4, resume.CUDA_TOLERANCE)
    assert not resume.same([1.0], [1.0, 1.0], resume.CUDA_TOLERANCE)


def test_differences_are_shares_of_the_largest_value() -> None:
    values = torch.tensor([1.0, -4.0])
    assert resume.difference(values, values) == 0.0
    assert resume.difference(values + torch.tensor([0.0, 0.04]), values) == pytest.approx(0.01)
    assert resume.difference(values, values.double()) == float("inf")
