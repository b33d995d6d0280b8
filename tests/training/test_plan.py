"""How long a run is and what happens when."""

from __future__ import annotations

from typing import Any

import pytest

from decal.errors import ConfigError
from decal.spec import TrainConfig
from decal.training import optim, plan


def make(steps_per_epoch: int | None = 10, evaluates: bool = True, **settings: Any) -> plan.Plan:
    return plan.make(TrainConfig(**settings), steps_per_epoch=steps_per_epoch, evaluates=evaluates)


def test_epochs_become_steps_rounded_up_and_steps_override_them() -> None:
    assert make(epochs=3).steps == 30
    assert make(epochs=0.25).steps == 3
    assert make(epochs=3, steps=7).steps == 7
    assert make(None, steps=7).steps == 7


def test_evaluation_and_saving_fall_on_epoch_ends_unless_said() -> None:
    todo = make(epochs=2.5)
    assert [s for s in range(26) if todo.evaluation_due(s)] == [10, 20, 25]
    assert [s for s in range(1, 26) if todo.save_due(s)] == [10, 20, 25]
    todo = make(eval_every=4, save_every=3)
    assert [s for s in range(11) if todo.evaluation_due(s)] == [4, 8, 10]
    assert [s for s in range(1, 11) if todo.save_due(s)] == [3, 6, 9, 10]
    assert not any(make(evaluates=False).evaluation_due(s) for s in range(11))


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0.03, 100, 3), (0.03, 101, 4), (0.03, 1, 0), (0.5, 2, 1), (0.99, 3, 2), (0, 5, 0), (4, 5, 4)],
)
def test_warm_up_is_a_share_or_a_number_and_never_the_whole_run(warmup: float, steps: int, expected: int) -> None:
    assert make(steps=steps, warmup=warmup).warmup == expected


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_every_run_has_a_step_that_moves_the_weights(steps: int, warmup: float, schedule: str) -> None:
    todo = make(steps=steps, warmup=warmup)
    rates = [optim.SCHEDULES[schedule](step, todo.warmup, todo.steps) for step in range(steps)]
    assert max(rates) == 1
    assert rates[-1] > 0


def test_settings_that_would_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs means nothing.*Give train\.steps"):
        make(None)
    with pytest.raises(ConfigError, match=r"train\.warmup.*5 of 5 steps"):
        make(steps=5, warmup=5)
    for name in ("early_stopping", "eval_every"):
        with pytest.raises(ConfigError, match=f"train.{name} needs an evaluation set"):
            make(evaluates=False, **{name: 2})
