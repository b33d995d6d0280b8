"""From a run to `decal verify`: an honest adapter passes, also in a new process; each planted difference is named."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import decal
from decal import LoraConfig, PeftModel, get_peft_model, load_model, load_tokenizer
from decal.errors import AdapterError, ConfigError
from decal.evaluate import asking, reference
from decal.files import sealed
from decal.files.compared import State
from decal.model import rows
from decal.recipes import verify
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from tests.cli.tiny import Decal, lines_of
from tests.integration import tiny
from tests.training.tiny_run import config, make_files

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return finetune(config(folder, steps=4)).run


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Decal:
    return Decal(capsys)


def states(found: verify.Verified) -> dict[str, str]:
    return {part.name: part.state.value for part in found.parts}


def test_a_run_seals_all_that_it_knows(run: Path) -> None:
    seal = sealed.read(run / "adapter")
    ledger = RunDir(run).manifest()["data"]
    assert seal.data is not None
    assert vars(seal.data) == {key: ledger[key] for key in ("digest", "rows", "used", "tokens", "loss_tokens")}
    assert seal.versions is not None
    assert seal.versions["torch"] == torch.__version__
    assert (run / "adapter" / "decal.json").stat().st_size < 8192
    text = (run / "adapter" / "decal.json").read_text()
    assert not any(subject in text for subject in tiny.SUBJECTS)  # the user's rows are in no adapter's folder
    checkpoint = RunDir(run).checkpoints()[0] / "adapter"
    early = sealed.read(checkpoint)
    assert early.scale == seal.scale
    assert early.reference is None  # saved often: it costs no forward pass


def test_the_reference_is_what_transformers_and_peft_compute(folder: Path, run: Path) -> None:
    found = sealed.read(run / "adapter").reference
    assert found is not None
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    theirs = peft.PeftModel.from_pretrained(plain, run / "adapter").eval()
    assert len(found.answers) == len(asking.PROMPTS) == 8
    for prompt, one in zip(asking.PROMPTS, found.answers, strict=True):
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert tuple(ids[0].tolist()) == one.ids
        with torch.no_grad():
            last = theirs(input_ids=ids).logits[0, -1]
        top = last.topk(16)
        # fp32, in one padded batch and alone: sums in another order
        np.testing.assert_allclose(one.logits, top.values, rtol=0, atol=2e-5)
        assert one.logsumexp == pytest.approx(float(last.logsumexp(0)), abs=2e-5)


def test_an_honest_adapter_passes_in_a_new_process(run: Path) -> None:
    command = [sys.executable, "-m", "decal.cli.main", "verify", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ok ") == 9
    assert "is what was sealed\n" in done.stdout
    assert "note:" not in done.stderr


def alpha(folder: Path) -> None:
    edit(folder / "adapter_config.json", '"lora_alpha": 8', '"lora_alpha": 32')


def template(folder: Path) -> None:
    edit(folder / "chat_template.jinja", "<|im_start|>assistant", "<|im_start|>model")


def newline(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + "\n")


def swapped(folder: Path) -> None:
    """Two letters trade their ids."""
    file = folder / "tokenizer.json"
    facts = json.loads(file.read_text())
    vocab = facts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(facts))


def special(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", '"eos_token": "<|endoftext|>"', '"eos_token": "<|im_end|>"')


def rules(folder: Path) -> None:
    edit(folder / "tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true')


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new))


PLANTED: dict[str, tuple[Damage, tuple[str, ...], str]] = {
    "alpha": (alpha, ("scale", "logits"), "scale moved 2.0 -> 8.0"),
    "the template": (
        template,
        ("chat template", "prompt ids"),
        "was trained with another chat template",
    ),
    "the vocabulary": (swapped, ("tokenizer", "prompt ids"), "another vocabulary of as many tokens"),
    "the end token": (special, ("tokenizer",), "eos_token '<|endoftext|>' -> '<|im_end|>'"),
    "the rules": (rules, ("tokenizer", "prompt ids"), "other merges, or another normaliser"),
}


@pytest.mark.parametrize(("damage", "parts", "text"), PLANTED.values(), ids=PLANTED)
def test_what_was_planted_is_found_and_named(
    adapter: Path, damage: Damage, parts: tuple[str, ...], text: str, say: Decal
) -> None:
    damage(adapter)
    said = say("verify", adapter)
    assert said.code == 3
    differing = [line for line in said.out.splitlines() if " differs " in line and "its seal" not in line]
    assert [line.split("  ")[0] for line in differing] == list(parts)
    assert text in " ".join(said.out.split())
    assert said.out.rstrip().endswith(f"differs from its seal in {', '.join(parts)}")
    refused = say("generate", "--adapter", adapter, "--prompt", "hello")
    assert refused.code == 2
    assert text in " ".join(lines_of(refused.err))


def test_an_editors_newline_at_the_templates_end_is_no_difference(adapter: Path) -> None:
    newline(adapter)
    assert decal.verify(str(adapter)).agrees


def test_a_template_that_is_refused_shows_where_it_parts(adapter: Path, say: Decal) -> None:
    template(adapter)
    refused = say("chat", "--adapter", adapter)
    assert refused.code == 2
    assert "'model\\n', where 'assist' is sealed" in refused.err
    merged = say("merge", adapter, "--out", adapter.parent / "merged")
    assert merged.code == 2
    assert "another chat template" in merged.err


def test_another_base_is_listed_and_exits_with_3(run: Path, tmp_path: Path, say: Decal) -> None:
    tiny.save_model(tmp_path, seed=1)
    said = say("verify", run, "--base", tmp_path, "--json")
    assert said.code == 3
    facts = json.loads(said.out)
    found = {part["name"]: part for part in facts["parts"]}
    assert not facts["agrees"]
    assert found["base weights"]["state"] == found["logits"]["state"] == "differs"
    assert "was trained on another base" in found["base weights"]["says"]
    assert found["base config"]["state"] == "ok"
    assert facts["replay"]["kl"] > 1e-3


def test_an_unsealed_adapter_is_loaded_with_a_note_and_not_verified(adapter: Path, say: Decal) -> None:
    (adapter / "decal.json").unlink()
    said = say("verify", adapter)
    assert said.code == 2
    assert "not sealed, so there is nothing to verify it by" in lines_of(said.err)[0]
    answered = say.fine("generate", "-a", adapter, "-a", adapter, "-p", "hello", "--max-new-tokens", "1")
    assert answered.err.count("could not be verified") == 1


def test_what_is_not_sealed_is_said(folder: Path, tmp_path: Path, say: Decal) -> None:
    get_peft_model(load_model(folder / "model"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    said = say.fine("verify", tmp_path)
    assert "unverified: tokenizer, chat template, prompt ids, logits" in said.out


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_every_kind_of_adapter_passes(
    folder: Path, tmp_path: Path, settings: dict[str, Any], quantize: str | None
) -> None:
    spec = LoraConfig(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, **settings)
    model = get_peft_model(load_model(folder / "model", quantize=quantize), spec)
    seal_whole(model, folder / "model", tmp_path)
    assert set(states(verify.verify(str(tmp_path))).values()) == {"ok"}


def seal_whole(model: PeftModel, base: Path, folder: Path) -> sealed.Reference:
    """Move the adapter off its start and save it with its tokenizer and a whole seal."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tokenizer = load_tokenizer(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    verify.complete(folder, model, tokenizer, None)
    found = sealed.read(folder).reference
    assert found is not None
    return found


