"""Each part of a checkpoint decides how the run ends: so a comparison would see it if one were not put back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decal import rundir
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.training import state
from tests.training.test_resume import Crash, assert_same, at, crash
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, data and a run that nothing interrupted."""
    folder = make_files(tmp_path_factory.mktemp("files"))
    finetune(config(folder, output="whole"))
    return folder


def halved(file: Path) -> None:
    save_file({name: tensor / 2 for name, tensor in load_file(file).items()}, file)


def reseeded(file: Path) -> None:
    save_file({"cpu": torch.Generator().manual_seed(9).get_state()}, file)


def changed(group: str, **values: Any) -> Callable[[Path], None]:
    """Return what changes one group of a checkpoint's state."""

    def change(file: Path) -> None:
        whole = json.loads(file.read_text())
        file.write_text(json.dumps({**whole, group: {**whole[group], **values}}))

    return change


PARTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "adapter": (state.TRAINABLE, halved),
    "optimizer": (state.OPTIMIZER, halved),
    "torch's generator": (state.RNG, reseeded),
    "data position": (state.STATE, changed("data", position=0)),
    "best metric": (state.STATE, changed("progress", best_loss=0.0)),
    "step, and with it the scheduler": (state.STATE, changed("progress", step=4)),
}


@pytest.mark.parametrize(("name", "change"), PARTS.values(), ids=PARTS)
def test_each_part_of_a_checkpoint_decides_how_the_run_ends(
    folder: Path, crashed_at_6: Path, name: str, change: Callable[[Path], None]
) -> None:
    run = folder / "parts"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(crashed_at_6, run)
    last = RunDir(run).checkpoints()[-1]
    change(last / name)
    (last / rundir.COMPLETE).unlink()
    rundir.write_json(last / rundir.COMPLETE, {"step": rundir.step_of(last), "files": rundir.contents(last)})
    finetune(config(folder, output="parts"), resume=True)
    with pytest.raises(AssertionError):
        assert_same(run, folder / "whole")


@pytest.fixture(scope="module")
def crashed_at_6(folder: Path) -> Path:
    with pytest.raises(Crash):
        finetune(config(folder, output="crashed-6"), on_event=at(7, crash))
    return folder / "crashed-6"


def test_the_loss_scale_is_put_back(tmp_path: Path) -> None:
    """fp16 trains on a CUDA device only; the scaler is the same on a CPU."""

    def training(scaler: torch.amp.GradScaler) -> state.Training:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        return state.Training(
            model=model, optimizer=optimizer, scaler=scaler, batches=Nowhere(), progress=state.Progress(step=3)
        )

    before = torch.amp.GradScaler("cpu", init_scale=32.0, growth_interval=7)
    before.scale(torch.zeros(1))  # makes its tensors
    before.update(16.0)
    folder = state.save(RunDir(tmp_path), training(before))
    after = torch.amp.GradScaler("cpu")
    state.load(folder, training(after))
    assert after.state_dict() == before.state_dict()
    assert after.get_scale() == 16.0


class Nowhere:
    """Data without a position."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        return None
