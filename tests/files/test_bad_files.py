"""Adapter files that are damaged, foreign or for another model: a clear error, and the model as it was."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decal.api import get_peft_model
from decal.errors import DecalError
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

Damage = Callable[[Path], None]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return a good adapter's folder."""
    ours, _ = oracle.pair("llama", target_modules=["q_proj", "v_proj"])
    ours.save_pretrained(tmp_path)
    return tmp_path


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    """Return what rewrites an adapter's tensors by `change`."""

    def rewrite(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return rewrite


def config(**values: Any) -> Damage:
    """Return what rewrites an adapter's configuration."""

    def rewrite(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return rewrite


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")


def cast(dtype: torch.dtype) -> Damage:
    """Return what stores all tensors as another dtype."""
    return tensors(lambda state: state.update({key: tensor.to(dtype) for key, tensor in state.items()}))


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weights": 1}))


def garbled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 50)


def as_text(text: str) -> Damage:
    """Return what puts `text` in the configuration's place."""

    def rewrite(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(text)

    return rewrite


def without(name: str) -> Damage:
    """Return what takes a file away."""

    def remove(folder: Path) -> None:
        (folder / name).unlink()

    return remove


BAD: dict[str, tuple[Damage, str]] = {
    "a missing tensor": (tensors(lambda s: s.pop(FIRST)), r"1 missing.*q_proj\.lora_A"),
    "an extra tensor": (tensors(lambda s: s.update({"base_model.model.extra": torch.ones(1)})), "no place for.*extra"),
    "a tensor of an unadapted layer": (
        tensors(lambda s: s.update({FIRST.replace("q_proj", "k_proj"): s[FIRST].clone()})),
        "no place for.*k_proj",
    ),
    "NaN": (tensors(lambda s: s[FIRST].view(-1)[3].fill_(float("nan"))), "1 NaN or infinite"),
    "infinity": (tensors(lambda s: s[FIRST].view(-1)[3].fill_(float("inf"))), "1 NaN or infinite"),
    "another rank": (tensors(lambda s: s.update({FIRST: torch.ones(3, 32)})), r"\(3, 32\).*\(8, 32\)"),
    "another size": (tensors(lambda s: s.update({FIRST: torch.ones(8, 30)})), r"takes 32 features.*30 in the file"),
    "no matrix": (tensors(lambda s: s.update({FIRST: torch.ones(8)})), r"\(8,\).*\(8, 32\)"),
    "int8": (cast(torch.int8), r"lora_[AB].* is stored as int8.*8 of 8 tensors"),
    "int64": (cast(torch.int64), "is stored as int64"),
    "8-bit floats": (cast(torch.float8_e4m3fn), "is stored as float8_e4m3fn"),
    "one tensor of bytes": (tensors(lambda s: s.update({FIRST: s[FIRST].to(torch.uint8)})), "stored as uint8.*1 of 8"),
    "an empty shard": (tensors(lambda s: s.update({FIRST: torch.ones(0)})), "empty|another shape|another base"),
    "another rank in the configuration": (config(r=16), r"scale moved 1\.0 -> 0\.5.*r 8 -> 16"),
    "truncated": (truncated, "damaged or cut short"),
    "no bytes": (emptied, "damaged or cut short"),
    "not safetensors": (garbled, "damaged"),
    "a pickle": (pickled, "pickle"),
    "no weights": (without("adapter_model.safetensors"), "no adapter_model.safetensors"),
    "no configuration": (without("adapter_config.json"), "no adapter_config.json"),
    "a broken configuration": (as_text("{"), "not JSON"),
    "an empty configuration file": (as_text(""), "not JSON"),
    "a configuration cut short": (as_text('{"peft_type": "LORA", "r": 8, "targ'), "not JSON"),
    "a configuration that is a list": (as_text("[]"), "must hold an object"),
    "another method": (config(peft_type="VERA"), "VERA"),
    "an option of PEFT's": (config(use_qalora=True), "use_qalora"),
    "an unknown key": (config(lora_alfa=3), "lora_alfa"),
    "a wrong value": (config(r="many"), "'r'"),
    "expert weights": (config(target_parameters=["experts.down_proj"]), "target_parameters"),
    "targets that this model has not": (config(target_modules=["c_attn"]), "c_attn|missing|no layer|no place"),
}


@pytest.mark.parametrize(("damage", "text"), BAD.values(), ids=BAD)
def test_the_error_says_what_and_the_model_is_as_it_was(adapter: Path, damage: Damage, text: str) -> None:
    damage(adapter)
    plain = models.make("llama")
    ids = models.tokens()
    before, modules = oracle.logits(plain, ids), dict(plain.named_modules())
    with pytest.raises(DecalError, match=text) as raised:
        PeftModel.from_pretrained(plain, adapter)
    assert raised.value.fix
    assert dict(plain.named_modules()) == modules
    assert torch.equal(oracle.logits(plain, ids), before)

    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    mine, keys = oracle.logits(model, ids), model.state_dict().keys()
    with pytest.raises(DecalError, match=text):
        model.load_adapter(adapter, "other")
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == keys
    assert torch.equal(oracle.logits(model, ids), mine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_that_adapters_are_stored_in_is_read(adapter: Path, dtype: torch.dtype) -> None:
    cast(dtype)(adapter)
    without("decal.json")(adapter)  # as of an adapter that another program cast
    model = PeftModel.from_pretrained(models.make("llama"), adapter)
    state = load_file(adapter / "adapter_model.safetensors")
    first = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(first, state[FIRST].to(first.dtype))


@pytest.mark.parametrize("kind", ["gpt2", "wider"])
def test_an_adapter_for_another_base_is_refused(adapter: Path, kind: str) -> None:
    if kind == "wider":
        plain: Any = models.make("llama")
        plain.model.layers[0].self_attn.q_proj = torch.nn.Linear(48, 32).double()
    else:
        plain = models.make(kind)
    with pytest.raises(DecalError, match="q_proj"):
        PeftModel.from_pretrained(plain, adapter)


def test_a_failed_load_into_an_adapter_leaves_it(adapter: Path) -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    ids = models.tokens()
    before = oracle.logits(model, ids)
    tensors(lambda s: s.pop(FIRST))(adapter)
    with pytest.raises(DecalError, match="missing"):
        model.load_adapter(adapter, "default")
    assert torch.equal(oracle.logits(model, ids), before)


def test_a_nan_is_not_saved_and_not_merged(tmp_path: Path) -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        next(iter(oracle.trained(model).values()))[0, 0] = float("nan")
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    with pytest.raises(DecalError, match="NaN"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("**/*.safetensors"))
    with pytest.raises(DecalError, match="NaN"):
        model.merge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def test_what_decal_never_does(tmp_path: Path) -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(DecalError, match="pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(DecalError, match="no such adapter folder"):
        PeftModel.from_pretrained(models.make("llama"), tmp_path / "nowhere")
    with pytest.raises(DecalError, match="subfolder"):
        PeftModel.from_pretrained(models.make("llama"), tmp_path, subfolder="b")


@pytest.mark.parametrize("part", [".weight", ""])
def test_both_of_pefts_names_of_the_magnitude_are_read(part: str, tmp_path: Path) -> None:
    ours, _ = oracle.pair("llama", target_modules=["q_proj"], use_dora=True)
    ours.save_pretrained(tmp_path)
    without("decal.json")(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {(f"{k}{part}" if k.endswith("lora_magnitude_vector") else k): t for k, t in state.items()},
        tmp_path / "adapter_model.safetensors",
    )
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path)
    ids = models.tokens()
    torch.testing.assert_close(oracle.logits(again, ids), oracle.logits(ours, ids), **oracle.FP64)


def test_a_table_that_peft_adds_is_checked_and_dropped(tmp_path: Path) -> None:
    """PEFT saves a copy of an adapted embedding's own table: the base's is used, and must be the same."""
    ours, theirs = oracle.pair("llama", target_modules=["embed_tokens"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ids = models.tokens()
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path)
    torch.testing.assert_close(oracle.logits(again, ids), oracle.logits(ours, ids), **oracle.FP64)
    with pytest.raises(DecalError, match="not this base's"):
        PeftModel.from_pretrained(models.make("llama", seed=5), tmp_path)