def ignores_rslora(model: PeftModel) -> None:
    for module in model.modules():
        for adapter in getattr(module, "adapters", {}).values():
            adapter.scale = adapter.alpha / adapter.rank


def ignores_saved_modules(model: PeftModel) -> None:
    for module in model.modules():
        if hasattr(module, "modules_to_save"):
            module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())


@pytest.mark.parametrize("mistake", [ignores_rslora, ignores_saved_modules])
def test_a_server_that_ignores_a_part_of_the_adapter_is_found(
    folder: Path, tmp_path: Path, mistake: Callable[[PeftModel], None]
) -> None:
    spec = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], r=16, use_rslora=True)
    model = get_peft_model(load_model(folder / "model"), spec)
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["default"].weight.mul_(1.5)
    found = seal_whole(model, folder / "model", tmp_path)
    assert reference.replay(model, found).within
    mistake(model)
    wrong = reference.replay(model, found)
    assert not wrong.within
    assert wrong.kl > 1000 * wrong.tolerance.kl
    assert verify.logits(wrong).state is State.differs


def test_the_reference_leaves_generators_and_modes_as_they_are(folder: Path) -> None:
    spec = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(load_model(folder / "model"), spec)
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    tokenizer = load_tokenizer(folder / "model")
    first = reference.reference(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]
    assert [module.training for module in model.modules()] == modes
    assert reference.reference(model, tokenizer) == first  # no dropout
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_distance_is_the_kl_over_the_kept_tokens_and_all_others_as_one() -> None:
    sealed_logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    one = replace(reference.answer([5], sealed_logits[0]), top=(0, 1), logits=(2.0, 1.0))
    kept = sealed.Reference(answers=(one,), templated=False, device="cpu", dtype="float32", threads=1, adapter_kl=1.0)
    allowed = reference.tolerance(kept, "cpu", torch.float32)
    same = reference.compare(kept, sealed_logits + 3, tolerance=allowed)  # softmax does not see the shift
    assert same.kl < 1e-12
    assert same.max_difference == pytest.approx(3)
    assert not same.within
    other = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    p, q = torch.softmax(sealed_logits[0].double(), 0), torch.softmax(other[0].double(), 0)
    joined = [(p[0], q[0]), (p[1], q[1]), (p[2:].sum(), q[2:].sum())]
    expected = float(sum(a * (a / b).log() for a, b in joined))
    assert reference.compare(kept, other, tolerance=allowed).kl == pytest.approx(expected, rel=1e-6)
    broken = reference.compare(kept, other * float("nan"), tolerance=allowed)
    assert broken.kl == float("inf")
    assert not broken.within


