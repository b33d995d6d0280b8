"""Models in codes: against bitsandbytes through transformers, through files both ways, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import decal
from decal.api import get_peft_model
from decal.bundled import MODEL_DIR
from decal.errors import AdapterError, ConfigError, DecalError, Unsupported
from decal.files import sealed
from decal.layers import adapted
from decal.layers.coded import CodedLinear
from decal.layers.int8_linear import Int8Linear
from decal.layers.nf4_linear import NF4Linear
from decal.model import quantized
from decal.model.load import load_model
from decal.spec import LoraConfig, QuantConfig
from tests import models
from tests.integration import tiny

FORMATS = [
    QuantConfig(format=kind, double_quant=nested)  # type: ignore[arg-type]  # both are known kinds
    for kind in ("nf4", "fp4")
    for nested in (True, False)
]
IDS = torch.tensor([[5, 9, 14, 3, 22, 7, 30, 12]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny.save_model(path)
    return path


def logits(model: Any) -> Tensor:
    """Logits as in training: bitsandbytes' inference on this kind of CPU computes in bf16."""
    model.train()
    result: Tensor = model(input_ids=IDS).logits.detach()
    model.eval()
    return result


def theirs(folder: Path, settings: QuantConfig | None = None) -> Any:
    """Return the model as transformers + bitsandbytes load it."""
    pytest.importorskip("bitsandbytes")
    extra: dict[str, Any] = {}
    if settings is not None:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.format,
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **extra)


@pytest.mark.parametrize("settings", FORMATS, ids=lambda s: f"{s.format}-{s.double_quant}")
def test_equal_to_bitsandbytes_quantised_here_there_and_through_files(settings: QuantConfig, tmp_path: Path) -> None:
    folder = MODEL_DIR  # rows of whole blocks: with others bitsandbytes' AVX-512 code decodes wrongly (test_nf4.py)
    oracle = theirs(folder, settings)
    oracle.save_pretrained(tmp_path / "theirs")
    expected = logits(oracle)
    ours = load_model(folder, dtype="fp32", device="cpu", quantize=settings)
    from_theirs = load_model(tmp_path / "theirs", dtype="fp32", device="cpu")
    quantized.write(ours, tmp_path / "ours")
    from_ours = theirs(tmp_path / "ours")
    adopted = theirs(tmp_path / "theirs")
    assert quantized.adopt(adopted) == sum(isinstance(m, CodedLinear) for m in ours.modules()) > 0
    for model in (ours, from_theirs, from_ours, adopted):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)  # fp32, the same operations
    written, original = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original if "quant_state" not in key)


def test_bitsandbytes_configuration_means_the_same(folder: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    one = load_model(folder, dtype="fp32", device="cpu", quantization_config=config)
    two = load_model(folder, dtype="fp32", device="cpu", quantize="nf4", double_quant=True)
    assert torch.equal(logits(one), logits(two))
    with pytest.raises(Unsupported, match="only 4-bit"):
        load_model(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_get_peft_model_takes_a_model_that_bitsandbytes_quantised(folder: Path) -> None:
    model = get_peft_model(theirs(folder, FORMATS[0]), LoraConfig(r=4, target_modules="all-linear"))
    assert not any(type(m).__name__ == "Linear4bit" for m in model.modules())
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8"])
def test_embeddings_head_and_norms_stay_and_parameters_count_as_weights(quantize: str, folder: Path) -> None:
    plain, coded = load_model(folder, device="cpu"), load_model(folder, device="cpu", quantize=quantize)
    assert type(coded.get_submodule("lm_head")) is type(plain.get_submodule("lm_head"))
    layers = [m for m in coded.modules() if isinstance(m, CodedLinear)]
    assert all(isinstance(m, Int8Linear if quantize == "int8" else NF4Linear) for m in layers)
    config = LoraConfig(r=4, target_modules="all-linear")
    assert (
        get_peft_model(coded, config).get_nb_trainable_parameters()
        == get_peft_model(plain, config).get_nb_trainable_parameters()
    )


@pytest.mark.parametrize("way", ["merged", "side"])
def test_gradients_are_those_of_the_decoded_weights(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", 1 if way == "merged" else 10**9)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    coded = load_model(folder, dtype="fp32", device="cpu", quantize="nf4")
    dense = quantized.dense(load_model(folder, dtype="fp32", device="cpu", quantize="nf4"))
    gradients = []
    for base in (coded, dense):
        model = get_peft_model(base, config, generator=torch.Generator().manual_seed(0))
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6)  # fp32, another order of sums


def test_no_dense_copy_is_kept_for_backward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapted.MERGE_ROWS, "cpu", 1)
    model = get_peft_model(load_model(folder, device="cpu", quantize="nf4"), LoraConfig(target_modules="all-linear"))
    shapes = {(m.out_features, m.in_features) for m in model.modules() if isinstance(m, CodedLinear)}
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS)
    assert kept
    assert not shapes & set(kept)


