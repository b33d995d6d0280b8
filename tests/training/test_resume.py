"""A run that was stopped, killed or ran out of disk goes on and ends in the very bits it would have ended in."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from decal.errors import RunError
from decal.recipes import finetune as recipe
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.training import state
from decal.training.interrupt import Interrupted
from tests.training.tiny_run import config, make_files

CLOCKED = ("time", "seconds", "tokens_per_s", "seconds_left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, data and a run that nothing interrupted."""
    folder = make_files(tmp_path_factory.mktemp("files"))
    finetune(config(folder, output="whole"))
    return folder


def tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    events = [e for e in RunDir(run).events() if e["kind"] in ("step", "eval")]
    return [{name: value for name, value in e.items() if name not in CLOCKED} for e in events]


def assert_same(run: Path, whole: Path) -> None:
    mine, expected = tensors(run), tensors(whole)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert lines(run) == lines(whole)
    ends = [json.loads((p / "checkpoints" / "step-10" / "state.json").read_text()) for p in (run, whole)]
    for end in ends:
        del end["progress"]["seconds"]
    assert ends[0] == ends[1]


def at(step: int, act: Callable[[], object], kind: str = "step") -> Callable[[dict[str, Any]], None]:
    """Return a callback that acts at one event, once."""
    acted: list[Any] = []

    def callback(event: dict[str, Any]) -> None:
        if event["kind"] == kind and event["step"] == step and not acted:
            acted.append(True)
            act()

    return callback


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 4, 5, 10])  # 4 and 10 end in an evaluation, which the signal puts off
def test_a_signal_saves_after_the_step_and_resume_is_bit_for_bit(folder: Path, step: int, number: int) -> None:
    name = f"signal-{step}-{number}"
    with pytest.raises(Interrupted, match=rf"after step {step}.*decal train .*{name}.run\.yaml --resume") as stopped:
        finetune(config(folder, output=name), on_event=at(step, lambda: os.kill(os.getpid(), number)))
    assert stopped.value.step == step
    run = RunDir(folder / name)
    assert run.checkpoints()[-1].name == f"step-{step}"
    finetune(config(folder, output=name), resume=True)
    assert_same(run.path, folder / "whole")


def test_every_global_generator_goes_on_where_it_stood(folder: Path) -> None:
    def drawing(into: list[tuple[float, ...]], last: int) -> Callable[[dict[str, Any]], None]:
        def callback(event: dict[str, Any]) -> None:  # stands for a model or a tokenizer that draws as it runs
            if event["kind"] == "step":
                into.append((random.random(), float(np.random.random()), random.gauss(), float(np.random.normal())))
                if event["step"] == last:
                    os.kill(os.getpid(), signal.SIGINT)

        return callback

    whole: list[tuple[float, ...]] = []
    parts: list[tuple[float, ...]] = []
    finetune(config(folder, output="drawn"), on_event=drawing(whole, 0))
    with pytest.raises(Interrupted):
        finetune(config(folder, output="drawn-in-parts"), on_event=drawing(parts, 5))
    finetune(config(folder, output="drawn-in-parts"), resume=True, on_event=drawing(parts, 0))
    assert parts == whole


def test_a_signal_in_an_evaluation_breaks_it_off_and_resume_makes_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = recipe.evaluate, []  # type: ignore[attr-defined]

    def slow(model: Any, **rest: Any) -> Any:
        calls.append(True)
        if len(calls) == 3:  # before the first step, after step 4, after step 8
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the evaluation went on after the signal")
        return plain(model, **rest)

    monkeypatch.setattr(recipe, "evaluate", slow)
    with pytest.raises(Interrupted, match="after step 8"):
        finetune(config(folder, output="evaluation"))
    finetune(config(folder, output="evaluation"), resume=True)
    assert_same(folder / "evaluation", folder / "whole")


