"""A wrapped model's life: merge and back, unload, copy, state_dict, hooks, many adapters; nothing else changes."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from decal.api import get_peft_model
from decal.errors import AdapterError, DecalError
from decal.layers.adapted import Adapted, AdaptedLinear
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": "all-linear"}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "pissa": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "tied": ("llama-tied", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "token rows": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "biases": ("llama-biased", {"target_modules": ["q_proj"], "bias": "all"}),
    "own head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
}
every_option = pytest.mark.parametrize(("kind", "options"), OPTIONS.values(), ids=OPTIONS)


def adapted(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> PeftModel:
    """Return a model with a random adapter."""
    model = get_peft_model(models.make(kind, dtype), LoraConfig(**options)).eval()
    with torch.no_grad():
        for p in oracle.trained(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p.dtype), alpha=0.1)
    return model


@every_option
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unmerging_restores_every_bit(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = adapted(kind, options, dtype)
    ids = models.tokens()
    before, state = oracle.logits(model, ids), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    if dtype == torch.float64:
        torch.testing.assert_close(oracle.logits(model, ids), before, **oracle.FP64)
    model.unmerge_adapter()
    oracle.assert_same(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(oracle.logits(model, ids), before)


@every_option
def test_unload_returns_the_model_as_it_was(kind: str, options: dict[str, Any]) -> None:
    plain = models.make(kind)
    plain.get_input_embeddings().requires_grad_(False)  # the user's own choice: it must come back, too
    modules, state = dict(plain.named_modules()), copy.deepcopy(plain.state_dict())
    wants = {name: p.requires_grad for name, p in plain.named_parameters()}
    model = get_peft_model(plain, LoraConfig(**options))
    with torch.no_grad():
        for p in oracle.trained(model).values():
            p.normal_()
    assert model.unload() is plain
    after = dict(plain.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    oracle.assert_same(plain.state_dict(), state, rtol=0, atol=0)
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == wants
    oracle.logits(get_peft_model(plain, LoraConfig(**options)), models.tokens())  # and it can be adapted again


@every_option
def test_merge_and_unload_returns_a_plain_model(kind: str, options: dict[str, Any]) -> None:
    model = adapted(kind, options)
    ids = models.tokens()
    expected, keys = oracle.logits(model, ids), models.make(kind).state_dict().keys()
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(oracle.logits(merged, ids), expected, **oracle.FP64)
    assert merged.state_dict().keys() == keys
    assert not [m for m in merged.modules() if type(m).__module__.startswith("decal.")]
    assert all(p.requires_grad for p in merged.parameters())


@every_option
def test_a_deep_copy_shares_nothing(kind: str, options: dict[str, Any]) -> None:
    model = adapted(kind, options)
    ids = models.tokens()
    before = oracle.logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(oracle.logits(twin, ids), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    twin.add_adapter("other", LoraConfig(target_modules=[next(iter(LINEARS[kind]))]))
    twin.set_adapter("other")
    assert torch.equal(oracle.logits(model, ids), before)
    assert model.active_adapters == ["default"]


LINEARS = {"llama": ["q_proj"], "llama-tied": ["q_proj"], "llama-biased": ["q_proj"], "gpt2": ["c_attn"]}


@every_option
def test_state_dict_goes_out_and_in(kind: str, options: dict[str, Any]) -> None:
    model = adapted(kind, options)
    ids = models.tokens()
    other = get_peft_model(models.make(kind, seed=5), LoraConfig(**options)).eval()
    missing, unexpected = other.load_state_dict(model.state_dict())
    assert not missing
    assert not unexpected
    assert torch.equal(oracle.logits(other, ids), oracle.logits(model, ids))


def test_parameter_names_are_pefts() -> None:
    ours, theirs = oracle.pair("llama", target_modules=["q_proj", "embed_tokens"], use_dora=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@every_option
def test_what_merged_models_refuse(kind: str, options: dict[str, Any]) -> None:
    model = adapted(kind, options)
    model.merge_adapter()
    for act in (
        model.merge_adapter,
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("default"),
        lambda: model.add_adapter("b", LoraConfig(**options)),
        lambda: model.disable_adapter().__enter__(),
    ):
        with pytest.raises(DecalError, match="merged"):
            act()
    model.unmerge_adapter()
    model.set_adapter("default")


def test_an_adapted_layer_answers_as_the_layer_it_wraps() -> None:
    model = adapted("llama-biased", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]})
    layer: Any = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer, AdaptedLinear)
    plain = layer.get_base_layer()
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert isinstance(plain, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (plain.in_features, plain.out_features)
    assert (layer.scaling, layer.r, layer.lora_alpha) == ({"default": 1.5}, {"default": 4}, {"default": 6})
    assert layer.active_adapters == ["default"]
    assert layer.get_delta_weight("default").shape == plain.weight.shape


def test_hooks_of_accelerate_move_to_the_new_layer_and_back() -> None:
    plain = models.make("llama")
    layer = plain.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hook = layer._hf_hook
    ids = models.tokens()
    before = oracle.logits(plain, ids)
    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))
    wrapper: Any = plain.model.layers[0].self_attn.q_proj
    assert isinstance(wrapper, Adapted)
    assert wrapper._hf_hook is hook
    assert not hasattr(layer, "_hf_hook")
    torch.testing.assert_close(oracle.logits(model, ids), before, **oracle.FP64)
    model.unload()
    assert layer._hf_hook is hook
    assert torch.equal(oracle.logits(plain, ids), before)


def test_thirty_adapters_cost_no_more_each_than_the_first(tmp_path: Path) -> None:
    """PEFT's load time per adapter grows with the number that is loaded (its issue 981)."""
    model = adapted("llama", {"target_modules": "all-linear"})
    model.save_pretrained(tmp_path)
    times = []
    for i in range(30):
        start = time.perf_counter()
        model.load_adapter(tmp_path, f"a{i}")
        times.append(time.perf_counter() - start)
    early, late = sorted(times[:10])[5], sorted(times[-10:])[5]
    assert late < 3 * early + 0.005  # medians; 5 ms for a busy machine
    model.set_adapter("a29")
    ids = models.tokens()
    expected = oracle.logits(model, ids)
    mixed = oracle.logits(model, ids, adapter_names=["a0", "a15", "a29"])
    torch.testing.assert_close(mixed, expected, **oracle.FP64)


