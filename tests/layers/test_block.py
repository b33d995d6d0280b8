"""The decoder layer as one function, against the layer of transformers and decal's general path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal import LoraConfig, get_peft_model
from decal.layers import adapted
from decal.layers.host_embedding import HostEmbedding
from decal.model.lean import lean
from decal.ops import block as block_op
from decal.ops import fuse
from tests.models import make

IDS = torch.randint(3, 40, (3, 64), generator=torch.Generator().manual_seed(0))


def adapted_model(kind: str, **settings: Any) -> nn.Module:
    model = make(kind, torch.float32)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings})
    return get_peft_model(model, config, generator=torch.Generator().manual_seed(1)).train()


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that ran as one function, by what they keep."""
    seen: list[str] = []
    inner = block_op._run

    def counted(block: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(block.memory)
        return inner(block, *args, **kwargs)

    monkeypatch.setattr(block_op, "_run", counted)
    return seen


@pytest.mark.parametrize("merge_rows", [1, 10**6], ids=["merged", "apart"])
@pytest.mark.parametrize("memory", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("kind", ["llama", "llama-biased", "mistral", "qwen2"])
def test_same_loss_and_gradients(
    kind: str, memory: str, merge_rows: int, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", merge_rows)
    model = adapted_model(kind)
    loss, expected = loss_and_gradients(model)
    if memory != "keep":
        model.activation_checkpointing_enable(offload=memory == "offload")
    with fuse.forced("plain"), lean(model):
        lean_loss, got = loss_and_gradients(model)
    assert runs == [memory] * 2 * (1 if memory == "keep" else 2)
    assert lean_loss.item() == pytest.approx(loss.item(), rel=1e-5)  # fp32, in another order
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_an_embedding_on_the_host_gives_the_same_bits(kind: str) -> None:
    model = adapted_model(kind)
    loss, _ = loss_and_gradients(model)
    table = model.get_input_embeddings().weight
    with lean(model, embedding_on_host=True):
        assert model.get_input_embeddings().weight is table
        assert isinstance(model.get_input_embeddings(), HostEmbedding) == (kind == "llama")
        again, _ = loss_and_gradients(model)
    assert torch.equal(again, loss)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
