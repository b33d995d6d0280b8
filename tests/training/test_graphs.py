"""What a recorded step computes, without a card: its fixed shapes and its loss (recording: test_gpu_modes.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from decal import LoraConfig, get_peft_model
from decal.data.batch import IGNORE, Batch
from decal.errors import DataError, RunError
from decal.model import direct
from decal.model.direct import runs_directly
from decal.model.lean import lean
from decal.ops import fuse
from decal.ops.loss import cross_entropy_of_rows
from decal.ops.segments import segments
from decal.training import graphs, head, step
from decal.training.losses import SFT
from decal.training.precision import Precision
from tests import models


def batch(learnt: int, rows: int = 2, length: int = 24, *, packed: bool = False) -> Batch:
    ids = models.tokens(rows, length)
    labels = ids.clone()
    labels[:, : length - learnt] = IGNORE
    lengths = (length // 3, length - length // 3)
    places = torch.cat([torch.arange(n) for n in lengths]).expand(rows, length)
    return Batch(input_ids=ids, labels=labels, position_ids=places if packed else None)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("learnt", [1, 5, 24])
@pytest.mark.parametrize("kind", ["llama", "gemma", "phi3"])
def test_the_loss_of_fixed_shapes_is_the_loss(
    kind: str, learnt: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "FILL", 16)
    monkeypatch.setattr(graphs, "STEP", 9)
    model = get_peft_model(models.make(kind, torch.float32), LoraConfig(r=4, target_modules="all-linear")).train()
    body, linear = head.parts(model)
    with fuse.forced("plain"), lean(model):
        assert not runs_directly(body, 128)  # not known before a first pass
        expected, count = SFT(chunked=True)(model, batch(learnt, packed=packed))  # as transformers runs it
        expected.backward()
        theirs = gradients(model)
        assert runs_directly(body, 128)
        fixed = graphs.fixed(body, batch(learnt, packed=packed), models.VOCABULARY)
        assert fixed.inputs.shape == (2, 27)
        assert len(fixed.rows) == len(fixed.targets) == len(fixed.rows.unique())
        assert len(fixed.rows) % 16 == 0 or len(fixed.rows) == 54
        assert int((fixed.targets >= 0).sum()) == count
        hidden = direct.run(body, fixed.inputs, fixed.places, fixed.where).flatten(0, 1)
        got = cross_entropy_of_rows(hidden, linear.weight, fixed.rows, fixed.targets)
        got.backward()
    # The same sums, in products of other shapes.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for mine, other in zip(gradients(model), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_packed_rows_run_directly_after_a_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear")).train()
    calls, run = [], direct.run

    def counted(*given: Any) -> torch.Tensor:
        calls.append(1)
        return run(*given)

    monkeypatch.setattr(direct, "run", counted)
    with fuse.forced("plain"), lean(model):
        first, second = (SFT(chunked=True)(model, batch(9, packed=True))[0] for _ in range(2))
    assert calls == [1]
    torch.testing.assert_close(second, first, rtol=1e-6, atol=0)  # the mask as transformers makes it, and as decal does


def test_batches_with_about_as_many_tokens_share_a_shape() -> None:
    body, _ = head.parts(models.make("llama"))
    keys = [graphs.fixed(body, batch(*shape), models.VOCABULARY).key for shape in ((3, 2, 24), (9, 2, 41), (24, 2, 64))]
    assert keys[0] == keys[1] == keys[2] == (2, 64, 128, 0, 0)  # filled up with all rows that there are
    packed = [graphs.fixed(body, batch(3, length=length, packed=True), models.VOCABULARY).key for length in (50, 64)]
    assert packed[0] == packed[1] == (2, 64, 128, 64, 128)


@pytest.mark.parametrize(
    ("longest", "width"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (1030, 1152), (2000, 2048), (4096, 4096)]
)
def test_widths_that_come_again(longest: int, width: int) -> None:
    assert graphs.width_of(longest) == width


def test_a_window_or_an_evaluation_is_not_run_directly() -> None:
    model = get_peft_model(models.make("mistral", torch.float32), LoraConfig(target_modules="all-linear")).train()
    body, _ = head.parts(model)
    with fuse.forced("plain"), lean(model):
        model(input_ids=models.tokens(1, 8), use_cache=False)
        body.config.sliding_window = 8
        assert runs_directly(body, 8)
        assert not runs_directly(body, 9)
        with torch.no_grad():
            assert not runs_directly(body, 8)
        model.eval()
        assert not runs_directly(body, 8)
        with torch.no_grad():
            model(input_ids=models.tokens(1, 8), use_cache=False)
        model.train()
        assert runs_directly(body, 8)  # as before the evaluation


@pytest.mark.parametrize("why", ["attention", "hook"])
def test_what_the_body_alone_would_do_is_left_to_it(why: str) -> None:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(target_modules="all-linear")).train()
    body, _ = head.parts(model)
    with fuse.forced("plain"), lean(model):
        model(input_ids=models.tokens(1, 8), use_cache=False)
        assert runs_directly(body, 8)
        if why == "attention":
            body.config._attn_implementation = "flex_attention"  # without a mask it is not causal
        else:
            body.register_forward_hook(lambda *_: None)
        assert not runs_directly(body, 8)


class Replayed:
    """In the place of a recorded graph: it runs the passes of the batch that it was given."""

    def __init__(self, owner: graphs.Graphs, model: nn.Module, inputs: graphs.Fixed, total: torch.Tensor) -> None:
        self.given = owner, model, inputs, total
        self.loss = torch.zeros(())

    def replay(self) -> None:
        owner, model, inputs, total = self.given
        self.loss.copy_(owner._launched(model, inputs, total))


class Played(graphs.Graphs):
    """Recorded steps without a card, on which `room` says how many shapes can be recorded."""

    room = 99

    def __init__(self) -> None:
        self.said: list[str] = []
        super().__init__(Precision(name="fp32", device=torch.device("cpu")), self.said.append)
        self.replays = 0

    def _capture(self, model: nn.Module, inputs: graphs.Fixed, total: torch.Tensor) -> tuple[Any, torch.Tensor]:
        if len(self._recorded) >= self.room:
            raise torch.OutOfMemoryError
        played = Replayed(self, model, inputs, total)
        return played, played.loss


def gradients_of(run: Any, groups: list[list[Batch]]) -> list[list[torch.Tensor]]:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear")).train()
    scaler, found = torch.amp.GradScaler("cpu", enabled=False), []
    precision = Precision(name="fp32", device=torch.device("cpu"))
    with fuse.forced("plain"), lean(model):
        for group in groups:
            mean = run(model, group, SFT(chunked=True), scaler, precision=precision)
            found.append([mean.clone(), *gradients(model)])
    return found


def groups() -> list[list[Batch]]:
    """Two shapes, alone and together, for as long as both are recorded and then replayed."""
    long, short = batch(9, 2, 64), batch(5, 1, 30)
    return [[long], [short], [long, short], [long, short], [short], [long], [short, long, short]]


def played(owner: Played) -> Any:
    return lambda model, batches, loss, scaler, precision: owner._backward(model, batches, loss, scaler)


def test_launched_and_replayed_passes_add_to_one_gradient() -> None:
    owner = Played()
    got = gradients_of(played(owner), groups())
    expected = gradients_of(step.backward, groups())
    assert owner.said == []
    assert len(owner._recorded) == 2
    for mine, theirs in zip(got, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            # The same sums, in rows of other widths.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_a_recording_without_room_is_given_up_and_the_step_is_not() -> None:
    owner = Played()
    owner.room = 1
    got = gradients_of(played(owner), groups())
    assert owner.said == ["steps run launch by launch, because there is no room to record one"]
    assert owner._recorded == {}
    for mine, theirs in zip(got, gradients_of(step.backward, groups()), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    body, _ = head.parts(models.make("llama"))
    with pytest.raises(DataError, match="outside the vocabulary of 7"):
        graphs.fixed(body, batch(3), 7)


def test_a_layer_that_cannot_tell_samples_apart_says_so() -> None:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(target_modules="all-linear"))
    body, _ = head.parts(model)
    where = segments(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    with fuse.forced("plain"), lean(model), pytest.raises(RunError, match="tell packed samples apart"):
        direct.run(body, models.tokens(1, 8), torch.arange(8)[None], where)
