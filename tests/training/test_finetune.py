"""A whole run, as a user would start it: what it learns, writes, refuses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from decal.errors import ConfigError, RunError
from decal.evaluate.loss import Evaluation
from decal.model.load import load_model
from decal.model.wrapper import PeftModel
from decal.recipes import finetune as recipe
from decal.recipes.finetune import Finetuned, finetune
from decal.rundir import RunDir
from decal.spec import LoraConfig, RunConfig, TaskType, read_run_config
from decal.training import losses, precision
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def events() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def done(folder: Path, events: list[dict[str, Any]]) -> Finetuned:
    return finetune(config(folder, output="done"), on_event=events.append)


def test_it_learns(done: Finetuned) -> None:
    assert done.eval_before is not None
    assert done.eval_loss is not None
    assert done.eval_loss < 0.8 * done.eval_before
    assert done.steps == 10


def test_the_adapter_is_pefts_and_gives_the_same_logits_there(done: Finetuned, folder: Path) -> None:
    assert done.result == done.run / "adapter"
    ids = torch.arange(40)[None]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    plain = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(base, str(done.result)).eval()
    ours = PeftModel.from_pretrained(load_model(folder / "model", device="cpu"), done.result)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert (theirs(ids).logits - plain).abs().max().item() > 0.1


def test_the_adapter_can_be_served(done: Finetuned) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.result)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"


def test_events_say_what_happened_and_are_the_callbacks(done: Finetuned, events: list[dict[str, Any]]) -> None:
    written = RunDir(done.run).events()
    assert written == json.loads(json.dumps(events))
    kinds = [e["kind"] for e in written]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    steps = [e for e in written if e["kind"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 11))
    assert all(e["loss"] > 0 and e["grad_norm"] > 0 and e["tokens_per_s"] > 0 for e in steps)
    assert [e["step"] for e in written if e["kind"] == "eval"] == [0, 4, 8, 10]
    assert steps[-1]["seconds_left"] == 0
    assert sum(e["loss_tokens"] for e in steps) == RunDir(done.run).manifest()["outcome"]["loss_tokens"]


def test_the_manifest_holds_what_a_report_needs(done: Finetuned, folder: Path) -> None:
    manifest = RunDir(done.run).manifest()
    parameters = manifest["parameters"]
    saved = sum(t.numel() for t in load_file(done.result / "adapter_model.safetensors").values())
    assert parameters["trainable"] == saved == done.trainable
    assert parameters["percent"] == pytest.approx(100 * saved / parameters["total"])
    assert manifest["data"]["rows"] == 18
    assert manifest["evaluation"]["rows"] == 4
    assert manifest["versions"]["torch"] == torch.__version__
    assert RunConfig(**manifest["config"]) == read_run_config(done.run / "run.yaml") == config(folder, output="done")
    assert manifest["outcome"]["eval_loss"] == done.eval_loss


def test_the_last_and_the_best_checkpoints_are_kept(done: Finetuned) -> None:
    run = RunDir(done.run)
    evals = {e["step"]: e["loss"] for e in run.events() if e["kind"] == "eval" and e["step"] > 0}
    best = min(evals, key=lambda step: evals[step])
    assert done.step == best
    names = [path.name for path in run.checkpoints()]
    assert f"step-{best}" in names
    assert names[-1] == "step-10"
    assert len(names) <= 3
    assert (run.checkpoints()[-1] / "adapter" / "adapter_model.safetensors").is_file()


def test_no_pickle_is_written(done: Finetuned) -> None:
    suffixes = {path.suffix for path in done.run.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".yaml", ".jinja", ".html"}


def test_the_best_weights_are_kept_when_later_ones_are_worse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([9.0, 3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 1.2, 0.1])  # before the first step, then after each
    monkeypatch.setattr(recipe, "evaluate", lambda model, **rest: Evaluation(loss=next(script), count=1))
    result = finetune(config(folder, output="worse", steps=9, eval_every=1, early_stopping=3, keep=1))
    assert (result.steps, result.step, result.eval_loss, result.eval_before) == (7, 4, 1.0, 9.0)
    run = RunDir(result.run)
    assert [path.name for path in run.checkpoints()] == ["step-4", "step-7"]
    kept, last = (load_file(path / "adapter" / "adapter_model.safetensors") for path in run.checkpoints())
    final = load_file(result.result / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in final)
    assert not all(torch.equal(last[name], final[name]) for name in final)
    notes = [e["text"] for e in run.events() if e["kind"] == "note"]
    assert any("stopped early" in note for note in notes)
    assert any("weights of step 4" in note for note in notes)


def test_full_fine_tuning_moves_and_saves_the_whole_model(folder: Path) -> None:
    result = finetune(config(folder, output="full", method="full", lr=3e-3, steps=4))
    assert result.result == result.run / "model"
    before = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    after = transformers.AutoModelForCausalLM.from_pretrained(result.result)
    assert result.trainable == sum(p.numel() for p in before.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    assert result.eval_loss is not None
    assert result.eval_before is not None
    assert result.eval_loss < result.eval_before


def test_gradient_checkpointing_gives_the_same_run(folder: Path) -> None:
    lines = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "steps": 3}
        result = finetune(config(folder, output=f"recompute-{checkpointing}", **settings))
        lines.append([e["loss"] for e in RunDir(result.run).events() if e["kind"] == "step"])
    assert lines[0] == lines[1]


def test_a_stream_and_unpacked_rows_train_too(folder: Path) -> None:
    for data in ({"streaming": True}, {"packing": False}):
        result = finetune(config(folder, output=f"data-{next(iter(data))}", data=data, steps=3))
        assert result.steps == 3


def test_without_evaluation_the_last_weights_are_kept(folder: Path) -> None:
    result = finetune(config(folder, output="plain", data={"eval_rows": 0}, steps=2, eval_every=None))
    assert (result.step, result.eval_loss) == (2, None)


def test_what_is_refused_leaves_no_folder_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = config(folder, output="refused", data={"path": str(folder / "none.jsonl")})
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        finetune(broken)
    with pytest.raises(ConfigError, match="nothing is trainable"):
        finetune(
            config(folder, output="refused").model_copy(
                update={"lora": broken.lora.model_copy(update={"inference_mode": True})}
            )
        )
    assert not (folder / "refused").exists()


def test_what_may_be_a_mistake_is_noted_once_at_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    settings = config(folder, output="loud", steps=1, precision="bf16", lr=1e-5, eval_every=None)
    loud = settings.model_copy(update={"lora": LoraConfig(r=4, lora_alpha=4000, target_modules=["q_proj"])})
    finetune(loud)
    events = RunDir(folder / "loud").events()
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert [note for note in notes if "up to 22 times slower" in note] == notes[:1]
    (scale,) = [event["text"] for event in events if event.get("advice") == "scale"]
    assert scale == (
        "the adapter's scale, lora_alpha / r, is 1,000 (r=4, lora_alpha=4000): 1 to 4 is usual, and this trains as at "
        "a far too high rate; lower lora_alpha to 8"
    )
    finetune(config(folder, output="quiet", steps=1))
    assert not [event for event in RunDir(folder / "quiet").events() if event["kind"] in ("note", "advice")]


def test_an_adapter_marked_for_another_task_is_refused_however_it_came(folder: Path) -> None:
    settings = config(folder, output="classes")
    settings.lora.task_type = TaskType.SEQ_CLS  # an adapter's settings may be changed, as in PEFT
    with pytest.raises(ConfigError, match=r"lora\.task_type=SEQ_CLS"):
        finetune(settings)
    assert not (folder / "classes").exists()


def test_a_folder_with_a_run_is_not_written_over(done: Finetuned, folder: Path) -> None:
    with pytest.raises(RunError, match=r"already holds a run.*--resume"):
        finetune(config(folder, output="done"))


class Detached:
    """A loss that no parameter has a part in, with a graph all the same."""

    def count(self, batch: Any) -> int:
        return 1

    def __call__(self, model: Any, batch: Any) -> Any:
        return 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad) + 1.0, 1


def test_a_run_that_would_learn_nothing_is_stopped_at_its_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOSSES", {"sft": lambda model, note: Detached()})
    with pytest.raises(RunError, match=r"none of the 28 trainable parameters.*lora_A"):
        finetune(config(folder, output="dead", data={"eval_rows": 0}, eval_every=None))


def break_the_loss(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let the loss of a run be NaN after so many steps."""
    calls = 0

    def sometimes(model: Any, note: Any) -> Any:
        plain = losses.sft(model, note)

        class Broken:
            count = staticmethod(plain.count)

            def __call__(self, model: Any, batch: Any) -> Any:
                nonlocal calls
                calls += 1
                total, count = plain(model, batch)
                return total * (math.nan if calls > 2 * after else 1.0), count

        return Broken()

    monkeypatch.setattr(losses, "LOSSES", {"sft": sometimes})


