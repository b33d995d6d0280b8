"""Memory that runs out in a step or an evaluation: the same gradient and loss, from smaller micro-batches."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from decal.data.batch import Batch
from decal.errors import RunError
from decal.evaluate.loss import evaluate
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import halving, losses
from decal.training.budget import NoRoom
from decal.training.interrupt import Interrupted
from decal.training.losses import SFT
from decal.training.precision import Precision
from decal.training.state import Progress
from decal.training.step import Backward, backward
from tests import models
from tests.training import tiny_run

FP32 = Precision(name="fp32", device=torch.device("cpu"))


class Small(SFT):
    """The loss on a card that has memory for `rows` rows at a time."""

    def __init__(self, rows: int) -> None:
        super().__init__(chunked=True)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "seen", [])

    rows: int
    seen: list[int]

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        self.seen.append(len(batch.input_ids))
        if len(batch.input_ids) > self.rows:
            raise torch.OutOfMemoryError
        return super().__call__(model, batch)


def batch(rows: int) -> Batch:
    ids = models.tokens(rows, 12)
    return Batch(input_ids=ids, labels=ids, position_ids=None)


def guarded(run: Backward = backward) -> tuple[Backward, Progress, list[str]]:
    said: list[str] = []
    progress = Progress()
    return halving.guarded(run, progress, say=said.append, forget=lambda: said.append("forgotten")), progress, said


def test_a_step_goes_on_with_micro_batches_that_fit_and_has_the_same_gradient() -> None:
    ours, theirs = models.twins("llama", torch.float32)
    group, loss = [batch(6), batch(2)], Small(rows=2)
    run, progress, said = guarded()
    mean = run(ours, group, loss, FP32.scaler(), precision=FP32)
    whole = backward(theirs, group, SFT(chunked=True), FP32.scaler(), precision=FP32)
    # The order of a sum of 88 terms in fp32.
    torch.testing.assert_close(mean, whole, rtol=1e-6, atol=0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert loss.seen == [6, 3, 2, 2, 1, 1, 1, 1]  # whole, in halves, in quarters
    assert progress.cut == 4
    notes = [text for text in said if text != "forgotten"]
    assert [text.partition(":")[0] for text in notes] == [
        "memory ran out with 6 rows in a micro-batch",
        "memory ran out with 3 rows in a micro-batch",
    ]
    loss.seen.clear()
    run(ours, group, loss, FP32.scaler(), precision=FP32)
    assert loss.seen == [2, 2, 1, 1, 1, 1]  # it is not tried again


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), NoRoom("the budget cannot be met", fix="Take more.")])
def test_a_row_that_is_too_long_by_itself_ends_the_run(error: Exception) -> None:
    def run(*given: Any, **more: Any) -> Tensor:
        raise error

    model = models.make("llama", torch.float32)
    way, progress, said = guarded(run)
    match = "a single row in a micro-batch .got: 12 tokens" if isinstance(error, torch.OutOfMemoryError) else "budget"
    with pytest.raises(RunError, match=match):
        way(model, [batch(2)], SFT(chunked=True), FP32.scaler(), precision=FP32)
    assert progress.cut == 2
    assert said[0] == said[2] == "forgotten"
    assert all(p.grad is None for p in model.parameters())


def test_an_evaluation_goes_over_halves() -> None:
    model = models.make("llama")
    loss = Small(rows=1)
    found = evaluate(model, [batch(3)], loss)
    assert loss.seen == [3, 2, 1, 1, 1]
    assert found.loss == pytest.approx(evaluate(model, [batch(3)], SFT(chunked=True)).loss, rel=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, [batch(3)], Small(rows=0))


def told(run: Path) -> list[int]:
    return [event["step"] for event in RunDir(run).events() if "memory ran out" in event.get("text", "")]


def test_a_run_whose_memory_runs_out_ends_where_it_would_have_and_so_does_its_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_run.make_files(tmp_path)

    def settings(output: str) -> RunConfig:
        made = tiny_run.config(folder, output=output, micro_batch=2, accumulate=1, steps=6)
        return made.model_copy(update={"lora": made.lora.model_copy(update={"lora_dropout": 0.0})})

    whole = finetune(settings("whole"))
    monkeypatch.setattr(losses, "LOSSES", {"sft": lambda model, note: Small(rows=1)})
    halved = finetune(settings("halved"))
    assert told(halved.run) == [1]
    ours, theirs = (load_file(done.result / "adapter_model.safetensors") for done in (halved, whole))
    for name, tensor in theirs.items():
        # Six steps of AdamW, which divides a gradient by its own size: sums in another order move what is near 0.
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        finetune(settings("resumed"), on_event=stop)
    again = finetune(settings("resumed"), resume=True)
    resumed = load_file(again.result / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], ours[name]) for name in ours)
    assert told(again.run) == [1]  # what did not fit is not tried again
