"""Experts in codes: against the same codes decoded, against linear layers, in memory, and what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from decal.api import get_peft_model
from decal.errors import ConfigError, DecalError, Unsupported
from decal.layers.coded import CodedLinear
from decal.layers.coded_experts import CodedExperts
from decal.layers.nf4_linear import NF4Linear
from decal.model import experts, quantized, quantizer
from decal.model.load import load_model, meta_model
from decal.recipes import merge, quantize
from decal.spec import LoraConfig, QuantConfig
from tests import models

IDS = models.tokens()
FEW: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {**FEW, "moe_intermediate_size": 24, "head_dim": 8},
    "Qwen2Moe": {**FEW, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": FEW,
    "DeepseekV3": DEEPSEEK,
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},  # matrices (in, out), with biases
}


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**models.SIZES, **settings})
    getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("Qwen3Moe", tmp_path_factory.mktemp("qwen3"), **FAMILIES["Qwen3Moe"])


def load(folder: Path, how: Any = "nf4", **settings: Any) -> Any:
    return load_model(folder, device="cpu", quantize=how, **{"dtype": "fp32", **settings})


def coded_in(model: nn.Module) -> dict[str, CodedExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, CodedExperts)}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_logits_are_those_of_the_decoded_weights(kind: str, how: str, tmp_path: Path) -> None:
    save(kind, tmp_path, **FAMILIES[kind])
    coded, dense = load(tmp_path, how), quantized.dense(load(tmp_path, how))
    found = coded_in(coded)
    assert len(found) == (2 if kind == "DeepseekV3" else 4)  # its first layer is dense
    assert not coded_in(dense)
    for name, layer in found.items():
        assert torch.equal(dense.get_parameter(name), layer.dense(torch.float32))
    # fp32; a transposed matrix is multiplied in another order of sums
    torch.testing.assert_close(logits(coded), logits(dense), rtol=0, atol=1e-5)
    dense.set_experts_implementation("grouped_mm")  # type: ignore[operator]  # all experts at once: another code
    torch.testing.assert_close(logits(coded), logits(dense), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [QuantConfig(), QuantConfig(format="fp4", double_quant=False)], ids=str)
def test_each_expert_is_coded_as_a_linear_layer_alone(settings: QuantConfig, folder: Path) -> None:
    coded, plain = load(folder, settings), load(folder, None)
    for name, layer in coded_in(coded).items():
        W = plain.get_parameter(name).detach()
        for i in range(layer.count):
            alone = quantized.room_for(nn.Linear(W.shape[2], W.shape[1], bias=False), None, settings)
            codes, scales = alone.encode(W[i], name)
            expert = layer.expert(i)
            assert torch.equal(expert.weight, codes)
            assert torch.equal(expert.scales, scales)


def test_state_is_frozen_bytes_and_parameters_count_as_weights(folder: Path) -> None:
    coded, plain = load(folder), load(folder, None)
    for name in coded_in(coded):
        for part in ("weight", "scales"):
            parameter = coded.get_parameter(f"{name}.{part}")
            assert (parameter.dtype, parameter.requires_grad, len(parameter)) == (torch.uint8, False, 4)
    assert 4.1 < quantized.bits_per_weight(coded) < 4.3  # 24 x 32 weights: offset, nested absmax and padding weigh more
    config = LoraConfig(r=4, target_modules="all-linear")
    adapted = get_peft_model(coded, config)
    assert adapted.get_nb_trainable_parameters() == get_peft_model(plain, config).get_nb_trainable_parameters()
    assert not any("experts" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_targets_find_the_same_layers_as_without_codes(tmp_path: Path) -> None:
    save("Qwen2Moe", tmp_path, **FAMILIES["Qwen2Moe"])
    found = []
    for how in ("nf4", None):
        model = get_peft_model(load(tmp_path, how), LoraConfig(r=2, target_modules=["down_proj"]))
        found.append([name for name, _ in model.named_parameters() if "lora_A" in name])
    assert found[0] == found[1]
    assert all("shared_expert" in name for name in found[0])


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of adapters on attention, of a router, and of the embeddings, which lie below every expert."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    adapted: Any = get_peft_model(model, config, generator=torch.Generator().manual_seed(0))
    for name in ("model.layers.0.mlp.gate.weight", "model.embed_tokens.weight"):
        model.get_parameter(name).requires_grad_(True)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_decoded_weights(folder: Path) -> None:
    ours, expected = gradients(load(folder)), gradients(quantized.dense(load(folder)))
    assert any("mlp.gate" in name for name in ours)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5)  # fp32, the same products


def kept_for_backward(model: Any) -> tuple[set[tuple[int, ...]], int]:
    """Return the shapes and the bytes of the distinct tensors that autograd keeps of one forward."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=IDS[:, :5], labels=IDS[:, :5]).loss  # 15 tokens: no activation has a matrix's shape
    del loss
    return {tuple(t.shape) for t in kept.values()}, sum(t.untyped_storage().nbytes() for t in kept.values())


