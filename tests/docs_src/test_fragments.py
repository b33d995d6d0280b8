"""Every code fragment of the textbook section, its import line changed to decal and its errors mended, runs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from decal import LoraConfig, TaskType, get_peft_model
from decal.layers.nf4_linear import NF4Linear
from tests.integration import tiny

DOCS = Path(__file__).parents[2] / "docs_src"
ADAPTERS = ("lora-medical", "lora-legal", "qlora-output")
ELSEWHERE = {"hub": "tests/integration/test_hub.py, where a hub answers"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the fragments name: the model twice, three adapters of it, conversations."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("smollm2", "llama3"):
        tiny.save_model(folder / name, torch.bfloat16)
    tiny.write_messages(folder / "no_robots.jsonl", 32)
    for seed, name in enumerate(ADAPTERS):
        base = AutoModelForCausalLM.from_pretrained(folder / "llama3")
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(base, lora, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():  # a change large enough to be seen through bf16
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(4)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's working folder."""
    monkeypatch.chdir(made)
    return made


def run(name: str) -> dict[str, Any]:
    """Run a fragment as a script and return its variables."""
    return runpy.run_path(str(DOCS / f"{name}.py"), run_name="__main__")


def printed_counts(text: str) -> list[tuple[int, int]]:
    """Return the (trainable, all) of each line that print_trainable_parameters printed."""
    lines = [line for line in text.splitlines() if line.startswith("trainable params: ")]
    parts = [line.replace(",", "").replace("||", "").split() for line in lines]
    return [(int(part[2]), int(part[5])) for part in parts]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**{k: v for k, v in tiny.batch().items() if k != "labels"}).logits.float()
    return result


