"""`decal report`: a run's page, written from what lies in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from decal.cli import console

EXAMPLES = "Examples:\n\ndecal report runs/first\n\ndecal report runs/first --out first.html"


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, in whatever state.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to (default: report.html in that folder).")] = None,
) -> None:
    """Write a run as one HTML page: what was trained, curves, data, checks, advice; `decal train` ends so."""
    from decal.report import run as pages
    from decal.rundir import RUN, RunDir

    folder = run.parent if run.name == RUN else run
    console.say(str(pages.write(RunDir(folder), out)))
