"""Kill what a run does to its folder before each of its file operations in turn, and look at what lies there then.

    PYTHONPATH=src python -m tests.faults.windows FOLDER

A process of its own without torch: a fork then takes a millisecond, and all the moments take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from decal import rundir
from decal.rundir import RunDir
from tests.faults.operations import seen


def work(path: Path) -> None:
    """Do what a run does to its folder: claim it or go on, save, save one step again, prune, write the result."""
    run = RunDir(path)
    run.clean()
    whole = run.checkpoints()
    begun = rundir.step_of(whole[-1]) if whole else 0
    if run.holds_run():
        run.rewind(begun)
    else:
        run.claim("model: m")
    for step in [*range(begun + 1, 4), 3]:
        run.event("step", step=step)
        with run.checkpoint(step) as folder:
            (folder / "weights").write_bytes(str(step).encode() * 1000)
            rundir.write_json(folder / "part" / "state.json", {"step": step})
        run.prune(keep=1, best=1)
    with rundir.new_folder(run.adapter) as folder, rundir.together(folder, ("weights", "settings")) as new:
        rundir.write_bytes(new / "weights", b"of the adapter")
        rundir.write_bytes(new / "settings", b"its settings")
    run.write_manifest({"outcome": 1})


def in_child(path: Path, kill_before: int | None) -> bool:
    """Do the work in a forked process, killed before its n-th file operation; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            os.fsync = lambda fd: None  # it guards against a power cut, which nobody can stage here, and takes long
            with seen(path, lambda number, _: os.kill(os.getpid(), signal.SIGKILL) if number == kill_before else None):
                work(path)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def tree(path: Path) -> dict[str, bytes]:
    """Return all files but the events, whose lines hold the time."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != rundir.EVENTS]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def every_moment(folder: Path) -> int:
    """Return how many moments there are. Raises AssertionError at the first after which something is amiss.

    Each kill must leave whole checkpoints alone, none older than an earlier kill left (also where a step is written
    again), and work that can be gone on with to the same end.
    """
    assert in_child(folder / "whole", None)
    expected, newest, kills = tree(folder / "whole"), 0, 0
    assert [path.name for path in RunDir(folder / "whole").checkpoints()] == ["step-1", "step-3"]
    while not in_child(folder / f"run-{kills}", kills + 1):
        run = RunDir(folder / f"run-{kills}")
        run.clean()
        for checkpoint in run.checkpoints():
            assert rundir.altered(checkpoint, ["weights", "part/state.json"]) is None, kills
        steps = [rundir.step_of(path) for path in run.checkpoints()]
        assert max(steps, default=0) >= newest, kills
        newest = max(steps, default=0)
        assert in_child(run.path, None), kills
        assert tree(run.path) == expected, kills  # no litter either
        kills += 1
    assert newest == 3
    return kills


if __name__ == "__main__":
    print(every_moment(Path(sys.argv[1])))
