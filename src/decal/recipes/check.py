"""Check a run before it is started: the rows as the model sees them, then every check."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from decal.checks import preflight, preview, resume
from decal.checks.preview import Row
from decal.checks.result import Check
from decal.checks.resume import Short
from decal.errors import RunError
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import precision
from decal.training.job import prepare


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The first rows, and what each check found."""

    rows: tuple[Row, ...]
    checks: tuple[Check, ...]


def check(
    config: RunConfig,
    *,
    rows: int = 3,
    on_rows: Callable[[list[Row]], object] | None = None,
    on_check: Callable[[Check], object] | None = None,
) -> Checked:
    """Make the run of `config` ready, ask every check, and write nothing. Raises DecalError for what would not run."""
    job = prepare(config)
    first = preview.rows(job, rows)
    if on_rows is not None:
        on_rows(first)
    return Checked(rows=tuple(first), checks=tuple(_told(preflight.full(job), on_check)))


def _told(checks: Iterator[Check], on_check: Callable[[Check], object] | None) -> Iterator[Check]:
    for answer in checks:
        if on_check is not None:
            on_check(answer)
        yield answer


def check_resume(config: RunConfig, *, steps: int = 6, on_short: Callable[[Short], object] | None = None) -> Check:
    """Train a short form of the run twice, once killed and resumed, and compare what came of them.

    Raises DecalError for what would not run as it is; `on_short` is told what was changed to make it short.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="decal-check-") as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "killed"
        short = resume.shortened(prepare(RunConfig(**config.model_dump())), whole, steps=steps)
        if on_short is not None:
            on_short(short)
        finetune(short.config)
        again = short.config.model_copy(update={"output": str(cut)})
        kill(again, Path(folder) / "run.yaml", step=steps // 2 + 1)
        finetune(again, resume=True)
        device = precision.pick_device(config.train.device).type
        found = resume.compare(RunDir(cut), RunDir(whole), device=device)
    return found.after(time.perf_counter() - began)


def kill(config: RunConfig, file: Path, *, step: int) -> None:
    """Train in a process of its own that is killed after `step` steps. Raises RunError if it ended otherwise."""
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "decal.recipes.killed", str(file), str(step)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != -signal.SIGKILL:
        last = (child.stderr.strip() or "no message").splitlines()[-1]
        raise RunError(
            f"the run that was to be killed ended by itself (exit code {child.returncode})",
            got=last[:200],
            fix="Run decal train with these settings first, and see whether it works.",
        )
