"""Layers that another library quantised: adapted as PEFT adapts them, and what cannot be done with them refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import decal
from decal.errors import Unsupported
from decal.layers.adapted import AdaptedLinear
from decal.layers.owned import OwnedBase, is_owned
from decal.spec import LoraConfig
from tests.integration import tiny

IDS = torch.tensor([[5, 9, 14, 3, 22, 7, 30, 12]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny.save_model(path)
    return path


def eight_bit(folder: Path) -> Any:
    """Return the model as transformers + bitsandbytes load it in 8 bits."""
    pytest.importorskip("bitsandbytes")
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_equal_to_peft_on_bitsandbytes_int8(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    how: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft.get_peft_model(eight_bit(folder), peft.LoraConfig(**how))
    ours = decal.get_peft_model(eight_bit(folder), LoraConfig(**how))
    adapted = [m for m in ours.modules() if isinstance(m, AdaptedLinear)]
    assert adapted
    assert all(isinstance(m.base, OwnedBase) for m in adapted)
    with torch.no_grad():
        for (name, mine), (other, its) in zip(
            *[[(n, p) for n, p in m.named_parameters() if p.requires_grad] for m in (ours, theirs)], strict=True
        ):
            assert name == other
            its.normal_(std=0.1)
            mine.copy_(its)
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-5)
    mine_, its_ = gradients(ours), gradients(theirs)
    assert mine_.keys() == its_.keys()
    for name, gradient in its_.items():  # fp32 sums in another order, behind an 8-bit product
        torch.testing.assert_close(mine_[name], gradient, rtol=1e-3, atol=1e-5)


def test_all_linear_takes_them_and_their_weights_are_not_read(folder: Path) -> None:
    model = decal.get_peft_model(eight_bit(folder), LoraConfig(r=4, target_modules="all-linear"))
    assert len([m for m in model.modules() if isinstance(m, AdaptedLinear)]) == 14
    with pytest.raises(Unsupported, match="load the adapter on the 16-bit checkpoint"):
        model.merge_and_unload()
    with pytest.raises(Unsupported, match="no DoRA"):
        decal.get_peft_model(eight_bit(folder), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))


class NoGradient(nn.Linear):
    """What an inference-only kernel does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_a_product_without_a_gradient_is_refused() -> None:
    base = OwnedBase(NoGradient(4, 4))
    base.matmul(torch.ones(1, 4))
    with pytest.raises(Unsupported, match="passes no gradient back"):
        base.matmul(torch.ones(1, 4, requires_grad=True))
    assert not is_owned(NoGradient(4, 4))
