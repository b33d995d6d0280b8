"""The grade of a run's forecast: what was foretold against what was measured, and the same grade wherever it stands."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from decal.cli import main
from decal.report import graded
from decal.rundir import RunDir
from tests.report.test_run_page import Page
from tests.training.tiny_run import config, make_files


@dataclass(frozen=True, kw_only=True)
class Graded:
    """A run from the command line, and what it said of itself in the terminal."""

    run: RunDir
    terminal: str

    @property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = self.run.manifest()["plan"]
        return plan


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Graded:
    folder = make_files(tmp_path_factory.mktemp("graded"))
    settings = save_settings(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main.run(["train", str(settings)], debug=True) == 0
    return Graded(run=RunDir(folder / "run"), terminal=out.getvalue())


def save_settings(folder: Path) -> Path:
    """Write run.yaml: six steps with a forecast."""
    settings = config(folder, steps=6, check=True, save_every=6, eval_every=None, data={"eval_rows": 0})
    (folder / "run.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    return folder / "run.yaml"


def test_every_run_is_graded(done: Graded) -> None:
    said, seen, grade = (done.plan[name] for name in ("forecast", "measured", "grade"))
    (last,) = done.run.checkpoints()
    parts = said["parts"]
    assert parts["trained weights"] == parts["gradients"] == tensor_bytes(last / "trainable.safetensors")
    assert parts["optimizer"] == tensor_bytes(last / "optimizer.safetensors")
    # This process has trained before, so its heap has room of which the new run's peak shows nothing: it can only be
    # lower than in a new process (the slow test below). A half more than foretold would be another fault.
    assert 0 <= seen["peak"] <= 1.5 * said["peak"]
    steps = [e for e in done.run.events() if e["kind"] == "step"]
    assert seen["seconds"] == pytest.approx(sum(e["seconds"] for e in steps), abs=1e-3)  # written to the millisecond
    # The second of six equal steps stands for the four after it. Of steps of 20 ms one in two may wait for another
    # process on a shared machine, hence three times; a forecast that took the first step's compiling would be ten off.
    assert seen["seconds"] / 3 < said["seconds_by_one_step"] < 3 * seen["seconds"]
    # Errors are forecast / measured - 1, to four digits of values that have three or four themselves.
    for name, forecast, measured in (
        ("peak_error", said["peak"], seen["peak"]),
        ("step_error", said["step_seconds"], seen["step_seconds"]),
        ("seconds_error", said["seconds_by_one_step"], seen["seconds"]),
    ):
        if measured > 0:
            assert 1 + grade[name] == pytest.approx(forecast / measured, rel=0.01)


def tensor_bytes(file: Path) -> int:
    """Return the bytes of the tensors in a file, counted from their shapes: every one here is fp32."""
    with safe_open(file, framework="pt") as tensors:
        slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 - safe_open is no mapping
        assert {one.get_dtype() for one in slices} == {"F32"}
        counts = [1 for _ in slices]
        for i, one in enumerate(slices):
            for side in one.get_shape():
                counts[i] *= side
    return 4 * sum(counts)


def test_terminal_manifest_events_and_report_carry_the_same_grade(done: Graded) -> None:
    plan = done.plan
    (event,) = [e for e in done.run.events() if e["kind"] == "plan"]
    assert {key: event[key] for key in plan} == plan
    page = (done.run.path / "report.html").read_text(encoding="utf-8")
    shown = " ".join(Page(page).words["Forecast and measured"])
    said, seen, grade = plan["forecast"], plan["measured"], plan["grade"]
    for write, key, error in ((graded.size, "peak", "peak_error"), (graded.seconds, "step_seconds", "step_error")):
        forecast, measured, off = write(said[key]), write(seen[key]), graded.percent(grade[error])
        assert " ".join(filter(None, (forecast, measured, off))) in shown
        assert f"{forecast} forecast, {measured} measured" + (f" ({off})" if off else "") in done.terminal
    row = [graded.seconds(said["seconds_by_one_step"]), graded.seconds(seen["seconds"])]
    assert " ".join([*row, graded.percent(grade["seconds_error"])]) in shown


@pytest.mark.slow
def test_a_new_process_takes_the_memory_and_the_time_foretold(tmp_path: Path) -> None:
    code = "import sys; from decal.cli import main; sys.exit(main.run(sys.argv[1:], debug=True))"
    words = [sys.executable, "-c", code, "train", str(save_settings(make_files(tmp_path)))]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    plan = RunDir(tmp_path / "run").manifest()["plan"]
    assert plan["measured"]["exact"]
    # -17% three times over where this was written. The tensors of so small a run are 1 MiB; the rest is a constant for
    # what libraries load on the first step, which was fitted to larger runs and differs by machine and version.
    assert abs(plan["grade"]["peak_error"]) < 0.3, plan
