"""Kill a tiny training run with SIGKILL, resume it until it ends, and say what came of it.

    PYTHONPATH=src python -m tests.faults.killing FOLDER --cases 50

torch is imported once; each sitting of a run is a forked child. Half of the kills strike by the clock, wherever the run
is then, compiled code included; the other half just before a file operation of the run folder (opening for writing, a
rename, a deletion, a new folder, the start of a tree's deletion), so that every gap between two of them is reached.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.spec import RunConfig
from tests.faults.operations import seen
from tests.training import tiny_run

ENDED, KILLED = 0, -signal.SIGKILL


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When a sitting ends: before its n-th file operation, or after some seconds. The place is filled in by it."""

    operation: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one run: where its sittings were killed, and whether its end has the uninterrupted run's bits."""

    kills: tuple[str, ...]
    resumed: bool
    same: bool
    litter: tuple[str, ...]


def settings(folder: Path, output: str) -> RunConfig:
    """Return a run with many writes: a save at every step, evaluations, checkpoints that are pruned, a best one."""
    return tiny_run.config(folder, output=output, steps=6, save_every=1, eval_every=2, keep=2)


def sitting(config: RunConfig, kill: Kill, note: Path) -> int:
    """Run or resume in a forked child that is killed as `kill` says; return its exit code. `note` hears where."""
    child = os.fork()
    if child == 0:
        os._exit(_in_child(config, kill, note))
    if kill.seconds is not None:
        deadline = time.monotonic() + kill.seconds
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)  # a zombie if it has ended by now
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _in_child(config: RunConfig, kill: Kill, note: Path) -> int:
    last = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def act(number: int, name: str) -> None:
        os.pwrite(last, f"{number} {name}\n".encode().ljust(200), 0)
        if number == kill.operation:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with seen(Path(config.output), act):
            finetune(config, resume=RunDir(Path(config.output)).holds_run())
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        return 1
    return 0


def one(folder: Path, name: str, kills: Sequence[Kill], whole: Path) -> Outcome:
    """Start a run, kill each sitting as `kills` says, let the last one go to its end, and compare."""
    config, note = settings(folder, name), folder / f"{name}.note"
    where: list[str] = []
    code: int = KILLED
    for kill in [*kills, Kill()]:
        code = sitting(config, kill, note)
        if code != KILLED:
            break
        where.append(note.read_text().strip())
    run = Path(config.output)
    litter = [str(path.relative_to(run)) for path in run.rglob(".*")]
    return Outcome(
        kills=tuple(where), resumed=code == ENDED, same=code == ENDED and same(run, whole), litter=tuple(litter)
    )


def same(run: Path, whole: Path) -> bool:
    """Whether two runs have the same adapter, and the same last checkpoint but for its clock."""
    files = ("adapter/adapter_model.safetensors", "checkpoints/step-6/optimizer.safetensors")
    for file in files:
        mine, other = load_file(run / file), load_file(whole / file)
        if mine.keys() != other.keys() or not all(torch.equal(mine[key], other[key]) for key in other):
            return False
    ends = [json.loads((path / "checkpoints" / "step-6" / "state.json").read_text()) for path in (run, whole)]
    for end in ends:
        del end["progress"]["seconds"]
    names = [sorted(path.name for path in (place / "checkpoints").iterdir()) for place in (run, whole)]
    return bool(ends[0] == ends[1] and names[0] == names[1])


def trial(folder: Path, cases: int, seed: int) -> list[Outcome]:
    """Return the outcome of `cases` runs, each killed one to three times; the seed decides where."""
    tiny_run.make_files(folder)
    began = time.monotonic()
    whole = settings(folder, "whole")
    assert sitting(whole, Kill(), folder / "whole.note") == ENDED
    seconds, number = time.monotonic() - began, int((folder / "whole.note").read_text().split()[0])
    draw = random.Random(seed)
    outcomes = []
    for case in range(cases):
        share = (case + draw.random()) / cases  # the first kills of all cases are spread over the whole run
        more = [
            Kill(seconds=draw.uniform(0, seconds)) if case % 2 == 0 else Kill(operation=draw.randint(1, number))
            for _ in range(case % 3)
        ]
        for attempt in itertools.count():
            first = Kill(operation=1 + int(share * number)) if case % 2 == 0 else Kill(seconds=share * seconds)
            outcome = one(folder, f"run-{case}-{attempt}", [first, *more], Path(whole.output))
            if outcome.kills:
                break
            share /= 2  # the clock struck after the run's end: another run, and sooner
        outcomes.append(outcome)
        print(json.dumps(asdict(outcomes[-1])), flush=True)
    return outcomes


def main() -> None:
    """Run the trial from the command line and print the sums."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads, which a fork would lose
    warnings.simplefilter("ignore")
    outcomes = trial(given.folder, given.cases, given.seed)
    sums = Counter(
        {
            "runs": len(outcomes),
            "kills": sum(len(outcome.kills) for outcome in outcomes),
            "resumed": sum(outcome.resumed for outcome in outcomes),
            "same bits": sum(outcome.same for outcome in outcomes),
            "left litter": sum(bool(outcome.litter) for outcome in outcomes),
        }
    )
    print(json.dumps(sums))


if __name__ == "__main__":
    main()
