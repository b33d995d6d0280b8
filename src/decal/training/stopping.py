"""What is left of a run that went wrong: the checkpoint to fall back on, if `train.auto_stop` is set."""

from __future__ import annotations

from decal.errors import RunError
from decal.rundir import RunDir, step_of
from decal.training.state import Progress
from decal.training.watch import Watch

AFRESH = "Lower train.lr, delete {run} and start again: --resume would go wrong again."


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
    """Settle what a run that is stopped keeps, note it in `done`, and return it in words."""
    done.kept = fall_back(run, done, watch, since=since)
    if done.kept is None:
        kept = f"nothing is kept: {nothing_left(run)}"
    elif done.kept == done.best_step:
        kept = f"the weights of step {done.kept}, the best evaluation, are kept"
    else:
        kept = f"the weights of step {done.kept}, the last checkpoint from before, are kept"
    done.stopped = f"{why}; {kept}"
    return done.stopped


def nothing_left(run: RunDir) -> str:
    """Return in words why no checkpoint is worth keeping."""
    names = [path.name for path in run.checkpoints()]
    if not names:
        return "no checkpoint had been written"
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} from after it went wrong"


def refuse_nothing(run: RunDir, done: Progress, *, lr: float) -> None:
    """Raise RunError if the run was stopped and nothing of it is kept: it has no result."""
    if done.stopped and done.kept is None:
        raise RunError(
            f"training was stopped at step {done.step}: {done.stopped}",
            got=f"train.lr={lr:g}",
            fix=f"{AFRESH.format(run=run.path)} train.save_every=N keeps earlier checkpoints.",
        )
