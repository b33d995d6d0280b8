"""Logging services: TensorBoard for real; the others' calls, and what happens when they are missing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from decal.errors import ConfigError, RunError
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.training import logs
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def test_tensorboard_holds_every_step_and_evaluation(folder: Path) -> None:
    run = RunDir(finetune(config(folder, log_to=["tensorboard"])).run)
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    events = run.events()
    for kind, group in (("step", "train"), ("eval", "eval")):
        for name in logs.SHOWN[kind]:
            written = [(e["step"], e[name]) for e in events if e["kind"] == kind]
            read = [(s.step, s.value) for s in board.Scalars(f"{group}/{name}")]
            assert read == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]  # stored as fp32
            assert read
    assert "run.yaml/text_summary" in board.Tags()["tensors"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_said_first_with_what_to_install(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
    with pytest.raises(ConfigError, match=rf'{name}, which is not installed.*pip install "decal\[{name}\]"'):
        finetune(config(folder, output="missing", log_to=[name]))
    assert not (folder / "missing").exists()


def test_every_service_of_the_settings_has_a_writer() -> None:
    for name in logs.WRITERS:
        assert config(Path("x"), log_to=[name]).train.log_to == [name]
    with pytest.raises(ConfigError):
        config(Path("x"), log_to=["comet"])


def test_wandb_is_called_as_its_documentation_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, sorted(values)))

        def finish(self) -> None:
            calls.append("finish")

    module: Any = types.ModuleType("wandb")
    module.init = lambda **settings: (calls.append(settings), Run())[1]  # type: ignore[func-returns-value]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(logs, "check_installed", lambda names: None)
    finetune(config(folder, output="wandb", log_to=["wandb"], steps=1, warmup=0))
    assert calls[0]["name"] == "wandb"
    assert calls[0]["config"]["train"]["lr"] == 3e-2
    assert calls[1:] == [
        (0, ["eval/loss", "eval/perplexity"]),
        (1, ["train/grad_norm", "train/loss", "train/lr", "train/tokens_per_s"]),
        (1, ["eval/loss", "eval/perplexity"]),
        "finish",
    ]


def test_mlflow_is_called_as_its_documentation_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Client:
        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append((experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="id"))

        def log_text(self, run: str, text: str, file: str) -> None:
            calls.append((run, file))

        def log_metric(self, run: str, name: str, value: float, step: int) -> None:
            calls.append((run, name, step))

        def set_terminated(self, run: str) -> None:
            calls.append((run, "end"))

    module: Any = types.ModuleType("mlflow")
    module.tracking = types.SimpleNamespace(MlflowClient=Client)
    module.set_experiment = lambda name: types.SimpleNamespace(experiment_id=name)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setattr(logs, "check_installed", lambda names: None)
    finetune(config(folder, output="mlflow", log_to=["mlflow"], steps=1, warmup=0))
    assert calls[:2] == [("decal", "mlflow"), ("id", "run.yaml")]
    assert ("id", "train.loss", 1) in calls
    assert calls[-1] == ("id", "end")


def test_writers_are_closed_when_training_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Writer:
        def write(self, step: int, values: Any) -> None:
            raise KeyError("broken")

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(logs, "WRITERS", {"tensorboard": lambda folder, config: Writer()})
    with pytest.raises(KeyError, match="broken"):
        finetune(config(folder, output="closed", log_to=["tensorboard"]))
    assert closed == [True]


def test_a_full_disk_under_the_event_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"events\.jsonl could not be written.*No space left.*go on with --resume"):
        logs.Report(RunDir(tmp_path), [], None)("note", text="x")
