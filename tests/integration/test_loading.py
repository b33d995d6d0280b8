"""Loading with accelerate's device map, in chosen dtypes, without spare memory; copies of a wrapped model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import decal
from decal import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model, load_model
from decal.errors import ConfigError, DecalError, Unsupported
from tests.integration import tiny

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "base", torch.bfloat16)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "float16", "fp32"])
def test_both_names_of_the_dtype_mean_the_base(adapter: Path, name: str, value: Any) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, **{name: value})
    wanted = {"float16": torch.float16, "fp32": torch.float32}.get(value, value) if isinstance(value, str) else value
    q_proj = model.get_base_model().model.layers[0].self_attn.q_proj
    assert q_proj.weight.dtype == wanted
    assert q_proj.lora_A["default"].weight.dtype == torch.float32


def test_a_device_map_changes_where_the_weights_are_and_nothing_else(base: Path, adapter: Path) -> None:
    pytest.importorskip("accelerate")
    mapped = AutoPeftModelForCausalLM.from_pretrained(adapter, device_map="auto", dtype="fp32")
    plain = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="fp32")
    batch = tiny.batch()
    with torch.no_grad():
        assert torch.equal(mapped(**batch).logits, plain(**batch).logits)
    on_top = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, device_map="auto", dtype=torch.float32), adapter
    )
    with torch.no_grad():
        assert torch.equal(on_top(**batch).logits, plain(**batch).logits)


def test_low_memory_loading_gives_the_same_tensors(base: Path, adapter: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, low_cpu_mem_usage=True)
    lean = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True)
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = full.state_dict()
    assert not any(value.is_meta for value in lean.state_dict().values())
    assert all(torch.equal(value, expected[name]) for name, value in lean.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_a_deep_copy_is_whole_and_independent(settings: dict[str, Any]) -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules="all-linear", **settings)).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    twin = copy.deepcopy(model)
    batch = tiny.batch()
    with torch.no_grad():
        before = model(**batch).logits
        assert torch.equal(twin(**batch).logits, before)
        twin.set_adapter("other")
        assert model.active_adapter == "default"
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(**batch).logits, before)
        assert not torch.equal(twin(**batch).logits, before)
    ours = {id(p) for p in model.parameters()}
    assert type(twin) is PeftModel
    assert not any(id(p) in ours for p in twin.parameters())


def test_the_package_reads_and_writes_no_pickles() -> None:
    """State that torch.save would pickle goes through safetensors and JSON everywhere in the package."""
    import decal

    root = Path(decal.__file__).parent
    calls = ("torch.save(", "torch.load(", "pickle.dump", "pickle.load", "import pickle")
    found = [f"{path.name}: {call}" for path in root.rglob("*.py") for call in calls if call in path.read_text("utf-8")]
    assert not found


def test_a_checkpoint_that_lacks_a_weight_is_refused(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DecalError, match=r"lacks 1 of the model's weights.*layers\.1\.self_attn\.q_proj"):
        load_model(base)


def test_a_head_for_a_new_task_may_start_at_random(base: Path) -> None:
    model = load_model(base, task=TaskType.SEQ_CLS, num_labels=3)
    assert model.get_submodule("score").weight.shape[0] == 3


def test_a_truncated_checkpoint_is_named(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(DecalError, match=r"checkpoint is damaged.*model\.safetensors"):
        load_model(base)


def test_words_that_mean_nothing_are_refused(base: Path, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="unknown dtype"):
        load_model(base, dtype="fp31")
    with pytest.raises(Unsupported, match="no code from a model's repository"):
        AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
    with pytest.raises(ConfigError, match="RunConfig or a file"):
        decal.train({"model": "m"})  # type: ignore[arg-type]


def test_pefts_words_for_placing_an_adapter_are_accepted(base: Path, adapter: Path) -> None:
    plain = PeftModel.from_pretrained(load_model(base), adapter)
    asked = PeftModel.from_pretrained(load_model(base), adapter, device_map="auto", torch_dtype=torch.bfloat16)
    assert asked.state_dict().keys() == plain.state_dict().keys()
    assert asked.get_parameter(LORA_A).dtype == plain.get_parameter(LORA_A).dtype


def test_a_choice_that_decal_made_is_logged(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    get_peft_model(load_model(base), LoraConfig())
    assert "all-linear" in caplog.text  # q_proj and v_proj are PEFT's choice for Llama
