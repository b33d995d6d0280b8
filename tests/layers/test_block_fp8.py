"""Decoder layers whose products are computed in 8-bit floats: their gradients, and what cannot be computed so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from decal import LoraConfig, get_peft_model
from decal.bundled import MODEL_DIR
from decal.errors import ConfigError, RunError
from decal.model.lean import general_note, lean, require_fp8
from decal.ops import fuse
from tests import models
from tests.layers import four_layers

IDS = torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(0))


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def made(quantize: str | None) -> nn.Module:
    return four_layers.make(SIZES, quantize, rank=8)


def gradients(model: nn.Module, *, autocast: bool, ids: Tensor = IDS) -> Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), 0))


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gradients_point_where_those_of_fp32_do(quantize: str | None, memory: str) -> None:
    model = made(quantize)
    if memory == "recompute":
        model.activation_checkpointing_enable()  # type: ignore[operator]
    require_fp8(model, torch.bfloat16)
    with fuse.forced("plain"), lean(model, fp8=True):
        narrow = gradients(model, autocast=True)
    with fuse.forced("plain"), lean(model):
        plain = gradients(model, autocast=True)
    with fuse.forced("off"):
        exact = gradients(four_layers.widened(made(quantize)), autocast=False)
    # Every product of 28 is off by 3.7%, and random weights pass all of it on: 0.9968 and 0.9970 here.
    assert cosine(narrow, exact) >= 0.995
    assert cosine(narrow, exact) < cosine(plain, exact)  # it did run in 8 bits


def test_gradients_of_a_pretrained_model_on_text() -> None:
    """Six layers that have learnt, over eight pieces of text."""

    def pretrained(dtype: torch.dtype) -> nn.Module:
        return four_layers.with_adapter(
            AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).to(dtype), rank=8
        )

    text = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL_DIR)(text)["input_ids"][: 8 * 256])
    model, wide, found = pretrained(torch.bfloat16), pretrained(torch.float32), []
    for piece in ids.view(8, 2, -1):
        with fuse.forced("plain"), lean(model, fp8=True):
            narrow = gradients(model, autocast=True, ids=piece)
        with fuse.forced("off"):
            found.append(cosine(narrow, gradients(wide, autocast=False, ids=piece)))
    assert sum(found) / len(found) >= 0.99  # what was aimed for
    assert min(found) >= 0.985  # 0.986 was the least of ten pieces of wikitext-2 (benchmarks/fp8_cosine.py)


def test_evaluation_stays_in_16_bits() -> None:
    model = made(None).eval()
    with fuse.forced("plain"), torch.no_grad():
        with lean(model):
            expected = model(input_ids=IDS).logits
        with lean(model, fp8=True):
            assert torch.equal(model(input_ids=IDS).logits, expected)


def adapted(kind: str, **settings: Any) -> nn.Module:
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings})
    return get_peft_model(models.make(kind, torch.bfloat16), config)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("gpt2", {}, "its decoder layers must be those of Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma3, Phi3"),
        ("gemma2", {}, "its decoder layers must be those of Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma3, Phi3"),
        ("llama", {"lora_dropout": 0.1}, "it needs one plain LoRA adapter on frozen weights, without dropout, DoRA or"),
        ("llama", {"use_dora": True}, "it needs one plain LoRA adapter on frozen weights, without dropout, DoRA or"),
    ],
)
def test_other_models_are_refused(kind: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"this model cannot train in fp8: {why}") as raised:
        require_fp8(adapted(kind, **settings), torch.bfloat16)
    assert raised.value.fix == "Use train.precision=auto."


def test_a_model_of_one_layer_is_refused() -> None:
    """It would be one in 16 bits that says it is in 8."""
    config = LlamaConfig(**{**models.SIZES, "num_hidden_layers": 1})
    model = get_peft_model(LlamaForCausalLM(config).bfloat16(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="it has one decoder layer, and the first stays in 16 bits"):
        require_fp8(model, torch.bfloat16)


def test_odd_widths_are_refused() -> None:
    config = LlamaConfig(**{**models.SIZES, "intermediate_size": 40})
    model = get_peft_model(LlamaForCausalLM(config).bfloat16(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="its widths must be multiples of 16"):
        require_fp8(model, torch.bfloat16)


def test_a_call_that_would_leave_8_bits_is_an_error() -> None:
    model = made(None)
    model.config._attn_implementation = "eager"  # type: ignore[union-attr]
    with fuse.forced("plain"), lean(model, fp8=True), pytest.raises(RunError, match="cannot train in fp8 as it is"):
        gradients(model, autocast=True)


def test_a_checkpoint_in_another_format_is_refused_by_its_name() -> None:
    model = get_peft_model(models.make("llama", torch.float16), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="its weights are stored in float16, and it computes in bfloat16"):
        require_fp8(model, torch.bfloat16)


def test_layers_that_take_the_general_way_say_why() -> None:
    model = get_peft_model(models.make("llama", torch.float16), LoraConfig(r=4, target_modules="all-linear"))
    with fuse.forced("plain"), lean(model):
        assert general_note(model, torch.float16) is None
        said = general_note(model, torch.bfloat16)
        model.config._attn_implementation = "eager"  # type: ignore[union-attr]
        other = general_note(model, torch.float16)
    assert said is not None
    assert said.endswith("its weights are stored in float16, and it computes in bfloat16")
    assert other is not None
    assert other.endswith("its attention is eager, not sdpa")


def test_the_largest_weights_of_a_layer_that_nothing_adapts_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(models.make("llama", torch.bfloat16), settings).train()
    ids = IDS % model.config.vocab_size  # type: ignore[union-attr, operator]
    asked: list[tuple[int, ...]] = []
    amax = torch.Tensor.amax

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim == 2 and not x.requires_grad:
            asked.append(tuple(x.shape))
        return amax(x, *args, **kwargs)

    with fuse.forced("plain"), lean(model, fp8=True):
        gradients(model, autocast=True, ids=ids)
        monkeypatch.setattr(torch.Tensor, "amax", counted)
        gradients(model, autocast=True, ids=ids)
    down = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj").weight
    assert tuple(down.shape) not in asked  # type: ignore[arg-type]