def test_a_second_ctrl_c_does_not_wait(folder: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finetune(config(folder, output="twice"), on_event=at(5, twice))
    assert RunDir(folder / "twice").checkpoints()[-1].name == "step-4"


def test_signal_handlers_are_given_back(folder: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    finetune(config(folder, output="handlers", steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("step", [2, 5, 7])  # 2: before the first checkpoint, so the run begins again
def test_a_crash_between_checkpoints_resumes_bit_for_bit(folder: Path, step: int) -> None:
    name = f"crash-{step}"
    with pytest.raises(Crash):
        finetune(config(folder, output=name), on_event=at(step, crash))
    finetune(config(folder, output=name), resume=True)
    assert_same(folder / name, folder / "whole")


def test_a_full_run_resumes_bit_for_bit(folder: Path) -> None:
    settings: dict[str, Any] = {"method": "full", "lr": 3e-3, "data": {"packing": False}, "steps": 6, "save_every": 2}
    finetune(config(folder, output="full", **settings))
    with pytest.raises(Crash):
        finetune(config(folder, output="full-crash", **settings), on_event=at(5, crash))
    finetune(config(folder, output="full-crash", **settings), resume=True)
    mine, whole = (load_file(folder / n / "model" / "model.safetensors") for n in ("full-crash", "full"))
    assert all(torch.equal(mine[name], whole[name]) for name in whole)


def test_states_of_8_bits_resume_bit_for_bit(folder: Path) -> None:
    settings: dict[str, Any] = {"method": "full", "optimizer": "adamw8bit", "lr": 3e-3, "steps": 6, "save_every": 2}
    finetune(config(folder, output="8bit", **settings))
    with pytest.raises(Crash):
        finetune(config(folder, output="8bit-crash", **settings), on_event=at(5, crash))
    finetune(config(folder, output="8bit-crash", **settings), resume=True)
    mine, whole = (load_file(folder / n / "checkpoints" / "step-6" / state.OPTIMIZER) for n in ("8bit-crash", "8bit"))
    assert {tensor.dtype for name, tensor in whole.items() if name.startswith("exp_avg:")} == {
        torch.uint8,
        torch.float32,  # tensors under 4096 elements
    }
    assert mine.keys() == whole.keys()
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    mine, whole = (load_file(folder / n / "model" / "model.safetensors") for n in ("8bit-crash", "8bit"))
    assert all(torch.equal(mine[name], whole[name]) for name in whole)


def test_a_run_may_go_on_paged_but_not_in_other_states(folder: Path) -> None:
    """A card that was too small is the reason to resume so; on a CPU it is said that nothing is paged."""
    with pytest.raises(Crash):
        finetune(config(folder, output="paged"), on_event=at(5, crash))
    with pytest.raises(RunError, match=r"train\.optimizer has changed"):
        finetune(config(folder, output="paged", optimizer="paged_adamw8bit"), resume=True)
    finetune(config(folder, output="paged", optimizer="paged_adamw"), resume=True)
    notes = [e["text"] for e in RunDir(folder / "paged").events() if e["kind"] == "note"]
    assert sum("train.optimizer=paged_adamw pages on a CUDA card only; here it is adamw" in text for text in notes) == 1
    assert_same(folder / "paged", folder / "whole")


def test_a_stream_resumes_bit_for_bit(folder: Path) -> None:
    settings: dict[str, Any] = {"data": {"streaming": True}, "steps": 8, "save_every": 3, "eval_every": 8}
    finetune(config(folder, output="stream", **settings))
    with pytest.raises(Crash):
        finetune(config(folder, output="stream-crash", **settings), on_event=at(7, crash))
    finetune(config(folder, output="stream-crash", **settings), resume=True)
    mine, whole = tensors(folder / "stream-crash"), tensors(folder / "stream")
    assert all(torch.equal(mine[name], whole[name]) for name in whole)


def test_a_finished_run_resumes_to_the_same_end(folder: Path) -> None:
    finetune(config(folder, output="again"))
    finetune(config(folder, output="again"), resume=True)
    assert_same(folder / "again", folder / "whole")


def test_a_full_disk_is_said_and_costs_nothing_but_the_steps_since(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, room = state.save_file, [7]  # type: ignore[attr-defined]  # two checkpoints of three files, and one file of the next

    def save_file(*arguments: Any) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(*arguments)

    monkeypatch.setattr(state, "save_file", save_file)
    with pytest.raises(RunError, match=r"step 6 could not be written.*No space left.*--resume from step-4"):
        finetune(config(folder, output="disk"))
    run = RunDir(folder / "disk")
    assert [p.name for p in run.checkpoints()] == ["step-3", "step-4"]
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-3", "step-4"]
    monkeypatch.setattr(state, "save_file", plain)
    finetune(config(folder, output="disk"), resume=True)
    assert_same(run.path, folder / "whole")


def test_a_half_written_checkpoint_is_never_chosen(folder: Path) -> None:
    with pytest.raises(Crash):
        finetune(config(folder, output="half"), on_event=at(5, crash))
    run = RunDir(folder / "half")
    (run.path / "checkpoints" / "step-5").mkdir()
    (run.path / "checkpoints" / "step-5" / "trainable.safetensors").write_bytes(b"cut short")
    litter = run.path / "checkpoints" / ".step-5.99999.tmp"
    litter.mkdir()
    finetune(config(folder, output="half"), resume=True)
    assert not litter.exists()
    assert_same(run.path, folder / "whole")


@pytest.mark.parametrize(
    ("changed", "key", "then"),
    [
        ({"lr": 1e-3}, "train.lr", "0.03"),
        ({"steps": 12}, "train.steps", "10"),
        ({"data": {"max_length": 64}}, "data.max_length", "128"),
        ({"precision": "bf16"}, "train.precision", "auto"),
    ],
)
def test_settings_that_change_the_result_are_refused_by_name(
    folder: Path, changed: dict[str, Any], key: str, then: str
) -> None:
    with pytest.raises(RunError, match=rf"{key} has changed.*Resume with {key}={then}"):
        finetune(config(folder, output="whole", **changed), resume=True)


def test_settings_that_do_not_are_free(folder: Path) -> None:
    with pytest.raises(Crash):
        finetune(config(folder, output="free"), on_event=at(5, crash))
    free = config(folder, output="free", save_every=1, keep=5, gradient_checkpointing=True)
    finetune(free, resume=True)
    assert all(torch.equal(tensors(folder / "free")[n], t) for n, t in tensors(folder / "whole").items())


def test_other_data_under_the_same_name_are_refused(tmp_path: Path) -> None:
    make_files(tmp_path)
    with pytest.raises(Crash):
        finetune(config(tmp_path), on_event=at(5, crash))
    make_files(tmp_path, rows=40)
    with pytest.raises(RunError, match="the data have changed"):
        finetune(config(tmp_path), resume=True)


def test_there_must_be_a_run_to_resume(folder: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        finetune(config(folder, output="nowhere"), resume=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from decal.recipes.finetune import finetune
from decal.spec import read_run_config
from decal.training import state

config, resume, when = read_run_config(Path(sys.argv[1])), sys.argv[2] == "resume", int(sys.argv[3])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
plain, files = state.save_file, []

def save_file(*arguments):
    files.append(arguments[1])
    plain(*arguments)
    if when < 0 and len(files) == -when:
        kill()

state.save_file = save_file
finetune(config, resume=resume, on_event=lambda e: kill() if e["kind"] == "step" and e["step"] == when else None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", [5, 8, -5, -8])  # negative: in the middle of a checkpoint, after that many files
def test_sigkill_resumes_bit_for_bit(folder: Path, when: int, tmp_path: Path) -> None:
    settings = config(folder, output=f"kill{when}")
    (tmp_path / "run.yaml").write_text(settings.to_yaml())

    def run(mode: str, when: int) -> int:
        command = [sys.executable, "-c", KILLED, str(tmp_path / "run.yaml"), mode, str(when)]
        return subprocess.run(command, check=False, capture_output=True, timeout=100).returncode

    assert run("start", when) == -signal.SIGKILL
    assert run("resume", 0) == 0
    assert_same(Path(settings.output), folder / "whole")


def test_a_run_yaml_that_was_changed_since_is_refused(folder: Path) -> None:
    """It is what people resume with, so it agrees with itself; the manifest says what the run began with."""
    with pytest.raises(Crash):
        finetune(config(folder, output="edited"), on_event=at(5, crash))
    file = folder / "edited" / "run.yaml"
    file.write_text(file.read_text().replace("lr: 0.03", "lr: 0.04"))
    with pytest.raises(RunError, match=r"train\.lr has changed.*0\.03 then, 0\.04 now"):
        finetune(config(folder, output="edited", lr=0.04), resume=True)