def test_merging_puts_a_dense_layer_there_and_unmerging_the_codes_back(folder: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(load_model(folder, dtype="fp32", device="cpu", quantize="nf4"), config).eval()
    before, codes = logits(model), {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)  # one fp32 sum in place of two
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, codes[n]) for n, p in model.named_parameters() if n in codes)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)


def test_prepare_for_training_leaves_the_embeddings_alone(folder: Path) -> None:
    model = decal.prepare_model_for_kbit_training(load_model(folder, dtype="bf16", device="cpu", quantize="nf4"))
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert model.is_gradient_checkpointing
    with pytest.raises(Unsupported, match="reentrant"):
        decal.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})


def test_gpt2_is_coded_as_out_by_in(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(**models.GPT2_SIZES)).save_pretrained(tmp_path)
    coded = load_model(tmp_path, dtype="fp32", device="cpu", quantize="int8")
    dense = load_model(tmp_path, dtype="fp32", device="cpu")
    expected = logits(dense)
    off = float((logits(coded) - expected).norm() / expected.norm())
    assert off < 0.02  # int8 rounds each weight by at most 0.4% of its row's largest; a transposed weight: over 1


# What is refused.


def damage(source: Path, target: Path, change: Any) -> Path:
    """Copy a model folder with its tensors changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_nan_in_a_weight_is_named(folder: Path, tmp_path: Path) -> None:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 3] = float("nan")

    bad = damage(folder, tmp_path / "bad", poison)
    with pytest.raises(DecalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds Inf or NaN"):
        load_model(bad, device="cpu", quantize="nf4")


@pytest.fixture
def coded_folder(folder: Path, tmp_path: Path) -> Path:
    quantized.write(load_model(folder, dtype="fp32", device="cpu", quantize="nf4"), tmp_path / "coded")
    return tmp_path / "coded"


NAME = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def edit_state(tensors: dict[str, Tensor], **facts: Any) -> None:
    """Change what a weight's state says."""
    state = json.loads(bytes(tensors[STATE].tolist())) | facts
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1]}), "tables or blocks"),
        (lambda t: t.pop(f"{NAME}.nested_absmax"), "tables or blocks"),
        (lambda t: t.update({f"{NAME}.quant_map": t[f"{NAME}.quant_map"] * 2}), "tables or blocks"),
        (
            lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
            "truncated or of another layout",
        ),
        (lambda t: t.update({NAME: t[NAME][:-4]}), "truncated or of another layout"),
        (lambda t: t.pop(NAME), "are missing"),
        (lambda t: edit_state(t, blocksize=0), "another layout .*blocks of 0"),
        (lambda t: edit_state(t, dtype="nn"), "another layout .*dtype nn"),
        (lambda t: edit_state(t, nested_offset=float("nan")), "not finite"),
    ],
    ids=["scales", "nested scales", "levels", "state", "codes", "no codes", "block", "dtype", "offset"],
)
def test_a_truncated_state_is_refused(change: Any, message: str, coded_folder: Path, tmp_path: Path) -> None:
    bad = damage(coded_folder, tmp_path / "bad", change)
    with pytest.raises(DecalError, match=message):
        load_model(bad, device="cpu")


