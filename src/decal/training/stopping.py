"""What is left of a run that went wrong: the checkpoint to fall back on, if `train.auto_stop` is set."""

from __future__ import annotations

from decal.errors import RunError
from decal.rundir import RunDir, step_of
from decal.training.state import Progress
from decal.training.watch import Watch


def fall_back(run: RunDir, done: Progress, watch: Watch, *, since: int) -> int | None:
    """Return the step whose checkpoint is to be kept; None if there is none that is worth it.

    `since` is the first step with a bad loss. That loss was computed with the weights of the step before, so those are
    bad already. The best evaluated checkpoint counts whenever it was better than the start.
    """
    steps = [step_of(path) for path in run.checkpoints()]
    best, began = done.best_step, watch.began_at
    learnt = began is not None and done.best_loss is not None and done.best_loss < began
    if best is not None and best in steps and (best < since - 1 or learnt):
        return best
    good = [step for step in steps if step < since - 1]
    return good[-1] if good else None


def stop(run: RunDir, done: Progress, watch: Watch, *, since: int, why: str) -> str:
    """Settle what a run that is stopped keeps, and return it in words. Raises RunError if nothing is left to keep."""
    done.kept = fall_back(run, done, watch, since=since)
    if done.kept is None:
        raise RunError(
            f"training was stopped at step {done.step}: {why}, and no checkpoint is from before that",
            got=f"train.lr={watch.lr:g}",
            fix=f"Lower train.lr, delete {run.path} and start again; train.save_every=N keeps earlier checkpoints.",
        )
    done.stopped = f"{why}; the weights of step {done.kept} are kept"
    return done.stopped
