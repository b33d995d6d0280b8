"""What one check found: passed, failed or not applicable, with its number, and the fix where it failed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from decal.errors import RunError

Status = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question about a job and its answer. `measure` is what was measured, in words and numbers; `fix` is given
    exactly where the check failed."""

    name: str
    status: Status
    measure: str
    fix: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert (self.fix is not None) == (self.status == "failed"), f"{self.name}: a fix belongs to a failure"

    def after(self, seconds: float) -> Check:
        """Return this answer with the time that it took."""
        return replace(self, seconds=round(seconds, 3))

    def fields(self) -> dict[str, Any]:
        """Return plain values for JSON and for the run's events."""
        fields = {"name": self.name, "status": self.status, "measure": self.measure, "seconds": self.seconds}
        return fields if self.fix is None else {**fields, "fix": self.fix}


def passed(name: str, measure: str) -> Check:
    return Check(name=name, status="passed", measure=measure)


def failed(name: str, measure: str, *, fix: str) -> Check:
    return Check(name=name, status="failed", measure=measure, fix=fix)


def not_applicable(name: str, why: str) -> Check:
    return Check(name=name, status="not applicable", measure=why)


def failures(checks: Iterable[Check]) -> list[Check]:
    """Return the checks that failed, in order."""
    return [check for check in checks if check.status == "failed"]


def require(checks: Iterable[Check]) -> None:
    """Raise RunError that names the first check that failed, with its fix."""
    for check in failures(checks):
        raise RunError(f"the check {check.name!r} failed: {check.measure}", fix=check.fix or "")
