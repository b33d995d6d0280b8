"""Models with random weights, made from a configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from decal.layers.nf4_linear import NF4Linear
from decal.model.load import load_model
from decal.model.random import random_model
from decal.spec import QuantConfig
from tests import models

CPU = torch.device("cpu")


def config_of(kind: str, folder: Path) -> Path:
    """Write the configuration of one of the tiny models, without weights."""
    models.make(kind).config.save_pretrained(folder)
    return folder


def made(folder: Path, **settings: Any) -> Any:
    return random_model(folder, device=CPU, dtype=torch.float32, **settings)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "llama-biased", "qwen2", "gemma2", "gpt2", "mixtral"])
def test_computes_as_a_model_with_the_same_weights(kind: str, tmp_path: Path) -> None:
    model = made(config_of(kind, tmp_path))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    plain: Any = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    plain.load_state_dict(model.state_dict())  # buffers that no file holds, such as rotary tables, are its own
    ids = models.tokens()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)


def test_codes_are_those_of_the_dense_weights(tmp_path: Path) -> None:
    dense = made(config_of("llama", tmp_path / "config"))
    coded = made(tmp_path / "config", quantize=QuantConfig(format="nf4"))
    dense.save_pretrained(tmp_path / "dense")
    expected: Any = load_model(tmp_path / "dense", quantize="nf4")
    assert sum(isinstance(m, NF4Linear) for m in coded.modules()) == 14
    ids = models.tokens()
    torch.testing.assert_close(coded(ids).logits, expected(ids).logits, rtol=0, atol=0)


def test_a_seed_is_one_model_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    folder = config_of("llama", tmp_path)
    before = torch.get_rng_state()
    first, again, other = made(folder), made(folder), made(folder, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
