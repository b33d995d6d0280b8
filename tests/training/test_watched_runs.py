"""The watch over whole runs: what is said in them, and what --auto-stop keeps."""

from __future__ import annotations

import html
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from decal import LoraConfig
from decal.errors import RunError
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.training import losses
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def said(run: Path, kind: str = "advice") -> dict[str, str]:
    """Return what a run's events say, by the kind of advice; each kind may stand there once only."""
    events = [e for e in RunDir(run).events() if e["kind"] == kind]
    texts = {e.get("advice", kind): e["text"] for e in events}
    assert len(texts) == len(events)
    return texts


@pytest.fixture(scope="module")
def learnt(folder: Path) -> Path:
    """A model that half knows the rows already: what diverges falls back behind it, as a large model does."""
    return finetune(
        config(folder, output="base", method="full", steps=20, lr=1e-2, eval_every=20, save_every=20)
    ).result


def on(model: Path, folder: Path, output: str, **settings: Any) -> RunConfig:
    return config(folder, output=output, **settings).model_copy(update={"model": str(model)})


def test_a_run_at_an_absurd_rate_is_said_to_have_diverged_and_goes_on(folder: Path, learnt: Path) -> None:
    done = finetune(on(learnt, folder, "absurd", lr=1.0, steps=8))
    assert (done.steps, done.stopped) == (8, None)
    assert said(done.run)["diverged"].startswith("diverged: the held-out loss is ")
    assert said(done.run)["diverged"].endswith("; lower train.lr (1), to a tenth or less")


def test_four_rows_learnt_by_heart_are_overfitting(folder: Path) -> None:
    few = {"limit": 8}  # of which 4 are held out
    done = finetune(config(folder, output="heart", method="full", data=few, steps=30, eval_every=5, lr=1e-2))
    assert said(done.run)["overfit"].startswith("overfitting: the held-out loss rose to ")
    assert said(done.run)["overfit"].endswith("train for fewer epochs, or set train.early_stopping")


BAD = {"lr": 0.3, "warmup": 24, "schedule": "constant", "steps": 40, "save_every": 2}  # good until the rate is too high


def test_auto_stop_ends_a_diverged_run_with_its_best_weights(folder: Path, learnt: Path) -> None:
    done = finetune(on(learnt, folder, "stopped", auto_stop=True, eval_every=2, **BAD))
    run = RunDir(done.run)
    assert done.steps < 40
    assert done.eval_loss is not None
    assert done.eval_before is not None
    evaluated = {e["step"]: e["loss"] for e in run.events() if e["kind"] == "eval" and e["step"] > 0}
    assert done.eval_loss == evaluated[done.step] == min(evaluated.values()) < done.eval_before
    assert "diverged" in said(done.run)
    (stop,) = [e for e in run.events() if e["kind"] == "stop"]
    assert (stop["step"], stop["kept"]) == (done.steps, done.step)
    assert stop["text"] == run.manifest()["outcome"]["stopped"] == done.stopped
    assert str(done.stopped).endswith(f"; the weights of step {done.step}, the best evaluation, are kept")
    assert head(done.run) == f"Stopped at step {done.steps}: {done.stopped}"
    assert_kept(done.run, done.step)


def assert_kept(run: Path, step: int) -> None:
    kept = load_file(run / "checkpoints" / f"step-{step}" / "adapter" / "adapter_model.safetensors")
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in final)


def test_auto_stop_without_an_evaluation_keeps_the_last_checkpoint_from_before(folder: Path, learnt: Path) -> None:
    unseen: dict[str, Any] = {"data": {"eval_rows": 0}, "eval_every": None, "keep": 1}
    done = finetune(on(learnt, folder, "blind", auto_stop=True, **unseen, **BAD))
    losses_ = {e["step"]: e["loss"] for e in RunDir(done.run).events() if e["kind"] == "step"}
    assert done.stopped is not None
    bad = int(done.stopped.split("since step ")[1].split(";")[0])
    assert done.step < bad - 1
    assert done.stopped.endswith(f"; the weights of step {done.step}, the last checkpoint from before, are kept")
    assert head(done.run) == f"Stopped at step {done.steps}: {done.stopped}"
    assert losses_[done.step + 1] < losses_[bad]  # the loss of these weights is that of the next step
    assert_kept(done.run, done.step)


