"""Files of a run that are cut short, empty or gone: what to delete is named, and the run then ends as it would have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decal.errors import RunError
from decal.recipes.finetune import finetune
from decal.rundir import RunDir, contents
from decal.training import state
from tests.training.test_resume import Crash, assert_same, at, crash
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, data and a run that nothing interrupted."""
    folder = make_files(tmp_path_factory.mktemp("files"))
    finetune(config(folder, output="whole"))
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def braces(file: Path) -> None:
    file.write_text("{}")


@pytest.fixture(scope="module")
def crashed(folder: Path) -> Path:
    """Return a run that crashed after its checkpoints of step 3 and 4."""
    with pytest.raises(Crash):
        finetune(config(folder, output="crashed"), on_event=at(5, crash))
    return folder / "crashed"


DAMAGED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights cut short": ("trainable.safetensors", cut),
    "weights empty": ("trainable.safetensors", empty),
    "weights gone": ("trainable.safetensors", Path.unlink),
    "optimizer cut short": ("optimizer.safetensors", cut),
    "optimizer empty": ("optimizer.safetensors", empty),
    "generators cut short": ("rng.safetensors", cut),
    "generators empty": ("rng.safetensors", empty),
    "state cut short": ("state.json", cut),
    "state empty": ("state.json", empty),
    "state without its parts": ("state.json", braces),
    "state gone": ("state.json", Path.unlink),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_checkpoint_names_its_file_and_the_older_one(
    crashed: Path, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(crashed, run)
    damage(run / "checkpoints" / "step-4" / name)
    before = (run / "events.jsonl").read_bytes()
    settings = config(crashed.parent, output=str(run))
    with pytest.raises(RunError, match=rf"{name} of the checkpoint step-4 is damaged") as raised:
        finetune(settings, resume=True)
    assert raised.value.fix == f"Delete step-4 in {run / 'checkpoints'}, and --resume goes on from step-3."
    assert (run / "events.jsonl").read_bytes() == before  # refused before anything was changed
    with pytest.raises(RunError, match="is damaged"):  # the same for who loads it without asking first
        state.load(run / "checkpoints" / "step-4", unloaded(crashed))


def unloaded(crashed: Path) -> state.Training:
    """Return parts of the crashed run's shapes, as they are before a checkpoint is loaded into them."""
    model = torch.nn.Module()
    for name, tensor in load_file(crashed / "checkpoints" / "step-4" / "trainable.safetensors").items():
        model.register_parameter(name.replace(".", "/"), torch.nn.Parameter(tensor))
    named = {n.replace("/", "."): p for n, p in model.named_parameters()}
    model.named_parameters = lambda *a, **k: iter(named.items())  # type: ignore[method-assign]  # names have dots
    return state.Training(
        model=model,
        optimizer=torch.optim.AdamW(named.values()),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        batches=Anywhere(),
        progress=state.Progress(),
    )


class Anywhere:
    """Data that go on from any position."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        return None


def test_what_the_fix_of_a_damaged_checkpoint_says_works(crashed: Path, folder: Path) -> None:
    run = folder / "mended"
    shutil.copytree(crashed, run)
    cut(run / "checkpoints" / "step-4" / "trainable.safetensors")
    settings = config(folder, output="mended")
    with pytest.raises(RunError, match="damaged"):
        finetune(settings, resume=True)
    shutil.rmtree(run / "checkpoints" / "step-4")
    cut(run / "checkpoints" / "step-3" / "optimizer.safetensors")
    with pytest.raises(RunError, match=r"--resume begins the run again: there is no older checkpoint"):
        finetune(settings, resume=True)
    shutil.rmtree(run / "checkpoints" / "step-3")
    finetune(settings, resume=True)
    assert_same(run, folder / "whole")


def test_a_damaged_best_checkpoint_says_what_to_delete(folder: Path) -> None:
    """It is read at the end, when later ones lie beside it, from which --resume would go on."""
    run = folder / "best"
    shutil.copytree(folder / "whole", run)
    progress = json.loads((run / "checkpoints" / "step-10" / "state.json").read_text())["progress"]
    (first, *_, last) = RunDir(run).checkpoints()
    assert last.name == "step-10"
    cut(first / "trainable.safetensors")
    with pytest.raises(RunError, match=rf"Delete {first.name} and .*step-10 in .*begins the run again"):
        state.keep_best(
            RunDir(run), state.Progress(**{**progress, "best_step": int(first.name[5:])}), torch.nn.Module()
        )


@pytest.mark.parametrize("damage", [cut, empty, braces])
def test_a_damaged_manifest_can_be_deleted(
    crashed: Path, folder: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    run = folder / f"manifest-{damage.__name__}"
    shutil.copytree(crashed, run)
    damage(run / "manifest.json")
    settings = config(folder, output=run.name)
    with pytest.raises(RunError, match=r"manifest\.json is damaged.*Delete it"):
        finetune(settings, resume=True)
    (run / "manifest.json").unlink()
    finetune(settings, resume=True)
    assert_same(run, folder / "whole")


def test_a_damaged_line_of_events_is_named(crashed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(crashed, run)
    lines = (run / "events.jsonl").read_text().split("\n")
    (run / "events.jsonl").write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(RunError, match=r"line 2 of events\.jsonl is damaged.*Delete that line"):
        RunDir(run).events()


def flip(file: Path) -> None:
    """One bit of the last byte: of a tensor's value, which no format notices."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "rng.safetensors"])
def test_one_flipped_bit_of_a_tensor_is_seen(crashed: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(crashed, run)
    flip(run / "checkpoints" / "step-4" / name)
    with pytest.raises(RunError, match=rf"{name} of the checkpoint step-4 .* \(other bytes than were written\)"):
        finetune(config(crashed.parent, output=str(run)), resume=True)


def test_the_best_checkpoint_is_looked_at_before_the_run_goes_on(crashed: Path, folder: Path, tmp_path: Path) -> None:
    """Its weights are wanted at the end; that they are damaged is said hours before."""
    run = tmp_path / "run"
    shutil.copytree(crashed, run)
    last = run / "checkpoints" / "step-4"
    values = json.loads((last / "state.json").read_text())
    values["progress"]["best_step"] = 3
    (last / "state.json").write_text(json.dumps(values))
    (last / "complete.json").write_text(json.dumps({"step": 4, "files": listed(last)}))
    flip(run / "checkpoints" / "step-3" / "trainable.safetensors")
    with pytest.raises(RunError, match=r"checkpoint step-3 is damaged.*Delete step-3 and step-4"):
        finetune(config(crashed.parent, output=str(run)), resume=True)


@pytest.mark.parametrize(
    ("size", "why"),
    [(10**300, "[0-9]+ of 1000000000000+ [.]{3} bytes"), (float("inf"), "OverflowError: cannot convert float .*")],
)
def test_a_size_beyond_all_sense_is_told_in_a_line(crashed: Path, tmp_path: Path, size: float, why: str) -> None:
    last = Path(shutil.copytree(crashed, tmp_path / "run")) / "checkpoints" / "step-4"
    said = {"step": 4, "files": listed(last)}
    said["files"]["rng.safetensors"]["bytes"] = size
    (last / "complete.json").write_text(json.dumps(said))
    with pytest.raises(RunError, match=rf"of the checkpoint step-4 is damaged or missing \({why}\)") as raised:
        state.check(last)
    assert len(raised.value.what) < 160


def listed(checkpoint: Path) -> dict[str, Any]:
    """Return what complete.json lists, anew."""
    (checkpoint / "complete.json").unlink()
    return contents(checkpoint)


def test_what_was_best_to_an_older_checkpoint_is_kept_with_it(tmp_path: Path) -> None:
    """Step 4 is best when step 5 is saved, step 6 is better: if 6 is lost, the run goes on from 5 and may want 4."""
    run = RunDir(tmp_path)
    for step, best in ((4, 4), (5, 4), (6, 6)):
        with run.checkpoint(step, best=best) as folder:
            (folder / "weights").write_bytes(b"w")
        run.prune(keep=2, best=best)
    assert [path.name for path in run.checkpoints()] == ["step-4", "step-5", "step-6"]
    with run.checkpoint(7, best=6) as folder:
        (folder / "weights").write_bytes(b"w")
    run.prune(keep=2, best=6)
    assert [path.name for path in run.checkpoints()] == ["step-6", "step-7"]
