"""An output head in codes: loaded, used, refused, and through files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import decal
from decal.api import get_peft_model
from decal.cli.quantize import show_layers
from decal.data.batch import Batch
from decal.errors import ConfigError, DecalError, Unsupported
from decal.layers.coded import CodedLinear
from decal.layers.int8_linear import Int8Linear
from decal.layers.nf4_linear import NF4Linear
from decal.model import foreign, quantized
from decal.model.load import load_model
from decal.model.random import random_model
from decal.ops import slabs
from decal.recipes import quantize as recipe
from decal.spec import LoraConfig, QuantConfig, RunConfig, TaskType
from decal.training import head, losses
from tests import models

IDS = models.tokens()
BATCH = Batch(input_ids=IDS, labels=IDS, position_ids=None)
ALL = LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "ROWS", 20)  # of a vocabulary of 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("base"))


def saved(kind: str, folder: Path) -> Path:
    models.make(kind, torch.float32).save_pretrained(folder)
    return folder


def settings(head: str, **others: Any) -> QuantConfig:
    """Return settings under which a slab may begin at any second row."""
    return QuantConfig(**{"head": head, "double_quant": False, **others})


def load(folder: Path, head: str = "nf4", **others: Any) -> Any:
    return load_model(folder, device="cpu", quantize=settings(head, **others))


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits.detach()
    return found


@pytest.mark.parametrize(("form", "kind"), [("nf4", NF4Linear), ("int8", Int8Linear)])
def test_it_holds_the_bytes_of_the_wide_head_coded(form: str, kind: type[CodedLinear], folder: Path) -> None:
    coded, wide = load(folder, form), load(folder, "wide")
    layer: Any = coded.lm_head
    assert type(layer) is kind
    assert type(wide.lm_head) is nn.Linear
    codes, scales = layer.encode(wide.lm_head.weight.detach(), "lm_head")
    assert torch.equal(layer.weight, codes)
    assert torch.equal(layer.scales, scales)
    assert all(torch.equal(p, wide.get_parameter(n)) for n, p in coded.named_parameters() if "lm_head" not in n)


@pytest.mark.parametrize("kind", ["llama", "llama-biased", "gpt2-untied", "mixtral"])
def test_logits_and_loss_are_those_of_the_decoded_head(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    allowed = {"allow_dense": True}
    coded, dense = load(folder, **allowed), load(folder, **allowed)
    dense.set_output_embeddings(quantized.dense(nn.Sequential(dense.get_output_embeddings()))[0])
    torch.testing.assert_close(logits(coded), logits(dense), rtol=1e-5, atol=1e-6)  # fp32, another order of sums
    assert head.why_not_chunked(coded) is None
    with torch.no_grad():
        ours, theirs = (losses.sft(m, pytest.fail)(m, BATCH)[0] for m in (coded, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_it_is_told_beside_the_layers(folder: Path) -> None:
    model = get_peft_model(load(folder, "int8"), ALL)
    (line,) = quantized.storage(model)
    assert line.startswith("14 layers stored in nf4, the output head in int8, ")
    assert line.endswith("in 16 or 32 bits stay model.embed_tokens")


def test_it_comes_out_of_the_same_weights_at_random(folder: Path) -> None:
    found = {
        form: random_model(folder, device=torch.device("cpu"), dtype=torch.float32, quantize=settings(form))
        for form in ("wide", "nf4")
    }
    layer: Any = found["nf4"].lm_head
    wide: Any = found["wide"].lm_head
    assert layer.in_slabs
    assert torch.equal(layer.weight, layer.encode(wide.weight, "lm_head")[0])


def test_an_adapter_remembers_it(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    get_peft_model(load(folder), ALL).save_pretrained(tmp_path / "adapter")
    again = decal.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again.get_base_model().lm_head, NF4Linear)
    decal.PeftModel.from_pretrained(load(folder, "wide"), tmp_path / "adapter")
    assert "stored in nf4, its output head in nf4, and this one is stored in nf4: it will answer" in caplog.text


# Files.


def test_it_is_written_and_read_in_the_common_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**models.SIZES, "hidden_size": 64}  # rows of whole blocks: bitsandbytes' AVX-512 code needs them
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    source.save_pretrained(tmp_path / "source")
    coded = load(tmp_path / "source", double_quant=True)
    quantized.write(coded, tmp_path / "coded")
    again: Any = load_model(tmp_path / "coded", device="cpu")
    assert again.lm_head.in_slabs
    assert torch.equal(logits(again), logits(coded))
    pytest.importorskip("bitsandbytes")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "coded", device_map={"": "cpu"})
    assert type(theirs.lm_head).__name__ == "Linear4bit"
    theirs.train()  # its inference on this kind of CPU computes in bf16
    torch.testing.assert_close(logits(theirs), logits(coded), rtol=0, atol=1e-5)  # fp32, the same operations


@pytest.mark.parametrize(("form", "of_head"), [("fp4", "nf4"), ("nf4", "int8")])
def test_two_formats_have_no_common_layout(form: str, of_head: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"one 4-bit format.*format {form}, head {of_head}"):
        recipe.quantize(str(folder), tmp_path / "out", settings(of_head, format=form))
    with pytest.raises(Unsupported, match="common file layout"):
        quantized.write(load(folder, of_head, format=form), tmp_path)


@pytest.mark.parametrize(("form", "least", "most"), [("nf4", 0.05, 0.15), ("int8", 0.002, 0.015)])
def test_its_error_is_measured_with_the_others(
    form: str, least: float, most: float, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = recipe.quantize(str(folder), None, settings(form))
    found = {layer.name: layer.error for layer in result.layers}
    assert least < found["lm_head"] < most  # on normal values NF4 is off by 9 to 10%, int8 by under 1%
    assert result.bits == pytest.approx(result.bits_single)  # these settings have fp32 scales
    show_layers(result)
    assert "levels" in capsys.readouterr().out  # of the layers that have such


# What is refused.


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2"])
def test_a_tied_head_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="is its embedding table, which stays wide"):
        load(saved(kind, tmp_path))


def test_a_model_without_one_is_refused(folder: Path) -> None:
    with pytest.raises(Unsupported, match="no linear output head"):
        load_model(folder, device="cpu", quantize=settings("nf4"), task=TaskType.SEQ_CLS, num_labels=2)


def test_one_that_is_to_be_skipped_is_refused(folder: Path) -> None:
    with pytest.raises(Unsupported, match="skip names the output head 'lm_head'"):
        load(folder, skip=("lm_head",))


@pytest.mark.parametrize(
    "changes",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
def test_it_is_neither_adapted_nor_trained(changes: dict[str, Any], folder: Path) -> None:
    model = load(folder)
    with pytest.raises(Unsupported, match=r"reaches the output head, which is stored in codes .*got: lm_head"):
        get_peft_model(model, LoraConfig(r=4, **changes))
    assert isinstance(model.lm_head, NF4Linear)


def test_a_loss_that_is_not_over_its_logits_alone_is_refused(tmp_path: Path) -> None:
    config = models.make("gemma2", torch.float32).config
    config.tie_word_embeddings = False
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(ConfigError, match=r"quantize.head needs the loss .*its logits are not its head's output"):
        losses.sft(model, pytest.fail)


def test_trl_is_not_let_at_the_codes(folder: Path) -> None:
    with pytest.raises(Unsupported, match="this one is stored in codes"):
        foreign.refuse_fused_head(load(folder))


def test_other_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantize\.head"):
        RunConfig(model="m", data={"path": "d"}, quantize={"head": "fp8"})
    with pytest.raises(DecalError, match="full fine-tuning"):
        RunConfig(model="m", data={"path": "d"}, quantize={"head": "nf4"}, train={"method": "full"})
