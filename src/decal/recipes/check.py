"""Check a run before it is started: the rows as the model sees them, then every check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from decal.checks import preflight, preview
from decal.checks.preview import Row
from decal.checks.result import Check
from decal.spec import RunConfig
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
