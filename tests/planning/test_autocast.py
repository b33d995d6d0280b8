"""What the plan takes over of a card's ways: dtypes under autocast, and the mask that dropout keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from decal.planning import memory
from decal.planning.autocast import AsOnACard
from decal.planning.traced import Trace
from tests.planning.tiny import save_config, wanted

X = torch.ones(8, 64, dtype=torch.bfloat16)
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


def test_norms_powers_and_softmax_are_widened_under_autocast_alone() -> None:
    with AsOnACard(), BF16:
        wide = [F.layer_norm(X, (64,)), X.pow(3), torch.pow(X, 3.0), torch.softmax(X, -1), X**2]
        narrow = [F.gelu(X), torch.tanh(X), F.linear(X, X)]
    with AsOnACard():
        narrow += [F.layer_norm(X, (64,)), X.pow(3)]
    assert {y.dtype for y in wide} == {torch.float32}
    assert {y.dtype for y in narrow} == {torch.bfloat16}


def test_dropout_keeps_one_byte_for_each_element() -> None:
    x = X.clone().requires_grad_()
    trace = Trace()
    with AsOnACard(), trace:
        y = F.dropout(x, 0.1)
    kept = [block.bytes for block in trace.blocks if block.died is None]
    assert y.requires_grad
    assert sorted(kept) == [8 * 64, 2 * 8 * 64]  # the mask, and the result in bf16


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_layers_that_run_again_run_in_the_same_dtypes(family: str, tmp_path: Path) -> None:
    """Backward is a call of its own, during which torch takes modes off: a layer that ran again did so in 16 bits."""
    save_config(tmp_path, family)
    plain, again = (
        memory.forecast(wanted(tmp_path, device="cuda", numbers="bf16", gradient_checkpointing=on)).phase("training")
        for on in (False, True)
    )
    assert again.parts["activations"] < 0.5 * plain.parts["activations"]
