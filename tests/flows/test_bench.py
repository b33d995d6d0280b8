"""`decal bench`: what it measures is a step that learns, and its FLOPs are the model's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from decal.cli import main
from decal.cli.bench import operations
from decal.errors import RunError
from decal.model.random import random_model
from decal.recipes import peers
from decal.recipes.bench import Work, bench, model_flops
from decal.spec import LoraConfig
from tests.integration import tiny


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("config")
    tiny.model().config.save_pretrained(folder)
    return Work(model=str(folder), rows=2, length=32, rank=4, steps=2, device="cpu")


@pytest.mark.parametrize("changes", [{}, {"quantize": "nf4"}, {"recompute": True}, {"optimizer": "adamw8bit"}])
def test_it_learns_and_adds_up(work: Work, changes: dict[str, Any]) -> None:
    found = bench(replace(work, **changes))
    assert found.last_loss < found.first_loss
    assert found.grad_norm > 0
    assert found.tokens_per_s == pytest.approx(64 / found.seconds)
    assert 0 < found.fastest <= found.seconds
    assert 0 < found.utilisation < 1.5  # another job on the machine may slow the one product more than the step


def test_a_step_that_learns_nothing_is_refused(work: Work) -> None:
    with pytest.raises(RunError, match="learnt nothing") as error:
        bench(replace(work, lr=1e-30))
    assert "gradient norm" in str(error.value)


def test_the_flops_are_those_that_torch_counts(work: Work) -> None:
    from decal.api import get_peft_model

    base: Any = random_model(work.model, device=torch.device("cpu"), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.zeros(work.rows, work.length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    attention = 7 * base.config.num_hidden_layers * work.rows * work.length**2 * base.config.hidden_size
    # torch counts no attention on a CPU. The first layer's input needs no gradient: 3 of 29 products less.
    linear = model_flops(model, work) - attention
    assert linear == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (6.7e14, "670 TFLOP"),
        (1.5e12, "1.50 TFLOP"),
        (3.04e9, "3.04 GFLOP"),
        (9.7e6, "9.70 MFLOP"),
        (2.0, "2.00e-06 MFLOP"),
    ],
)
def test_operations_are_said_in_a_unit_that_shows_them(number: float, said: str) -> None:
    assert operations(number) == said


def test_the_command_prints_figures_and_says_what_it_could_not_measure(
    work: Work, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "NEEDS", {"nowhere": ("no_such_package",)})
    words = ["bench", work.model, "--rows", "2", "--length", "32", "--steps", "1", "--device", "cpu"]
    assert main.run([*words, "--peers"], debug=False) == 0
    said = capsys.readouterr()
    assert "tokens/s" in said.out
    assert "not measured: nowhere (needs no_such_package)" in said.err
    monkeypatch.setattr(peers, "NEEDS", {"broken": ()})  # a system without a model: its process fails
    assert main.run([*words, "--peers"], debug=False) == 0
    said = capsys.readouterr()
    assert "tokens/s" in said.out
    assert "not measured: broken could not do the work (got: KeyError: 'broken')" in said.err
    assert main.run([*words, "--json"], debug=False) == 0
    (system,) = json.loads(capsys.readouterr().out)["systems"]
    assert system["system"] == "decal"
    assert system["utilisation"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_peft_does_the_same_work(work: Work, quantize: Any) -> None:
    work = replace(work, quantize=quantize)
    assert "peft" in peers.installed(work)[0]
    theirs, ours = peers.measure(work, "peft"), bench(work)
    assert theirs.first_loss == pytest.approx(ours.first_loss, rel=1e-4)  # the same weights and tokens, in fp32
    assert theirs.last_loss < theirs.first_loss


@pytest.mark.slow
def test_a_peer_that_fails_is_named(work: Work) -> None:
    with pytest.raises(RunError, match="peft could not do the work"):
        peers.measure(replace(work, model="/nowhere"), "peft")
