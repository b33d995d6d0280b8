"""What a recorded step computes, without a card: its fixed shapes and its loss (recording: test_gpu_modes.py)."""

from __future__ import annotations

import pytest
import torch

from decal import LoraConfig, get_peft_model
from decal.data.batch import IGNORE, Batch
from decal.model.lean import in_one_function, lean, run_layers
from decal.ops import fuse
from decal.ops.loss import cross_entropy_of_rows
from decal.training import graphs, head
from decal.training.losses import SFT
from tests import models


def batch(learnt: int, rows: int = 2, length: int = 24) -> Batch:
    ids = models.tokens(rows, length)
    labels = ids.clone()
    labels[:, : length - learnt] = IGNORE
    return Batch(input_ids=ids, labels=labels, position_ids=None)


@pytest.mark.parametrize("learnt", [1, 5, 24])
def test_the_loss_of_fixed_shapes_is_the_loss(learnt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "FILL", 16)
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear")).train()
    body, linear = head.parts(model)
    with fuse.forced("plain"), lean(model):
        assert not in_one_function(body, 24)  # not known before a first pass
        expected, count = SFT(chunked=True)(model, batch(learnt))
        assert in_one_function(body, 24)
        fixed = graphs.fixed(body, batch(learnt))
        assert len(fixed.rows) == len(fixed.targets) == len(fixed.rows.unique())
        assert len(fixed.rows) % 16 == 0 or len(fixed.rows) == 48
        assert int((fixed.targets >= 0).sum()) == count
        hidden = run_layers(body, fixed.inputs).flatten(0, 1)
        got = cross_entropy_of_rows(hidden, linear.weight, fixed.rows, fixed.targets)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_batches_with_as_many_learnt_tokens_share_a_shape() -> None:
    body, _ = head.parts(models.make("llama"))
    keys = [graphs.fixed(body, batch(learnt)).key for learnt in (3, 9, 24)]
    assert keys[0] == keys[1] == keys[2] == (2, 24, 48)  # filled up with all rows that there are


def test_a_mask_or_a_window_is_not_for_recording() -> None:
    model = get_peft_model(models.make("mistral", torch.float32), LoraConfig(target_modules="all-linear")).train()
    body, _ = head.parts(model)
    with fuse.forced("plain"), lean(model):
        ids = models.tokens(1, 8)
        model(input_ids=ids, use_cache=False)
        body.config.sliding_window = 8
        assert in_one_function(body, 8)
        assert not in_one_function(body, 9)
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), use_cache=False)
        assert not in_one_function(body, 8)
