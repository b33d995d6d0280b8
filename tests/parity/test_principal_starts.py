"""PiSSA and OLoRA: PEFT's start and PEFT's training, on an untouched base, saved as plain LoRA that anyone loads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from decal.api import get_peft_model
from decal.errors import AdapterError, Unsupported
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3, "up_proj": 7}},
    "patterns and rslora": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
}
TARGETS = ["q_proj", "v_proj", "up_proj", "lm_head"]
every_start = pytest.mark.parametrize("start", ["pissa", "olora"])
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def fresh(start: str, options: dict[str, Any]) -> PeftModel:
    return get_peft_model(models.make("llama"), LoraConfig(target_modules=TARGETS, init_lora_weights=start, **options))


@every_start
@every_option
def test_the_model_starts_as_the_base_whose_weights_stay(start: str, options: dict[str, Any]) -> None:
    model, base = fresh(start, options).eval(), models.make("llama")
    ids = models.tokens()
    torch.testing.assert_close(oracle.logits(model, ids), oracle.logits(base, ids), **oracle.FP64)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, base.model.layers[0].mlp.up_proj.weight)
    adapter = layer.adapters["default"]
    A, B, s = adapter.A.detach(), adapter.B.detach(), adapter.scale
    W, r = layer.weight.detach(), adapter.rank
    if start == "pissa":  # s·B·A is W's best part of rank r (Eckart-Young): what is left has the other singular values
        values = torch.linalg.svdvals(W)
        torch.testing.assert_close(torch.linalg.svdvals(s * B @ A)[:r], values[:r], **oracle.FP64)
        torch.testing.assert_close(torch.linalg.svdvals(W - s * B @ A)[: len(values) - r], values[r:], **oracle.FP64)
    else:  # W = QR: B's columns are orthonormal, and A is what they see of W
        torch.testing.assert_close(B.T @ B, torch.eye(r, dtype=B.dtype), **oracle.FP64)
        torch.testing.assert_close(A, B.T @ W, **oracle.FP64)


@every_start
def test_the_start_and_one_step_equal_pefts(start: str) -> None:
    """The same factors (up to the sign of each singular pair), hence the same gradients and the same step."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": start}
    theirs = oracle.theirs_of(models.make("llama", torch.float32), options).eval()
    ours = get_peft_model(models.make("llama", torch.float32), LoraConfig(**options)).eval()
    ids = models.tokens()
    for model in (ours, theirs):
        grads = oracle.gradients(model, ids)
        with torch.no_grad():
            for name, p in oracle.trained(model).items():
                p -= 1e-3 * grads[name]
    # fp32 factorisations (the model's norms, too): about 1e-6 of logits of size 10
    torch.testing.assert_close(oracle.logits(ours, ids), oracle.logits(theirs, ids), rtol=0, atol=5e-5)


@every_start
@every_option
def test_saved_as_plain_lora_of_twice_the_rank(start: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = fresh(start, options).eval()
    with torch.no_grad():
        for p in oracle.trained(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype), alpha=0.1)
    ids = models.tokens()
    expected = oracle.logits(model, ids)
    model.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.init_lora_weights, config.r) == (True, 8)
    by_peft = peft.PeftModel.from_pretrained(models.make("llama"), tmp_path)
    by_decal = PeftModel.from_pretrained(models.make("llama"), tmp_path)
    merged = model.merge_and_unload()
    for reader in (by_peft, by_decal, merged):
        torch.testing.assert_close(oracle.logits(reader, ids), expected, **oracle.FP64)
    scale = by_peft.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert math.isclose(scale, by_decal.get_base_model().model.layers[0].self_attn.q_proj.scaling["default"])


def test_a_foreign_file_that_needs_a_changed_base_is_refused(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "init_lora_weights": "olora"}
    oracle.theirs_of(models.make("llama", torch.float32), options).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="olora"):
        PeftModel.from_pretrained(models.make("llama"), tmp_path)


@every_start
@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_where_it_has_no_meaning_it_is_refused(start: str, options: dict[str, Any]) -> None:
    plain = models.make("llama")
    settings = {"target_modules": ["q_proj"], **options, "init_lora_weights": start}
    with pytest.raises(Unsupported):
        get_peft_model(plain, LoraConfig(**settings))
    assert type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear
