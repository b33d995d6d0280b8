"""The section's numbers: those that are right, and the right ones in place of those that are wrong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from decal import LoraConfig, PeftModel, get_peft_model

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    tie_word_embeddings=False,
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
MODELS = {"Llama-2-7B": LLAMA_2_7B, "Llama-3-8B": LLAMA_3_8B, "SmolLM2-135M": SMOLLM2_135M}
BASES = {"Llama-2-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248, "SmolLM2-135M": 134_515_008}
QV, ATTENTION, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear"
RANKS = (4, 8, 16, 32, 64)
TRAINABLE: dict[tuple[str, str], tuple[int, ...]] = {
    ("SmolLM2-135M", "q,v"): (230_400, 460_800, 921_600, 1_843_200, 3_686_400),
    ("SmolLM2-135M", "all"): (1_221_120, 2_442_240, 4_884_480, 9_768_960, 19_537_920),
    ("Llama-2-7B", "q,v"): (2_097_152, 4_194_304, 8_388_608, 16_777_216, 33_554_432),
    ("Llama-2-7B", "q,k,v,o"): (4_194_304, 8_388_608, 16_777_216, 33_554_432, 67_108_864),
    ("Llama-2-7B", "all"): (9_994_240, 19_988_480, 39_976_960, 79_953_920, 159_907_840),
    ("Llama-3-8B", "q,v"): (1_703_936, 3_407_872, 6_815_744, 13_631_488, 27_262_976),
    ("Llama-3-8B", "all"): (10_485_760, 20_971_520, 41_943_040, 83_886_080, 167_772_160),
}
NAMES: dict[str, list[str] | str] = {"q,v": QV, "q,k,v,o": ATTENTION, "all": ALL}


@pytest.fixture(scope="module")
def bases() -> dict[str, nn.Module]:
    """The three shapes on the meta device: no weight takes memory."""
    with torch.device("meta"):
        models = {name: AutoModelForCausalLM.from_config(config) for name, config in MODELS.items()}
    for model in models.values():
        model.tie_weights()
    return models


def adapted(base: nn.Module, rank: int, targets: list[str] | str) -> PeftModel:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    with torch.device("meta"):
        return get_peft_model(base, config)


@pytest.mark.parametrize(("model", "targets"), TRAINABLE, ids=lambda value: str(value))
def test_trainable_counts(bases: dict[str, nn.Module], model: str, targets: str) -> None:
    for rank, expected in zip(RANKS, TRAINABLE[model, targets], strict=True):
        wrapped = adapted(bases[model], rank, NAMES[targets])
        assert wrapped.get_nb_trainable_parameters() == (expected, BASES[model] + expected)
        bases[model] = wrapped.unload()


@pytest.mark.parametrize(
    ("model", "targets", "rank", "percent"),
    [
        ("SmolLM2-135M", "q,v", 4, 0.171),
        ("SmolLM2-135M", "q,v", 16, 0.680),  # the section: "fewer than 0.1%"
        ("SmolLM2-135M", "q,v", 64, 2.667),
        ("SmolLM2-135M", "all", 16, 3.504),
        ("Llama-2-7B", "q,v", 16, 0.124),  # the section: 4.2M (0.06%), which is r=8
        ("Llama-2-7B", "q,v", 64, 0.495),
        ("Llama-2-7B", "all", 16, 0.590),  # the section: 13,631,488, of a total that no Llama has
        ("Llama-3-8B", "all", 16, 0.520),
    ],
)
def test_shares(model: str, targets: str, rank: int, percent: float) -> None:
    trainable = TRAINABLE[model, targets][RANKS.index(rank)]
    assert round(100 * trainable / (BASES[model] + trainable), 3) == percent


def test_the_printed_13_631_488_is_attention_alone_on_llama_3(bases: dict[str, nn.Module]) -> None:
    base = copy.deepcopy(bases["Llama-3-8B"])
    assert adapted(base, 16, ATTENTION).get_nb_trainable_parameters()[0] == 13_631_488


def test_one_matrix() -> None:
    """B is (d, r), A is (r, k): r (d + k) in place of d k."""
    with torch.device("meta"):
        model = get_peft_model(nn.Sequential(nn.Linear(4096, 4096, bias=False)), LoraConfig(r=16, target_modules=["0"]))
    layer = model.get_base_model()[0]
    assert layer.lora_A["default"].weight.shape == (16, 4096)
    assert layer.lora_B["default"].weight.shape == (4096, 16)
    assert model.get_nb_trainable_parameters()[0] == 131_072 == 16 * (4096 + 4096)
    assert 16_777_216 / 131_072 == 128
    assert 16_777_216 / (8 * (4096 + 4096)) == 256  # the section's figure says 128 for r=8


def test_parameters_grow_linearly_with_the_rank() -> None:
    """The section's tip says quadratically; its own table and hint say linearly."""
    for counts in TRAINABLE.values():
        assert {count // rank for count, rank in zip(counts, RANKS, strict=True)} == {counts[0] // 4}


def test_all_linear_costs_more_than_the_section_says() -> None:
    """It says about 3 times q,v, and that the MLP doubles attention's."""
    r16 = RANKS.index(16)
    ratios = {name: TRAINABLE[name, "all"][r16] / TRAINABLE[name, "q,v"][r16] for name in MODELS}
    assert {name: round(ratio, 1) for name, ratio in ratios.items()} == {
        "Llama-2-7B": 4.8,
        "Llama-3-8B": 6.2,
        "SmolLM2-135M": 5.3,
    }
    assert round(TRAINABLE["Llama-2-7B", "all"][r16] / TRAINABLE["Llama-2-7B", "q,k,v,o"][r16], 1) == 2.4


def test_adapter_file_sizes() -> None:
    """33 MB for 7B at r=16 on q,v is right, in fp32; SmolLM2's is 3.7 MB, not 524 KB and not "a few KB"."""
    r16 = RANKS.index(16)
    assert round(4 * TRAINABLE["Llama-2-7B", "q,v"][r16] / 1e6, 1) == 33.6
    assert round(4 * TRAINABLE["SmolLM2-135M", "q,v"][r16] / 1e6, 2) == 3.69
    assert round(2 * TRAINABLE["Llama-2-7B", "all"][r16] / 1e6) == 80


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scale"),
    [(16, 32, False, 2.0), (8, 16, False, 2.0), (16, 16, False, 1.0), (16, 32, True, 8.0), (64, 16, True, 2.0)],
)
def test_scales(rank: int, alpha: int, rslora: bool, scale: float) -> None:
    """Doubling r at the same alpha halves alpha / r; the section's rsLoRA recipe scales by 8, not by 2."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], use_rslora=rslora)
    layer = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).get_base_model()[0]
    assert layer.scaling["default"] == scale == alpha / (math.sqrt(rank) if rslora else rank)


def test_the_start_is_the_base_and_dropout_acts_on_the_change_alone() -> None:
    base = nn.Linear(64, 64)
    config = LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5)
    model = get_peft_model(nn.Sequential(base), config).train()
    x = torch.randn(8, 64)
    expected = nn.functional.linear(x, base.weight, base.bias)
    torch.testing.assert_close(model(x), expected)  # B = 0, and the base's own input is never dropped
    with torch.no_grad():
        model.get_base_model()[0].lora_B["default"].weight.normal_()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