def test_a_checkpoint_is_not_quantised_twice(coded_folder: Path) -> None:
    with pytest.raises(DecalError, match="quantised already"):
        load_model(coded_folder, device="cpu", quantize="nf4")


def test_other_methods_are_named(folder: Path, tmp_path: Path) -> None:
    other = damage(folder, tmp_path / "gptq", lambda tensors: None)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="quantised with gptq"):
        load_model(other, device="cpu")


@pytest.mark.parametrize("block", [16, 48, 8192])
def test_other_block_sizes_are_refused(block: int) -> None:
    with pytest.raises(ConfigError, match="block"):
        QuantConfig(block=block)  # type: ignore[arg-type]  # what a user may type


def test_too_much_left_wide_is_refused(folder: Path) -> None:
    with pytest.raises(Unsupported, match="would stay wide"):
        load_model(folder, device="cpu", quantize=QuantConfig(skip=("mlp", "down_proj", "up_proj", "gate_proj")))
    settings = QuantConfig(skip=("down_proj",), allow_dense=True)
    model = load_model(folder, device="cpu", quantize=settings)
    assert not isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), CodedLinear)


def test_a_damaged_seal_is_refused(tmp_path: Path) -> None:
    (tmp_path / sealed.SEAL).write_text("{")
    with pytest.raises(AdapterError, match="seal is damaged"):
        sealed.read(tmp_path)


def test_a_model_merged_in_python_computes_by_default(folder: Path, tmp_path: Path) -> None:
    """Loaded in 16 bits it computes in fp32 on a CPU: so must the dense layers that a merge puts there."""
    tiny.save_model(tmp_path, torch.bfloat16)
    model = get_peft_model(load_model(tmp_path, device="cpu", quantize="nf4"), LoraConfig(target_modules=["q_proj"]))
    before = model(input_ids=IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=0.05)  # q_proj is rounded to bf16
    assert model.unload()(input_ids=IDS).logits.shape == before.shape


def test_a_prepared_16_bit_model_computes_in_either_width(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, torch.bfloat16)
    for quantize in ("nf4", None):
        model = load_model(tmp_path, dtype="bf16", device="cpu", quantize=quantize)
        model = get_peft_model(decal.prepare_model_for_kbit_training(model), LoraConfig(target_modules="all-linear"))
        assert model.train()(input_ids=IDS, labels=IDS).loss.isfinite()


def test_a_classifier_head_stays_wide(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    model = load_model(tmp_path, device="cpu", quantize="nf4", task=decal.TaskType.SEQ_CLS, num_labels=3)
    assert type(model.get_submodule("score")) is torch.nn.Linear
    assert model(input_ids=IDS).logits.shape == (1, 3)


def test_adapters_are_sealed_with_the_base_and_refused_on_another(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(folder, device="cpu", quantize="nf4"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    seal = sealed.read(tmp_path / "adapter")
    assert seal.quantize == QuantConfig()
    again = decal.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert any(isinstance(m, NF4Linear) for m in again.modules())
    other: Any = load_model(folder, device="cpu")
    with torch.no_grad():
        other.lm_head.weight[-1] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="trained on another base"):
        decal.PeftModel.from_pretrained(load_model(tmp_path / "other", device="cpu"), tmp_path / "adapter")


def test_save_pretrained_writes_what_everyone_reads(folder: Path, tmp_path: Path) -> None:
    model: Any = load_model(folder, device="cpu", quantize="nf4")
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_model(tmp_path / "saved", device="cpu")), logits(model), rtol=0, atol=0)
    half = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).merge_and_unload()
    half.save_pretrained(tmp_path / "half")  # q_proj dense, the others in codes
    torch.testing.assert_close(logits(load_model(tmp_path / "half", device="cpu")), logits(half), rtol=0, atol=1e-5)
    with pytest.raises(Unsupported, match="saved whole"):
        model.save_pretrained(tmp_path / "odd", variant="fp16")
    with pytest.raises(Unsupported, match="common file layout"):
        load_model(folder, device="cpu", quantize="int8").save_pretrained(tmp_path / "int8")  # type: ignore[operator]
    assert not (tmp_path / "int8").exists()
