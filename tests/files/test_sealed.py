"""What differs from an adapter's seal is refused by name; what agrees loads, and computes as it was saved."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from decal import AutoPeftModelForCausalLM, LoraConfig, PeftModel, QuantConfig, get_peft_model, load_model
from decal.errors import AdapterError
from decal.files import checkpoint, sealed
from decal.model import sealing
from tests.integration import tiny

IDS = torch.tensor([[72, 101, 108, 108, 111, 33]])
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sealed adapter of rank 8, scale 2."""
    return save(base, tmp_path_factory.mktemp("good"))


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def save(base: Path, folder: Path, *, quantize: str | None = None, **settings: Any) -> Path:
    """Save an adapter whose factors are all random, so that it changes what the base says."""
    given: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16, "init_lora_weights": False}
    model = get_peft_model(load_model(base, device="cpu", quantize=quantize), LoraConfig(**{**given, **settings}))
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model.eval()(input_ids=IDS).logits
    return out


def config(**values: Any) -> Damage:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


def seal_text(change: Callable[[str], str]) -> Damage:
    def edit(folder: Path) -> None:
        file = folder / "decal.json"
        file.write_text(change(file.read_text()))

    return edit


def one_bit(folder: Path) -> None:
    """Flip the lowest bit of one value's last byte but three: a finite number, a little off."""
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(bytes(data))


def saved_over_by_peft(folder: Path) -> None:
    model = peft.PeftModel.from_pretrained(tiny.model(), folder)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(1)
    model.save_pretrained(folder)


DIFFERENT: dict[str, tuple[Damage, str]] = {
    "alpha": (config(lora_alpha=64), r"scale moved 2\.0 -> 8\.0 .*lora_alpha 16 -> 64 at model\.layers\.0"),
    "r with alpha fixed": (config(r=4), r"scale moved 2\.0 -> 4\.0 .*r 8 -> 4"),
    "r and alpha": (config(r=4, lora_alpha=8), r"lora_A.* has another shape.*was edited"),
    "rsLoRA": (config(use_rslora=True), r"scale moved 2\.0 -> 5\.657 .*use_rslora False -> True"),
    "alpha_pattern": (config(alpha_pattern={"v_proj": 32}), r"2\.0 -> 4\.0 .*alpha_pattern was edited.*v_proj"),
    "a bit of a tensor": (one_bit, r"holds other tensors .*adapter_model\.safetensors is damaged.*is sealed"),
    "PEFT saved over it": (saved_over_by_peft, "another program saved over it.*remove its decal.json"),
    "a seal cut short": (seal_text(lambda text: text[:700]), "seal is damaged, or was edited.*decal.json"),
    "no text in the seal": (seal_text(lambda text: ""), "seal is damaged"),
    "an edited seal": (seal_text(lambda text: text.replace(": 2.0", ": 3.0")), "seal is damaged, or was edited"),
    "a seal of another kind": (seal_text(lambda text: '{"version": "two"}'), "seal is damaged"),
    "a seal that is a list": (seal_text(lambda text: "[2]"), "seal is damaged"),
    "a newer seal": (
        seal_text(lambda text: '{"version": 3}'),
        "version 3, and this decal reads .* up to 2.*newer decal",
    ),
}


