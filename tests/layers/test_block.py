"""The decoder layer as one function, against the layer of transformers and decal's general path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal import LoraConfig, get_peft_model
from decal.layers import adapted
from decal.layers.block import LeanBlock
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
    ids = IDS.to(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
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
@pytest.mark.parametrize("kind", ["llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi3"])
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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama-biased", "mistral", "qwen3", "gemma", "gemma3", "phi3"])
def test_compiled_on_a_card_it_gives_the_same(kind: str, runs: list[str]) -> None:
    model = adapted_model(kind).cuda()
    with fuse.forced("off"):
        loss, expected = loss_and_gradients(model)
    with lean(model):
        lean_loss, got = loss_and_gradients(model)
    assert runs == ["keep"] * 2
    assert lean_loss.item() == pytest.approx(loss.item(), rel=1e-5)  # fp32, in another order
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


def test_two_passes_before_a_backward_do_not_share_a_place() -> None:
    model = adapted_model("llama")
    other = IDS.flip(0, 1)

    def both() -> dict[str, Tensor]:
        model.zero_grad()
        first = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        second = model(input_ids=other, labels=other, use_cache=False).loss
        (first + 2 * second).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = both()
    model.activation_checkpointing_enable(offload=True)
    with fuse.forced("plain"), lean(model):
        got = both()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {
            "target_modules": ["k_proj", "o_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"k_proj": 3},
        },
    ],
)
@pytest.mark.parametrize("merge_rows", [1, 10**6], ids=["merged", "apart"])
def test_some_layers_without_an_adapter(
    settings: dict[str, Any], merge_rows: int, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", merge_rows)
    model = adapted_model("llama-biased", **settings)
    loss, expected = loss_and_gradients(model)
    with fuse.forced("plain"), lean(model):
        lean_loss, got = loss_and_gradients(model)
    assert runs == ["keep"] * 2
    assert lean_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("memory", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "o_proj", "gate_proj"]])
def test_dropout_drops_what_the_general_path_drops(memory: str, targets: Any, runs: list[str]) -> None:
    model = adapted_model("llama-biased", lora_dropout=0.3, target_modules=targets)
    torch.manual_seed(7)
    with fuse.forced("off"), lean(model):  # the same seeds in the same order
        loss, expected = loss_and_gradients(model)
    if memory != "keep":
        model.activation_checkpointing_enable(offload=memory == "offload")
    torch.manual_seed(7)
    with fuse.forced("plain"), lean(model):
        lean_loss, got = loss_and_gradients(model)
        other, _ = loss_and_gradients(model)
    assert set(runs) == {memory}
    assert lean_loss.item() == pytest.approx(loss.item(), rel=1e-5)  # fp32, in another order
    assert abs(other.item() / loss.item() - 1) > 1e-3
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "olora"}])
def test_other_changes_take_the_general_path(settings: dict[str, Any], runs: list[str]) -> None:
    model = adapted_model("llama", **settings)
    torch.manual_seed(0)
    loss, expected = loss_and_gradients(model)
    torch.manual_seed(0)
    with fuse.forced("plain"), lean(model):
        again, got = loss_and_gradients(model)
    assert runs == []
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_packed_rows_keep_apart(runs: list[str]) -> None:
    """A change in one sample of a row reaches no other: the mask is transformers' own."""
    model = adapted_model("llama")
    places = torch.cat([torch.arange(32), torch.arange(32)])[None].expand(3, -1)
    changed = IDS.clone()
    changed[:, :32] = IDS[:, :32].flip(1)
    with fuse.forced("plain"), lean(model):
        outs = [model(input_ids=ids, position_ids=places, use_cache=False).logits for ids in (IDS, changed)]
    assert runs == ["keep"] * 4
    assert torch.equal(outs[0][:, 32:], outs[1][:, 32:])
    assert not torch.equal(outs[0][:, :32], outs[1][:, :32])


def test_evaluation_and_generation_take_the_general_path(runs: list[str]) -> None:
    model = adapted_model("llama")
    expected = model(input_ids=IDS, use_cache=False).logits
    with fuse.forced("plain"), lean(model):
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
        model.eval()
        model.generate(input_ids=IDS[:, :4], max_new_tokens=2, do_sample=False)
    assert runs == []


def test_the_names_and_the_modules_afterwards_are_the_same() -> None:
    model = adapted_model("llama")
    names, modules = [n for n, _ in model.named_parameters()], [id(m) for m in model.modules()]
    with fuse.forced("plain"), lean(model):
        assert [n for n, _ in model.named_parameters()] == names
        assert any(isinstance(m, LeanBlock) for m in model.modules())
    assert [id(m) for m in model.modules()] == modules
