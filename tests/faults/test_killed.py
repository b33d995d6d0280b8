"""SIGKILL at any moment: what lies there afterwards is whole or ignored, and the resumed run ends in the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words: object, timeout: float) -> list[str]:
    """Run a module of the tests in a process of its own and return the lines that it prints."""
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("cases", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, cases: int) -> None:
    lines = run("tests.faults.killing", tmp_path, "--cases", cases, timeout=1400)
    *runs, sums = [json.loads(line) for line in lines]
    print(sums)
    assert [run for run in runs if not (run["resumed"] and run["same"] and not run["litter"])] == []
    assert sums["runs"] == cases
    assert all(run["kills"] for run in runs)


def test_every_moment_between_two_file_operations_leaves_whole_checkpoints(tmp_path: Path) -> None:
    (moments,) = run("tests.faults.windows", tmp_path, timeout=100)
    print(f"{moments} moments between two file operations")
    assert int(moments) > 50
