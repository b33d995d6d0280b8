"""Whether a run may begin or go on in a folder, and from where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decal.errors import ConfigError, RunError
from decal.reading import reading
from decal.rundir import MANIFEST, REMAKE, RUN, RunDir, step_of
from decal.spec import RunConfig, read_run_config
from decal.training import state
from decal.training.optim import PAGED

# Settings that say where and how a result is computed or watched, not what it is; all others are fixed for a run.
FREE = frozenset(
    {
        "output",
        "train.check",
        "train.device",
        "train.log_to",
        "train.keep",
        "train.save_every",
        "train.auto_stop",
        "train.gradient_checkpointing",
        "train.cuda_graphs",
        "train.memory",
    }
)


def starting_point(run: RunDir, config: RunConfig, *, resume: bool) -> Path | None:
    """Return the checkpoint to go on from; None to begin. Raises RunError if the folder does not allow it, or what
    lies there is damaged.

    A run that was stopped before its first checkpoint begins again: with the same settings that is the same run.
    """
    if not resume:
        run.check_free()
        return None
    if not run.holds_run():
        raise RunError("there is no run to resume here", got=run.path, fix="Start it without --resume.")
    check_same(read_run_config(run.path / RUN), config)
    if (run.path / MANIFEST).exists():
        check_same(begun_with(run), config)  # run.yaml is easily changed, and is what people resume with
    run.check_writable()
    run.clean()
    whole = run.checkpoints()
    if whole:
        state.check(whole[-1])
    return whole[-1] if whole else None


def open_folder(
    run: RunDir, config: RunConfig, facts: dict[str, Any], *, checkpoint: Path | None, resume: bool
) -> None:
    """Claim the folder for a new run, or take an old one's events back to its checkpoint; write the manifest."""
    if resume:
        run.rewind(step_of(checkpoint) if checkpoint is not None else -1)
    else:
        run.claim(config.to_yaml())
    run.write_manifest(facts)


def begun_with(run: RunDir) -> RunConfig:
    """Return the settings that the run wrote down as it began. Raises RunError if they are damaged."""
    with reading(f"the settings in {MANIFEST} are damaged", run.path / MANIFEST, fix=REMAKE, kind=RunError):
        try:
            return RunConfig(**run.manifest()["config"])
        except ConfigError as error:
            raise ValueError(error.what) from None


def check_same(before: RunConfig, now: RunConfig) -> None:
    """Raise RunError naming the first setting that differs and would change the result."""
    old, new = _that_decide(before), _that_decide(now)
    for key in sorted(old.keys() | new.keys()):
        if key not in FREE and old.get(key) != new.get(key):
            raise RunError(
                f"{key} has changed since the run began, so it cannot go on as the same run",
                got=f"{old.get(key)!r} then, {new.get(key)!r} now",
                fix=f"Resume with {key}={old.get(key)}, or start a new run in another --output.",
            )


def _that_decide(config: RunConfig) -> dict[str, Any]:
    """Return the settings by dotted name; whether optimizer states are paged changes no result."""
    values = dict(_flat(config.model_dump(mode="json")))
    return {**values, "train.optimizer": config.train.optimizer.removeprefix(PAGED)}


def check_same_data(run: RunDir, digest: str) -> None:
    """Raise RunError if the tokenised data are not those that the run began with."""
    if not (run.path / MANIFEST).exists():
        return
    before = run.manifest()["data"]["digest"]
    if before != digest:
        raise RunError(
            "the data have changed since the run began, so it cannot go on as the same run",
            got=f"digest {before[:12]} then, {digest[:12]} now",
            fix="Put the old data (and tokenizer) back, or start a new run in another --output.",
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