def test_an_adapter_loaded_to_train_trains_and_another_does_not(tmp_path: Path) -> None:
    adapted("llama", {"target_modules": ["q_proj"]}).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(models.make("llama").train(), tmp_path)
    assert not oracle.trained(frozen)
    assert not frozen.training
    model = PeftModel.from_pretrained(models.make("llama").train(), tmp_path, adapter_name="one", is_trainable=True)
    assert oracle.trained(model)
    assert model.training
    assert all(".one." in name for name in oracle.trained(model))
    model.load_adapter(tmp_path, "reference")
    assert all(".one." in name for name in oracle.trained(model))
    assert model.active_adapters == ["one"]


def test_loading_into_an_existing_name_replaces_its_weights(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    source = adapted("llama", options)
    source.save_pretrained(tmp_path / "a")
    adapted("llama", {**options, "r": 2}).save_pretrained(tmp_path / "other rank")
    adapted("llama", {**options, "lora_alpha": 32}).save_pretrained(tmp_path / "other scale")
    model = get_peft_model(models.make("llama"), LoraConfig(**options)).eval()
    parameters = oracle.trained(model)
    model.load_adapter(tmp_path / "a", "default", is_trainable=True)
    assert all(p is parameters[name] for name, p in oracle.trained(model).items())  # an optimizer still holds them
    ids = models.tokens()
    expected = oracle.logits(source, ids)
    assert torch.equal(oracle.logits(model, ids), expected)
    for other, word in (("other rank", "another r "), ("other scale", "another lora_alpha ")):
        with pytest.raises(AdapterError, match=word):
            model.load_adapter(tmp_path / other, "default")
        assert torch.equal(oracle.logits(model, ids), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_same_generator_gives_the_same_start(kind: str) -> None:
    config = LoraConfig(target_modules=LINEARS[kind], init_lora_weights="gaussian")
    first, second, other = (
        get_peft_model(models.make(kind), config, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    oracle.assert_same(oracle.trained(first), oracle.trained(second), rtol=0, atol=0)
    assert any(not torch.equal(p, oracle.trained(other)[n]) for n, p in oracle.trained(first).items())


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_starts_are_drawn_as_pefts(init: bool | str) -> None:
    """The same law for A: uniform in ±1/sqrt(in), or normal with deviation 1/r; B is zero unless init is False."""
    config: dict[str, Any] = {"r": 16, "target_modules": "all-linear", "init_lora_weights": init}
    for model in (
        get_peft_model(models.make("llama"), LoraConfig(**config)),
        oracle.theirs_of(models.make("llama"), config),
    ):
        As = torch.cat([p.flatten() for n, p in oracle.trained(model).items() if "lora_A" in n and "down" not in n])
        Bs = torch.cat([p.flatten() for n, p in oracle.trained(model).items() if "lora_B" in n])
        deviation = 1 / 16 if init == "gaussian" else 1 / (3 * 32) ** 0.5
        assert abs(float(As.detach().std()) / deviation - 1) < 0.05  # 6,000 draws: a standard error of 1%
        assert bool(Bs.any()) is (init is False)
