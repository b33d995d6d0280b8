"""Models whose linear weights stay in their files: equal to the loaded model, alone, coded, summed with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from decal.api import get_peft_model
from decal.files.checkpoint import Checkpoint
from decal.layers.coded import CodedLinear
from decal.layers.streamed import StreamedLinear
from decal.model import quantized, summed
from decal.model.load import load_model
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models

KINDS = ["llama", "llama-tied", "llama-biased", "gemma2", "gpt2", "gpt2-untied", "mixtral"]


def saved(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **how: Any) -> Path:
    models.make(kind, dtype).save_pretrained(folder, **how)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=models.tokens()).logits
        return result


def streamed_in(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, StreamedLinear)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_answers_as_the_loaded_model(kind: str, quantize: str | None, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind)
    here = load_model(folder, device="cpu", quantize=quantize)
    there = load_model(folder, device="cpu", quantize=quantize, stream=True)
    assert torch.equal(logits(there), logits(here))
    linear = [name for name, m in here.named_modules() if isinstance(m, (nn.Linear, CodedLinear)) or "Conv1D" in str(m)]
    tied = "lm_head" if kind in ("llama-tied", "gemma2", "gpt2") else ""
    assert len(streamed_in(there)) >= 8
    assert set(streamed_in(there)) <= set(linear) - {tied}


def test_weights_stay_in_the_files(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path, "llama"), device="cpu", stream=True)
    held = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert held == {"model.embed_tokens.weight"}
    assert "lm_head" in streamed_in(model)


def adapter(folder: Path, base: Path, config: LoraConfig) -> Path:
    """Save an adapter with values that matter."""
    model = get_peft_model(load_model(base, device="cpu", dtype="fp32"), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 10)
    model.save_pretrained(folder)
    return folder


CONFIGS = {
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "some": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], bias="lora_only"),
    "head": LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    "whole": LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["down_proj"]),
    "tokens": LoraConfig(r=4, target_modules=["v_proj"], trainable_token_indices=[3, 5]),
    "embedding": LoraConfig(r=4, target_modules=["v_proj", "embed_tokens"]),
}


def load(base: Path, folder: Path, *, stream: bool, quantize: str | None = None, dtype: Any = "fp32") -> PeftModel:
    model = load_model(base, device="cpu", dtype=dtype, quantize=quantize, stream=stream)
    return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_is_the_sum_rounded_once(
    config: LoraConfig, quantize: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", "llama-biased")
    folder = adapter(tmp_path / "adapter", base, config)
    at_once = quantized.dense(load(base, folder, stream=False, quantize=quantize).merge_and_unload()).to(dtype)
    plain = summed.merged(load(base, folder, stream=True, quantize=quantize), dtype=dtype)
    quantized.write(plain, tmp_path / "out")
    written: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for key, tensor in at_once.state_dict().items():
        assert torch.equal(written.state_dict()[key], tensor), key


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-untied", "llama-tied", "mixtral"])
def test_other_models_are_written_as_transformers_writes_them(kind: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", kind)
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules="all-linear"))
    load(base, folder, stream=False).merge_and_unload().save_pretrained(tmp_path / "at once")
    quantized.write(summed.merged(load(base, folder, stream=True), dtype=torch.float32), tmp_path / "out")
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("at once", "out"))
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key
    settings = [(tmp_path / name / "config.json").read_text() for name in ("at once", "out")]
    assert settings[0] == settings[1]


def test_unchanged_codes_keep_their_bytes_when_merged_into_codes(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj"]))
    quantized.write(load_model(base, device="cpu", dtype="bf16", quantize="nf4"), tmp_path / "plain codes")
    quantized.write(
        summed.merged(load(base, folder, stream=True, quantize="nf4", dtype="bf16"), dtype=None), tmp_path / "out"
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain codes", "out"))
    assert before.keys() == after.keys()
    differ = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert differ
    assert all("q_proj" in key for key in differ)
    (folder / "decal.json").unlink()  # it names the 16-bit weights
    again = load_model(tmp_path / "plain codes", device="cpu", dtype="bf16")  # codes whose originals are gone
    from_codes = summed.merged(PeftModel.from_pretrained(again, folder).eval(), dtype=None)
    quantized.write(from_codes, tmp_path / "from codes")
    assert all(
        torch.equal(tensor, after[key])
        for key, tensor in load_file(tmp_path / "from codes" / "model.safetensors").items()
    )


def test_what_is_summed_is_shown_with_what_writing_does(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    folder = adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj"]))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(W: Tensor, change: Tensor, rounded: summed.Rounded) -> None:
        seen.append((W.clone(), change, rounded(W + change)))

    model = load(base, folder, stream=True)
    changes = [layer.get_delta_weight("default") for name, layer in _adapted(model)]
    logits(summed.merged(model, dtype=torch.bfloat16, observe=observe))
    read = Checkpoint(base)
    for i, (W, change, written) in enumerate(seen):
        assert torch.equal(W, read.tensor(f"model.layers.{i}.self_attn.q_proj.weight").float())
        assert torch.equal(change, changes[i])
        assert torch.equal(written, (W + change).bfloat16())
    assert len(seen) == 2


def _adapted(model: PeftModel) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "get_delta_weight")]