@pytest.mark.parametrize(
    ("name", "saves", "left"),
    [
        ("nothing", 40, "no checkpoint had been written"),
        ("late", 4, "step-4 is from after it went wrong"),
    ],
)
def test_auto_stop_with_nothing_to_keep_is_an_error_that_the_report_tells(
    folder: Path, learnt: Path, name: str, saves: int, left: str
) -> None:
    settings = on(learnt, folder, name, auto_stop=True, lr=1.0, steps=40, eval_every=5, save_every=saves)
    told = rf"the held-out loss is .*, above the .* of step 0; nothing is kept: {left}"
    with pytest.raises(RunError, match=rf"training was stopped at step 5: {told}") as raised:
        finetune(settings)
    run = RunDir(folder / name)
    fix = f"Lower train.lr, delete {run.path} and start again: --resume would go wrong again."
    assert raised.value.fix == f"{fix} train.save_every=N keeps earlier checkpoints."
    *_, stop, error = run.events()
    assert (stop["kind"], stop["step"], stop["kept"]) == ("stop", 5, None)
    assert (error["kind"], error["fix"]) == ("error", raised.value.fix)
    assert raised.value.what == f"training was stopped at step 5: {stop['text']}"
    assert head(run.path) == f"Stopped at step 5: {stop['text']}. The run has no result. {raised.value.fix}"
    assert not run.adapter.exists()


def head(run: Path) -> str:
    """Return how the run ended, as its page says it."""
    found = re.search(r'<p class="loud"><b>(.*?)</b> (.*?)</p>', (run / "report.html").read_text(encoding="utf-8"))
    assert found is not None
    return html.unescape(f"{found[1]} {found[2]}")


@pytest.mark.parametrize("auto_stop", [True, False])
def test_a_loss_that_is_not_finite_ends_in_the_checkpoint_if_auto_stop_is_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, auto_stop: bool
) -> None:
    real, calls = losses.sft, itertools.count(1)

    def breaking(model: Any, note: Any) -> Any:
        plain = real(model, note)

        class Broken:
            count = staticmethod(plain.count)

            def __call__(self, model: Any, batch: Any) -> tuple[Tensor, int]:
                total, count = plain(model, batch)
                return total * (math.nan if next(calls) > 10 else 1.0), count

        return Broken()

    monkeypatch.setattr(losses, "LOSSES", {"sft": breaking})
    settings = config(
        folder, output=f"nan-{auto_stop}", auto_stop=auto_stop, data={"eval_rows": 0}, eval_every=None, save_every=3
    )
    if not auto_stop:
        with pytest.raises(RunError, match="loss is not finite") as raised:
            finetune(settings)
        said_ = f"the run got to step 5 of 10. {raised.value.what} (got: nan). {raised.value.fix}"
        assert head(folder / "nan-False") == f"Not finished: {said_}"
        return
    done = finetune(settings)
    assert (done.steps, done.step) == (5, 3)
    kept = "the weights of step 3, the last checkpoint from before, are kept"
    assert done.stopped == f"the loss of step 6 was not finite; {kept}"
    assert_kept(done.run, 3)


def test_a_resumed_run_repeats_no_advice(folder: Path) -> None:
    settings = config(folder, output="again")
    settings = settings.model_copy(update={"lora": LoraConfig(r=4, lora_alpha=400, target_modules=["q_proj"])})

    def crash(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(settings, on_event=crash)
    finetune(settings, resume=True)
    assert list(said(folder / "again")) == ["scale"]
