"""The lean forms against the modules of transformers that they stand in for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from decal import LoraConfig, get_peft_model
from decal.layers import adapted
from decal.layers.lean import LeanGatedMLP, LeanRMSNorm
from decal.model.lean import lean
from tests.models import make

IDS = torch.randint(3, 40, (3, 64), generator=torch.Generator().manual_seed(0))  # 192 rows: the merged way is taken


def _adapted(kind: str) -> nn.Module:
    model = make(kind, torch.float32)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config, generator=torch.Generator().manual_seed(1)).train()


def _loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _kept_bytes(model: nn.Module) -> int:
    """What autograd keeps of one forward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(input_ids=IDS, use_cache=False).logits
    del out
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "llama-biased", "mistral", "qwen2"])
def test_same_loss_and_gradients(kind: str) -> None:
    model = _adapted(kind)
    loss, expected = _loss_and_gradients(model)
    with lean(model) as swapped:
        assert swapped == 2 * 3 + 1  # an MLP and two norms in each of 2 layers, and the last norm
        lean_loss, got = _loss_and_gradients(model)
    assert torch.equal(lean_loss, loss)  # the same operations in the same order
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        # fp32: the norm's gradient is summed in another order than autograd's
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", 1)  # the way of large batches, which makes products again
    model = _adapted("llama")
    before = _kept_bytes(model)
    with lean(model):
        assert _kept_bytes(model) < 0.75 * before


def test_the_model_afterwards_is_the_very_same() -> None:
    model = _adapted("llama")
    names = [name for name, _ in model.named_parameters()]
    modules = [id(m) for m in model.modules()]
    with lean(model):
        assert [name for name, _ in model.named_parameters()] == names
        assert any(isinstance(m, (LeanGatedMLP, LeanRMSNorm)) for m in model.modules())
    assert [id(m) for m in model.modules()] == modules


def test_a_norm_that_trains_is_left_alone() -> None:
    model = make("llama").requires_grad_(True)
    with lean(model):
        assert not any(isinstance(m, LeanRMSNorm) for m in model.modules())


def test_gemma_is_left_alone() -> None:
    """Gemma's norms multiply by 1 + w, which the lean norm does not."""
    model = _adapted("gemma2")
    with lean(model):
        assert not any(isinstance(m, LeanRMSNorm) for m in model.modules())