@pytest.mark.parametrize(
    ("precision", "change"), [("fp32", "Lower train.lr."), ("bf16", "Lower train.lr or use train.precision=fp32.")]
)
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str, change: str
) -> None:
    break_the_loss(monkeypatch, after=5)
    settings = config(
        folder, output=f"nan-{precision}", precision=precision, check=False, data={"eval_rows": 0}, eval_every=None
    )
    with pytest.raises(RunError, match="loss is not finite") as raised:
        finetune(settings)
    assert raised.value.fix == (
        f"{change} The step's rows are in not-finite/step-6.jsonl, 1 of 1 with no finite loss alone. "
        "The last whole checkpoint is step-3; other settings need a new --output."
    )
    with pytest.raises(RunError, match="--resume"):
        finetune(settings)
    (checkpoint,) = RunDir(folder / f"nan-{precision}").checkpoints()
    assert checkpoint.name == "step-3"
    assert all(t.isfinite().all() for t in load_file(checkpoint / "trainable.safetensors").values())


@pytest.mark.parametrize(
    ("precision", "cause"),
    [("fp32", "most likely the model's weights hold NaN"), ("bf16", "try train.precision=fp32")],
)
def test_a_run_that_fails_at_its_first_step_says_that_nothing_was_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str, cause: str
) -> None:
    break_the_loss(monkeypatch, after=0)
    settings = config(
        folder, output=f"first-{precision}", precision=precision, check=False, data={"eval_rows": 0}, eval_every=None
    )
    with pytest.raises(RunError, match="loss is not finite") as raised:
        finetune(settings)
    assert cause in raised.value.fix
    assert "No checkpoint was written: delete" in raised.value.fix
    assert "Lower train.lr" not in raised.value.fix
    with pytest.raises(RunError, match="neither a checkpoint nor a result") as raised:
        finetune(settings)
    assert "delete the folder" in raised.value.fix
    assert "--resume" not in raised.value.fix


