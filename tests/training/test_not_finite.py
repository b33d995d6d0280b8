"""A step that is not finite leaves its rows behind, with the loss of each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from decal.data.batch import Batch
from decal.errors import RunError
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.training import losses, not_finite
from decal.training.losses import SFT
from decal.training.precision import Precision
from tests import models
from tests.training import tiny_run

FP32 = Precision(name="fp32", device=torch.device("cpu"))


class Poisoned(SFT):
    """A loss that is NaN wherever a batch holds token 7."""

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        total, count = super().__call__(model, batch)
        return (total * math.nan if bool((batch.input_ids == 7).any()) else total), count


def rows(*ids: list[int]) -> Batch:
    tokens = torch.tensor(ids)
    return Batch(input_ids=tokens, labels=tokens, position_ids=None)


def test_each_row_has_a_line_with_its_own_loss(tmp_path: Path) -> None:
    model = models.make("llama", torch.float32).train()
    group = [rows([1, 2, 3], [4, 7, 6]), rows([5, 6, 8])]
    said = not_finite.write(
        RunDir(tmp_path),
        9,
        group,
        model=model,
        loss=Poisoned(chunked=True),
        precision=FP32,
        decode=lambda ids: " ".join(map(str, ids)),
    )
    assert said == "The step's rows are in not-finite/step-9.jsonl, 1 of 3 with no finite loss alone"
    lines = [json.loads(line) for line in (tmp_path / "not-finite" / "step-9.jsonl").read_text().splitlines()]
    assert [(line["micro_batch"], line["row"], line["text"]) for line in lines] == [
        (0, 0, "1 2 3"),
        (0, 1, "4 7 6"),
        (1, 0, "5 6 8"),
    ]
    assert lines[1]["loss"] == "nan"
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 8]]), labels=torch.tensor([[5, 6, 8]])).loss
    # The chunked sum and transformers' own differ in the order of fp32 additions.
    assert lines[2]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert lines[2]["labels"] == [5, 6, 8]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_rows_without_loss_and_a_full_disk(tmp_path: Path) -> None:
    unlearnt = Batch(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[-100, -100]]), position_ids=None)
    (tmp_path / "not-finite").write_text("")  # a file where the folder should be
    said = not_finite.write(
        RunDir(tmp_path),
        1,
        [unlearnt],
        model=models.make("llama", torch.float32),
        loss=Poisoned(chunked=True),
        precision=FP32,
        decode=None,
    )
    assert said.startswith("The step's rows could not be written (")


@pytest.mark.parametrize("auto_stop", [False, True])
def test_a_run_keeps_them_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto_stop: bool) -> None:
    folder = tiny_run.make_files(tmp_path)
    calls = 0

    class Later(SFT):
        def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            nonlocal calls
            calls += 1
            total, count = super().__call__(model, batch)
            return total * (math.nan if calls > 8 else 1.0), count

    monkeypatch.setattr(losses, "LOSSES", {"sft": lambda model, note: Later(chunked=True)})
    settings = tiny_run.config(folder, data={"eval_rows": 0}, eval_every=None, auto_stop=auto_stop)
    if auto_stop:
        finetune(settings)
    else:
        with pytest.raises(RunError, match=r"The step's rows are in not-finite/step-\d+.jsonl, "):
            finetune(settings)
    run = RunDir(folder / "run")
    (note,) = [e for e in run.events() if e["kind"] == "note" and "The step's rows" in e["text"]]
    (file,) = (run.path / "not-finite").iterdir()
    assert f"not-finite/step-{note['step']}.jsonl" in note["text"]
    assert file.name == f"step-{note['step']}.jsonl"
    (line, *_) = [json.loads(line) for line in file.read_text().splitlines()]
    assert line["loss"] == "nan"
    assert "user" in line["text"] or "<" in line["text"]