@pytest.mark.parametrize(("damage", "text"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_from_the_seal_is_named(base: Path, adapter: Path, damage: Damage, text: str) -> None:
    damage(adapter)
    plain = load_model(base, device="cpu")
    before = logits(plain)
    with pytest.raises(AdapterError, match=text):
        PeftModel.from_pretrained(plain, adapter)
    assert torch.equal(logits(plain), before)
    model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=text):
        model.load_adapter(adapter, "other")
    assert list(model.peft_config) == ["default"]


def other_weights(base: Path) -> None:
    tiny.save_model(base, seed=1)


def other_norm(base: Path) -> None:
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_weights, "was trained on another base.*where the adapter was trained on"),
        (other_norm, r"other settings: rms_norm_eps moved 1e-06 -> 0\.001.*config.json"),
    ],
)
@pytest.mark.parametrize("by_decal", [True, False])
def test_another_base_of_the_same_shape_is_refused_whoever_loaded_it(
    base: Path, good: Path, tmp_path: Path, change: Damage, text: str, by_decal: bool
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    change(other)
    load: Any = load_model if by_decal else transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(AdapterError, match=text):
        PeftModel.from_pretrained(load(other), good)


def test_settings_that_compute_nothing_may_differ(base: Path, good: Path) -> None:
    plain: Any = load_model(base, device="cpu")
    plain.config.use_cache = False
    plain.config.pad_token_id = 3
    plain.config.attention_dropout = 0.5
    PeftModel.from_pretrained(plain, good)


HEALTHY: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4": {"quantize": "nf4"},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "rsLoRA with OLoRA": {"init_lora_weights": "olora", "use_rslora": True},
    "a head": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("settings", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_adapter_comes_back_without_a_word(
    base: Path, tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    save(base, tmp_path, **settings)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records
    seal = sealed.read(tmp_path)
    assert seal.base_fingerprint == checkpoint.fingerprint(base)
    assert seal.scale is not None
    layers = sealing.scales(model, "default")
    said = seal.scale.layers
    assert [said.get(n, said.get(n.rpartition(".")[2])) for n in layers] == pytest.approx([*layers.values()], rel=1e-11)
    model.save_pretrained(tmp_path / "again")
    assert sealed.read(tmp_path / "again") == seal


def test_the_start_of_an_adapter_that_was_converted_is_told(base: Path, tmp_path: Path) -> None:
    assert sealed.read(save(base, tmp_path, init_lora_weights="pissa")).start == "pissa, saved as plain LoRA of rank 2r"
    assert sealed.read(save(base, tmp_path, init_lora_weights=True)).start == "true"


def test_each_of_several_adapters_has_its_own_seal(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(base, device="cpu"), LoraConfig(target_modules=["q_proj"], lora_alpha=16))
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"], lora_alpha=32))
    model.save_pretrained(tmp_path)
    scales = [sealed.read(folder).scale for folder in (tmp_path, tmp_path / "b")]
    assert [scale and scale.layers for scale in scales] == [{"q_proj": 2.0}, {"v_proj": 4.0}]


def test_peft_reads_a_sealed_folder_and_computes_the_same(base: Path, good: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(tiny.model(), good)
    ours = PeftModel.from_pretrained(load_model(base, device="cpu"), good)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)  # fp32, sums in another order


def test_an_adapter_of_pefts_loads_with_one_line(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny.model(), settings)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(load_model(base, device="cpu"), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    line = "is not sealed (no decal.json): whether its base, scale, tokenizer and chat template are those"
    assert line in record.message
    assert "\n" not in record.message


def test_a_seal_of_version_1_is_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    facts = {"version": 1, "quantize": None, "base_fingerprint": checkpoint.fingerprint(base)}
    (adapter / "decal.json").write_text(json.dumps(facts))
    PeftModel.from_pretrained(load_model(base, device="cpu"), adapter)
    other = tiny.save_model(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="trained on another base"):
        PeftModel.from_pretrained(load_model(other, device="cpu"), adapter)


def test_another_storage_format_is_a_line_and_no_error(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(base, tmp_path, quantize="nf4")
    assert sealed.read(tmp_path).quantize == QuantConfig()
    PeftModel.from_pretrained(load_model(base, device="cpu"), tmp_path)
    (record,) = caplog.records
    assert "trained on a base stored in nf4, and this one is stored as its checkpoint is" in record.message


def test_a_base_that_was_merged_into_is_no_longer_its_checkpoint(base: Path, good: Path, tmp_path: Path) -> None:
    merged = PeftModel.from_pretrained(load_model(base, device="cpu"), good).merge_and_unload()
    get_peft_model(merged, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    seal = sealed.read(tmp_path)
    assert seal.base_fingerprint is None
    assert seal.tensors is not None


def test_new_rows_that_no_file_would_hold_are_told(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain: Any = load_model(base, device="cpu")
    plain.resize_token_embeddings(264)
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "resized from 260 to 264 rows, and adapter 'default' does not hold the new ones" in caplog.text
    with pytest.raises(AdapterError, match=r"vocab_size moved 264 -> 260.*resize_token_embeddings\(264\)"):
        PeftModel.from_pretrained(load_model(base, device="cpu"), tmp_path)
    caplog.clear()
    again: Any = load_model(base, device="cpu")
    again.resize_token_embeddings(264)
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[260, 261, 262, 263])
    get_peft_model(again, rows).save_pretrained(tmp_path)
    assert "resized" not in caplog.text


def test_the_digest_is_what_the_page_says(good: Path) -> None:
    """SHA-256 over "name dtype shape" and the bytes of each tensor, in the order of the names."""
    found = hashlib.sha256()
    for key, array in sorted(load_file(good / "adapter_model.safetensors").items()):
        assert array.dtype == np.float32
        found.update(f"{key.removeprefix('base_model.model.')} float32 {array.shape}".encode() + array.tobytes())
    assert sealed.read(good).tensors == found.hexdigest()


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    answer = sealed.Answer(ids=(1, 2), top=(3, 1), logits=(1.5, -0.25), logsumexp=2.0)
    seal = sealed.Seal(
        quantize=QuantConfig(format="fp4"),
        base_fingerprint="a" * 64,
        base_name="org/modèle",
        base_config={"rope": {"theta": 1e4}},
        tokens=sealed.Tokens(vocabulary="b", size=3, rules=None, special={"eos_token": "</s>"}, template=None),
        reference=sealed.Reference(
            answers=(answer,), templated=True, device="cpu", dtype="float32", threads=2, adapter_kl=0.5
        ),
    )
    sealed.write(tmp_path, seal)
    assert sealed.read(tmp_path) == seal
    sealed.write(tmp_path, replace(seal, data=sealed.Data(digest="c", rows=2, used=2, tokens=9, loss_tokens=3)))
    assert sealed.read(tmp_path) != seal
    sealed.write(tmp_path, sealed.UNSEALED)
    assert sealed.read(tmp_path) == sealed.UNSEALED
    assert not (tmp_path / "decal.json").exists()