def file_in_the_way(folder: Path) -> Path:
    (folder / "taken").write_text("")
    return folder / "taken"


def file_above(folder: Path) -> Path:
    (folder / "taken").write_text("")
    return folder / "taken" / "run"


def in_proc(folder: Path) -> Path:
    if not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    return Path("/proc/decal/run")


def read_only(folder: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (folder / "read-only").mkdir(mode=0o500)
    return folder / "read-only"


def in_a_read_only_folder(folder: Path) -> Path:
    return read_only(folder) / "run"


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (file_in_the_way, "a file lies where the output folder should be"),
        (file_above, r"a file lies where the output folder should be .*/taken\)"),
        (in_proc, "cannot be made or written to"),
        (read_only, "cannot be made or written to .Permission denied"),
        (in_a_read_only_folder, "cannot be made or written to .Permission denied"),
        (lambda folder: folder / ("long" * 100), "cannot be made or written to .File name too long"),
    ],
)
def test_an_output_that_cannot_be_made_is_refused_first(
    place: Callable[[Path], Path], text: str, tmp_path: Path
) -> None:
    output = place(tmp_path)
    with pytest.raises(RunError, match=text) as raised:
        finetune(config(tmp_path, output=str(output)))  # a folder without a model or data: nothing of them is read
    assert "--output" in raised.value.fix


def test_looking_whether_an_output_can_be_made_leaves_nothing(tmp_path: Path) -> None:
    RunDir(tmp_path / "a" / "b").check_free()
    assert not list(tmp_path.iterdir())