def test_nothing_dense_is_kept_for_backward(folder: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    coded = load(folder)
    matrices = {layer.shape[1:] for layer in coded_in(coded).values()} | {
        layer.shape for layer in coded_in(coded).values()
    }
    weights = sum(layer.weights for layer in coded_in(coded).values())
    shapes, size = kept_for_backward(get_peft_model(coded, config))
    _, size_dense = kept_for_backward(get_peft_model(quantized.dense(load(folder)), config))
    assert not shapes & matrices
    assert size <= size_dense - 4 * weights  # the dense model's graph holds all of them, fp32


def test_one_parameter_is_wide_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load(folder, None)
    shapes = {tuple(W.shape) for n, W in plain.named_parameters() if "experts" in n}
    shapes |= {(24, 32), (32, 24)}  # as the file holds them: gate and up apart
    assert not shapes & {tuple(W.shape) for n, W in plain.named_parameters() if "experts" not in n}
    del plain

    def alive() -> int:
        """Return the bytes of experts that are wide now."""
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu"]
        storages = [t.untyped_storage() for t in tensors if t.is_floating_point() and tuple(t.shape) in shapes]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    seen: list[tuple[int, int]] = []
    real = CodedExperts.encode

    def spy(self: CodedExperts, W: Tensor, name: str) -> tuple[Tensor, Tensor]:
        seen.append((alive(), W.untyped_storage().nbytes()))
        return real(self, W, name)

    gc.collect()
    before = alive()  # of other tests
    monkeypatch.setattr(CodedExperts, "encode", spy)
    load(folder)
    assert len(seen) == 4
    assert all(now - before <= its_own for now, its_own in seen)


def test_a_merged_model_keeps_its_experts_and_is_written_as_it_came(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load(folder), config).eval()
    expected, found = logits(model), {n: m.dense(torch.float32) for n, m in coded_in(model.get_base_model()).items()}
    plain: Any = quantized.dense(model.merge_and_unload())
    assert all(torch.equal(plain.get_parameter(name), W) for name, W in found.items())
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, None)), expected, rtol=1e-4, atol=1e-4)  # one fp32 sum for two


def test_a_16_bit_checkpoint_computes_in_fp32_on_a_cpu(tmp_path: Path) -> None:
    save("Qwen3Moe", tmp_path, torch.bfloat16, **FAMILIES["Qwen3Moe"])
    assert logits(load(tmp_path, dtype=None)).dtype == logits(load(tmp_path, None, dtype=None)).dtype == torch.float32
    plain = quantized.dense(load(tmp_path, dtype=None))
    assert plain.get_parameter("model.layers.0.mlp.experts.down_proj").dtype == torch.bfloat16


