"""Damage every file that decal reads, in every way, and see that each is an error in plain words or correct work.

    PYTHONPATH=src python -m tests.faults.fuzz FOLDER --cases 2000 --seed 0

prints the counts by file and outcome, and every defect: another exception than decal's own, a text that no terminal
holds, or another result than the file asks for.
"""

from __future__ import annotations

import argparse
import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from decal.errors import DecalError
from tests.faults.damage import KINDS
from tests.faults.targets import Target, all_targets

WIDEST = 160  # columns of one line of an error, beside the paths in it
REFUSED, EQUAL, OTHER, DEFECT = "refused", "same result", "other valid input", "DEFECT"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One damaged file and what came of it."""

    group: str
    file: str
    damage: str
    seed: str
    outcome: str
    said: str


def case(target: Target, name: str, seed: str, expected: Any) -> Case:
    """Damage one file, read it, put it back."""
    whole = target.file.read_bytes()
    damaged = KINDS[target.kind][name](whole, random.Random(seed))
    try:
        target.file.write_bytes(damaged)
        outcome, said = outcome_of(target, whole, damaged, expected)
    finally:
        target.file.write_bytes(whole)
    return Case(group=target.group, file=target.file.name, damage=name, seed=seed, outcome=outcome, said=said)


def outcome_of(target: Target, whole: bytes, damaged: bytes, expected: Any) -> tuple[str, str]:
    """Return what came of reading, and what was said of it."""
    try:
        found = target.read()
    except DecalError as error:
        fault = fault_of(error, target.file)
        return (DEFECT, f"{fault}: {error}") if fault else (REFUSED, str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in at if "/decal/" in frame.filename]
        return DEFECT, f"{type(error).__name__} at {' '.join(ours[-3:])}: {str(error)[:300]}"
    if found == expected:
        return EQUAL, ""
    try:
        meant = target.meant(whole, damaged, found)
    except Exception as error:
        return DEFECT, f"taken, though another reader says {type(error).__name__}: {str(error)[:80]}"
    return (OTHER, "") if meant else (DEFECT, "another result, silently")


def fault_of(error: DecalError, file: Path) -> str | None:
    """Return what is wrong with an error's text, None if it is fit to be shown."""
    for name, text in (("what", error.what), ("got", str(error.got or "")), ("fix", error.fix)):
        for path in (file, *file.parents[:3]):
            text = text.replace(str(path), "")
        if len(text) > WIDEST or "\n" in text:
            return f"`{name}` does not fit a terminal ({len(text)} characters)"
    return None if error.fix.strip() else "no fix"


def fuzz(folder: Path, cases: int, seed: int, only: str = "", hear: Callable[[Case], None] | None = None) -> list[Case]:
    """Return the outcome of `cases` damages, dealt out over all files and kinds of damage in turn."""
    warnings.simplefilter("ignore")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    targets = [target for target in all_targets(folder) if only in str(target.file)]
    expected = {target.file: target.read() for target in targets}
    kinds = [(target, name) for target in targets for name in KINDS[target.kind]]
    random.Random(seed).shuffle(kinds)
    done = []
    for number in range(cases):
        target, name = kinds[number % len(kinds)]
        torch.manual_seed(0)
        done.append(case(target, name, f"{seed}-{number}", expected[target.file]))
        if hear is not None:
            hear(done[-1])
    return done


def table(cases: list[Case]) -> str:
    """Return the counts by file and outcome as lines."""
    outcomes = (REFUSED, EQUAL, OTHER, DEFECT)
    counts = Counter((case.group, case.file, case.outcome) for case in cases)
    files = sorted({(case.group, case.file) for case in cases})
    lines = [f"{'file':42}" + "".join(f"{name:>20}" for name in outcomes)]
    for group, file in files:
        lines.append(f"{f'{group}: {file}':42}" + "".join(f"{counts[group, file, name]:>20}" for name in outcomes))
    sums = Counter(case.outcome for case in cases)
    lines.append(f"{f'all {len(cases)} cases':42}" + "".join(f"{sums[name]:>20}" for name in outcomes))
    return "\n".join(lines)


def main() -> None:
    """Fuzz from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path holds this text")
    parser.add_argument("--all", action="store_true", help="print every case")
    given = parser.parse_args()
    torch.set_num_threads(1)

    def hear(case: Case) -> None:
        if given.all or case.outcome == DEFECT:
            print(f"{case.outcome}  {case.file}  {case.damage}  seed {case.seed}\n    {case.said}", flush=True)

    print(table(fuzz(given.folder, given.cases, given.seed, given.only, hear)))


if __name__ == "__main__":
    main()
