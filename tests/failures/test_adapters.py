"""Silent failures of adapters: combined, named, loaded, moved to another base. Each fault is planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decal import LoraConfig, PeftModel, get_peft_model, load_model
from decal.errors import DecalError
from tests import models
from tests.failures.page import told
from tests.integration import tiny

QV = ["q_proj", "v_proj"]


def trained(**settings: Any) -> PeftModel:
    """Return a model with an adapter that changes it."""
    return get_peft_model(
        models.make("llama"), LoraConfig(target_modules=QV, init_lora_weights=False, **settings)
    ).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(models.tokens()).logits
    return out


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}, {}], ids=["rslora", "dora", "lora"])
def test_1_one_adapter_alone_is_itself_among_several(settings: dict[str, Any]) -> None:
    model = trained(r=8, lora_alpha=16, **settings)
    alone = logits(model)
    model.add_adapter("zero", LoraConfig(target_modules=QV))  # a new adapter changes nothing
    model.set_adapter(["default", "zero"])
    torch.testing.assert_close(logits(model), alone, rtol=1e-12, atol=1e-12)  # fp64; another order of sums


def test_2_several_active_adapters_are_their_exact_sum() -> None:
    model = trained(r=8)
    model.add_adapter("other", LoraConfig(r=4, target_modules=QV, init_lora_weights=False))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    W = layer.base_layer.weight
    x = torch.randn(5, W.shape[1], dtype=W.dtype)
    exact = x @ (W + layer.get_delta_weight("default") + layer.get_delta_weight("other")).T
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), exact, rtol=1e-12, atol=1e-12)  # fp64; another order of sums


def test_1_to_3_what_combines_wrongly_elsewhere_is_not_there() -> None:
    with pytest.raises(DecalError) as error:
        trained().add_weighted_adapter(["default"], [1.0], "combined")
    for key in ("1a", "2a", "3a"):
        told(key, error.value)


def test_3_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(DecalError) as error:
        trained().add_adapter("default", LoraConfig(target_modules=QV))
    told("3b", error.value)


def test_4_one_misspelt_target_of_three() -> None:
    with pytest.raises(DecalError) as error:
        get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj", "vproj", "k_proj"]))
    told("4a", error.value)


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Change tensors of an adapter's file (None: take one out), as another tool would: without a seal."""
    (folder / "decal.json").unlink(missing_ok=True)
    file = folder / "adapter_model.safetensors"
    state = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


def test_5_a_key_too_many_or_too_few(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    whole = load_file(tmp_path / "adapter_model.safetensors")[name]
    rewrite(tmp_path, {name.replace("layers.1", "layers.9"): whole.clone()})
    with pytest.raises(DecalError) as extra:
        PeftModel.from_pretrained(models.make("llama"), tmp_path)
    rewrite(tmp_path, {name.replace("layers.1", "layers.9"): None, name: None})
    with pytest.raises(DecalError) as missing:
        PeftModel.from_pretrained(models.make("llama"), tmp_path)
    told("5a", extra.value)
    told("5b", missing.value)


def test_6_another_base_of_the_same_shape(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base")
    tiny.save_model(tmp_path / "other", seed=1)
    model = get_peft_model(load_model(tmp_path / "base"), LoraConfig(target_modules=QV))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DecalError) as error:
        PeftModel.from_pretrained(load_model(tmp_path / "other"), tmp_path / "adapter")
    told("6a", error.value)


def test_7_nan_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "good")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[3] = float("nan")
    with pytest.raises(DecalError) as saving:
        model.save_pretrained(tmp_path / "bad")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(tmp_path / "good", {name: torch.full((8, 32), float("nan"), dtype=torch.float32)})
    with pytest.raises(DecalError) as loading:
        PeftModel.from_pretrained(models.make("llama"), tmp_path / "good")
    told("7a", saving.value)
    told("7b", loading.value)


def test_30_a_start_that_moves_the_base_is_saved_as_plain_lora(tmp_path: Path) -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=QV, init_lora_weights="pissa")).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path)
    # fp64 base; the file is fp32, the dtype of the factors
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_30_a_foreign_file_that_needs_the_moved_base_is_refused(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    (tmp_path / "decal.json").unlink(missing_ok=True)
    file = tmp_path / "adapter_config.json"
    settings = {**json.loads(file.read_text()), "init_lora_weights": "pissa", "inference_mode": False}
    file.write_text(json.dumps(settings))
    with pytest.raises(DecalError) as error:
        PeftModel.from_pretrained(models.make("llama"), tmp_path)
    told("30a", error.value)


def test_31_a_gathered_or_empty_state_is_not_saved_in_place_of_the_adapter(tmp_path: Path) -> None:
    model = trained()
    shard = {name: p.detach().clone()[:0] for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(DecalError) as error:
        model.save_pretrained(tmp_path, state_dict=shard)
    told("31a", error.value)
    assert not list(tmp_path.iterdir())


def test_33_an_unknown_name_in_a_mixed_batch() -> None:
    with pytest.raises(DecalError) as error:
        trained()(models.tokens(2), adapter_names=["default", "defautl"])
    told("33a", error.value)