def test_three_configurations(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """32 wide, 64 in the MLP, 16 for k and v, 2 layers: r (in + out) for each matrix."""
    found = run("lora_config")
    base = sum(p.numel() for p in tiny.model().parameters())
    attention = 2 * 16 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    whole = attention + 2 * 16 * 3 * (32 + 64)
    expected = [(n, base + n) for n in (whole, attention, whole)]
    assert printed_counts(capsys.readouterr().out) == expected
    # lora_alpha / sqrt(r) = 32 / 4; the section's own alpha = 2 r would be a scale of 2.
    layer = get_peft_model(tiny.model(), found["all_linear"]).get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": 8.0}
    layer = found["model"].get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": 2.0}


def test_three_ways_to_deploy(here: Path) -> None:
    found = run("deploy")
    assert found["model"].active_adapter == "legal"
    base = logits(AutoModelForCausalLM.from_pretrained(here / "llama3", dtype=torch.bfloat16))
    legal = logits(found["model"])
    found["model"].set_adapter("default")
    medical = logits(found["model"])
    assert not torch.equal(legal, medical)
    assert isinstance(found["merged_model"], LlamaForCausalLM)
    saved = logits(AutoModelForCausalLM.from_pretrained(here / "llama3-medical-merged", dtype=torch.bfloat16))
    # Merged weights are rounded to bf16 once (2^-9 relative), so the merged model is near, never equal.
    assert (saved - medical).abs().max() < 0.25 * (base - medical).abs().max()
    assert (here / "llama3-medical-merged" / "tokenizer.json").is_file()
    assert next(AutoModelForCausalLM.from_pretrained(here / "merged-model").parameters()).dtype == torch.float16


def test_lora_linear_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("lora_linear")
    assert capsys.readouterr().out.splitlines() == ["torch.Size([512, 8])", "None"]
    layer = found["layer"]
    x = torch.randn(4, 512)
    assert torch.equal(layer(x), x @ layer.W0)  # B = 0: the start is the base
    assert layer.scale == 2
    assert layer.B.grad is not None
    assert torch.count_nonzero(layer.A.grad) == 0  # with B = 0 nothing reaches A in the first step


def test_lab_1_apply(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("lab_1_apply")
    trainable = 2 * 16 * ((32 + 32) + (32 + 16))
    assert printed_counts(capsys.readouterr().out) == [(trainable, found["model"].num_parameters())]
    config = found["model"].peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.05, "none")
    assert config.task_type is TaskType.CAUSAL_LM
    kinds = {p.dtype for p in found["model"].parameters() if p.requires_grad}
    assert kinds == {torch.float32}  # fp32 masters on the 16-bit base, as PEFT makes them


def test_lab_2_ranks_cost_in_proportion(here: Path) -> None:
    table = run("lab_2_ranks")["df"]
    per_rank = 2 * ((32 + 32) + (32 + 16))
    assert list(table["trainable"]) == [per_rank * r for r in (4, 8, 16, 32, 64)]
    assert len(set(table["total"] - table["trainable"])) == 1
    share = table["trainable"] / table["total"] * 100
    assert list(table["pct"]) == [f"{value:.4f}%" for value in share]


def test_lab_3_train(here: Path) -> None:
    pytest.importorskip("trl")
    found = run("lab_3_train")
    assert found["trainer"].state.global_step == 6  # 16 rows, 8 a step, 3 epochs
    checkpoints = sorted((here / "lora-smollm2-r16").glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all((path / "adapter_model.safetensors").is_file() for path in checkpoints)
    assert not [path for path in checkpoints if (path / "model.safetensors").exists()]
    moved = [p for n, p in found["model"].named_parameters() if "lora_B" in n]
    assert all(p.any() for p in moved)
    labels = next(iter(found["trainer"].get_train_dataloader()))["labels"]
    assert (labels == -100).any()  # the question teaches nothing; the answer does
    assert (labels != -100).any()


def test_lab_4_merge_and_lab_5_compare(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("lab_4_merge")
    file = here / "lora-adapter-r16" / "adapter_model.safetensors"
    trainable = 2 * 16 * ((32 + 32) + (32 + 16))
    assert sum(tensor.numel() for tensor in load_file(file).values()) == trainable
    assert found["adapter_size"] == file.stat().st_size
    assert found["adapter_size"] == pytest.approx(4 * trainable, rel=0.15)  # fp32, and a header
    assert json.loads((here / "lora-adapter-r16" / "adapter_config.json").read_text("utf-8"))["r"] == 16
    fresh = AutoModelForCausalLM.from_pretrained(here / "smollm2", dtype=torch.float16)
    merged = found["merged_model"].state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in fresh.state_dict().items())  # B = 0: no change

    responses = run("lab_5_compare")["responses"]
    by_prompt = {prompt: [text for _, asked, text in responses if asked == prompt] for _, prompt, _ in responses}
    assert len(by_prompt) == 3
    assert all(len(texts) == 2 and texts[0] == texts[1] for texts in by_prompt.values())  # same weights, same draws


def test_the_complete_lab(here: Path) -> None:
    pytest.importorskip("trl")
    found = run("lab_complete")
    assert len(found["rows"]) == 5
    assert found["result"].training_loss > 0
    assert type(found["merged"]) is LlamaForCausalLM
    assert len(found["answers"]) == 2
    trained = {n: p for n, p in found["model"].named_parameters() if "lora_B" in n}
    assert all(p.any() for p in trained.values())
    # One training, at r=16, outside the loop over ranks.
    assert found["model"].active_peft_config.r == 16
    assert found["trainer"].state.global_step == 6


def test_qlora(here: Path) -> None:
    model = run("qlora")["model"]
    coded = [m for m in model.modules() if isinstance(m, NF4Linear)]
    assert len(coded) == 14  # seven in each of two layers: bitsandbytes' became decal's
    assert all(layer.double_quant for layer in coded)
    ids = torch.tensor([[5, 9, 14, 3]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all(grad is not None and bool(grad.any()) for name, grad in trained.items() if "lora_B" in name)


def test_every_fragment_is_tested() -> None:
    source = Path(__file__).read_text("utf-8")
    fragments = {path.stem for path in DOCS.glob("*.py")} - set(ELSEWHERE)
    assert not {name for name in fragments if f'run("{name}")' not in source}


def test_every_fragment_imports_decal_where_the_section_imports_peft() -> None:
    for path in DOCS.glob("*.py"):
        assert "import peft" not in path.read_text("utf-8")
        assert "from peft" not in path.read_text("utf-8")
