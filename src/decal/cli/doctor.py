"""`decal doctor`: what is installed, what the machine has, and whether the kernels are right."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from decal.cli import console

if TYPE_CHECKING:
    from decal.checks.doctor import Report

EXAMPLES = "Examples:\n\ndecal doctor\n\ndecal doctor --json > report.json"


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """Look at this machine; the report names no user, host or token. Exit code 3 if a kernel is wrong."""
    with console.working("looking at torch, the machine and the kernels"):
        from decal.checks import doctor as checks
        from decal.checks.result import failures

        report = checks.examine()
    if as_json:
        values = asdict(report)
        console.dump({**values, "kernels": [one.fields() for one in report.kernels]})
    else:
        show(report)
    if failures(report.kernels):
        raise typer.Exit(3)


def show(report: Report) -> None:
    """Print the report for people."""
    from decal.cli.check import answer

    versions = ", ".join(f"{name} {found}" for name, found in report.versions.items())
    lines = {**report.machine, "disk": "; ".join(f"{place}: {free}" for place, free in report.room.items())}
    lines["versions"] = versions
    if report.environment:
        lines["variables"] = "\n".join(f"{name}={value}" for name, value in report.environment.items())
    if report.missing:
        lines["missing"] = "\n".join(f"{name}: {gives}" for name, gives in report.missing.items())
    console.out().print(console.facts(lines), soft_wrap=True)
    for note in report.notes:
        console.warn(note)
    console.say("")
    for check in report.kernels:
        answer(check, width=20)