def test_a_weight_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    save("GptOss", tmp_path, **FAMILIES["GptOss"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DecalError, match="lacks 1 of the model's weights"):
        load(tmp_path)


def test_the_report_has_one_line_for_all_experts_of_a_parameter(folder: Path) -> None:
    measured = quantize.quantize(str(folder), None, QuantConfig())
    by_name = {layer.name: layer for layer in measured.layers}
    for name, layer in coded_in(load(folder)).items():
        W = load(folder, None).get_parameter(name).detach()
        assert by_name[name].weights == layer.weights
        assert by_name[name].error == pytest.approx(float((W - layer.dense(torch.float32)).norm() / W.norm()), rel=1e-5)
        assert sum(by_name[name].levels) == pytest.approx(1)
    assert measured.bits_double <= measured.bits < 1.02 * measured.bits_double  # bytes between experts
    assert measured.wide == ("lm_head",)


# What is refused.


def test_experts_that_the_code_uses_otherwise_are_refused(tmp_path: Path) -> None:
    sizes = {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 1}
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**models.SIZES, **sizes)
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=r"would stay wide: model\.layers\.\d\.feed_forward\.experts"):
        load(tmp_path)
    kept = load(tmp_path, QuantConfig(allow_dense=True))
    assert not coded_in(kept)
    assert logits(kept).isfinite().all()


class Batched(nn.Module):
    """Experts of both kinds of use, and of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 8, 6))
        self.down = nn.Parameter(torch.zeros(4, 8, 6))
        self.both = nn.Parameter(torch.zeros(4, 8, 6))
        self.all = nn.Parameter(torch.zeros(4, 8, 6))

    def forward(self, x: Tensor, i: int) -> Tensor:
        y = F.linear(x, self.up[i]) @ self.down[i]
        y = F.linear(y, self.both[i]) @ self.both[i].T
        return torch.bmm(y[None].expand(4, -1, -1), self.all.transpose(1, 2))


def test_the_source_says_which_parameters_are_matrices_of_single_experts() -> None:
    assert experts.parameters(Batched()) == {"up": False, "down": True}


def test_skipped_experts_stay_wide_and_count(folder: Path) -> None:
    with pytest.raises(Unsupported, match="would stay wide"):
        load(folder, QuantConfig(skip=("experts",)))
    model = load(folder, QuantConfig(skip=("gate_up_proj",), allow_dense=True))
    assert {name.rpartition(".")[2] for name in coded_in(model)} == {"down_proj"}
    assert logits(model).isfinite().all()


def test_another_experts_implementation_is_refused_by_name(folder: Path) -> None:
    model = load(folder)
    model.set_experts_implementation("batched_mm")
    with pytest.raises(Unsupported, match="one at a time"):
        logits(model)
    matrix: Any = next(iter(coded_in(model).values()))[0]
    with pytest.raises(Unsupported, match="only be multiplied with"):
        torch.relu(matrix)


def test_a_nan_in_an_expert_is_named(folder: Path, tmp_path: Path) -> None:
    model = load(folder, None)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.down_proj")[2, 0, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(DecalError, match=r"layers\.1\.mlp\.experts\.down_proj\[2\] holds Inf or NaN"):
        load(tmp_path)


def test_no_common_file_layout(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no experts that are stored as 3-D"):
        quantized.write(load(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Unsupported, match="no experts that are stored as 3-D"):
        quantize.quantize(str(folder), tmp_path / "out", QuantConfig())
    stack = merge.Stack(base=str(folder), quantize=QuantConfig(), adapter="")
    tuned = get_peft_model(load(folder), LoraConfig(target_modules="all-linear"))
    assert merge.ways_for(tuned, stack, "auto") == ["16bit", "dequantized"]
    with pytest.raises(ConfigError, match="with experts"):
        merge.ways_for(tuned, stack, "nf4")
    assert not quantizer.planned_experts(meta_model(folder), QuantConfig(skip=("experts",), allow_dense=True))


def test_codes_of_single_experts_in_a_checkpoint_are_refused(folder: Path) -> None:
    stored: Any = {"model.layers.0.mlp.experts.0.gate_proj": None}
    with pytest.raises(Unsupported, match="codes of single experts"):
        quantizer.replace(meta_model(folder), quantizer.Quantization(stored=stored))


def test_coded_layers_are_what_they_were(folder: Path) -> None:
    """Linear layers beside the experts are coded, routers and norms stay."""
    model = load(folder)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), NF4Linear)
    assert not any(isinstance(m, CodedLinear) for n, m in model.named_modules() if "experts" in n)
    assert model.get_parameter("model.layers.0.mlp.gate.weight").dtype == torch.float32