def test_a_template_that_writes_the_bos_token_writes_it_once(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids, templated = asking.token_ids(tokenizer)
    assert templated
    assert {one.count(256) for one in ids} == {1}


def test_a_template_that_writes_the_date_is_compared_by_its_text_alone(folder: Path, run: Path) -> None:
    seal = sealed.read(run / "adapter")
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    _, text, ids = asking.parts(seal, tokenizer, {})
    assert text.state is State.differs
    assert ids.state is State.not_compared


def test_rules_that_other_versions_write_otherwise_are_no_difference(folder: Path, run: Path) -> None:
    seal = sealed.read(run / "adapter")
    assert seal.tokens is not None
    assert seal.versions is not None
    older = replace(seal, tokens=replace(seal.tokens, rules="f" * 64))
    tokenizer = load_tokenizer(folder / "model")
    same = dict(seal.versions)
    with pytest.raises(AdapterError, match="other merges"):
        asking.refuse(older, tokenizer, same, where="it")
    asking.refuse(older, tokenizer, {**same, "tokenizers": "99"}, where="it")


def test_tokens_without_a_row_are_told_and_refused_where_they_are_used(
    folder: Path, tmp_path: Path, say: Decal
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    tokenizer.add_tokens(["<tool>", "<end>"])
    tokenizer.save_pretrained(tmp_path / "model")
    line = rows.check(load_model(tmp_path / "model"), tokenizer)
    assert line is not None
    assert "2 tokens for which the model's embedding of 260 rows has none: '<tool>' (260), '<end>' (261)" in line
    shutil.copy(folder / "data.jsonl", tmp_path / "data.jsonl")
    done = finetune(config(tmp_path, steps=1, eval_every=None, save_every=None))
    assert any(event.get("text") == line for event in RunDir(done.run).events())
    assert line in say.fine("generate", "-a", done.run, "-p", "hello", "--max-new-tokens", "1").err
    with (tmp_path / "data.jsonl").open("a") as file:
        turns = [{"role": "user", "content": "<tool>"}, {"role": "assistant", "content": "yes"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(ConfigError, match=r"and the data use them.*resize_token_embeddings\(262\)"):
        finetune(config(tmp_path, output="other", data={"eval_rows": 0}, steps=1, eval_every=None))
