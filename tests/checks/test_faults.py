"""Faults planted in a job: each is found by its check, which names it and says how to mend it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decal.checks import (
    accumulation,
    finite,
    overfit,
    packing,
    preflight,
    reach,
    resume,
    roundtrip,
    rows,
    stops,
    tokenizer,
)
from decal.checks.result import Check, failed
from decal.checks.untouched import untouched
from decal.data.batch import IGNORE, Batch
from decal.data.mask import Sample
from decal.data.samples import Samples
from decal.errors import RunError
from decal.recipes.finetune import finetune
from decal.training.job import Job, prepare
from decal.training.losses import SFT
from tests.checks import examples as examples_
from tests.checks.examples import examples, held, printed, shown
from tests.failures.page import told
from tests.training.tiny_run import config


@pytest.fixture
def own(folder: Path) -> Job:
    """A job of the test's own, to be damaged."""
    return prepare(config(folder, lr=2e-3))


def few(job: Job) -> list[Sample]:
    return rows.shortest(rows.looked_at(job), 4)


def asked(job: Job, check: Any) -> Check:
    """Ask one check about the job's rows, in the frame in which the preflight asks it."""
    with untouched(job):
        job.model.train()
        found: Check = check(job, few(job))
    return found


def overfitted(job: Job) -> Check:
    seen = rows.looked_at(job)
    with untouched(job):
        job.model.train()
        return overfit.check(job, seen, rows.shortest(seen, 8))


def assert_failed(check: Check, measure: str, fix: str) -> None:
    assert check.status == "failed", check.measure
    assert measure in check.measure
    assert check.fix is not None
    assert fix in check.fix


def relabelled(job: Job, keep: Any) -> Job:
    """Return the job with the labels for which `keep(position from the end, token)` is False taken out."""
    samples = [
        Sample(
            ids=sample.ids,
            labels=[label if keep(label) else IGNORE for label in sample.labels],
        )
        for sample in rows.looked_at(job)
    ]
    return replace(job, data=replace(job.data, train=Samples(samples)))


def test_labels_without_the_stop_token(job: Job) -> None:
    damaged = relabelled(job, lambda label: label not in job.data.stop_ids)
    found = stops.check(damaged, rows.looked_at(damaged))
    assert_failed(
        found, "rows that learn <|endoftext|>, <|im_end|>: 0 of 18; replies will not end", "data.chat_template"
    )
    shown("stop token", found)


def test_labels_that_are_stop_tokens_alone(job: Job) -> None:
    damaged = relabelled(job, lambda label: label in job.data.stop_ids)
    assert_failed(overfitted(damaged), "stop tokens alone: the mask leaves the replies out", "data.chat_template")
    wrong = tokenizer.ids(damaged, rows.looked_at(damaged))
    assert wrong is not None
    assert_failed(wrong, "decode to no text", "data.chat_template")


def test_an_adapter_matrix_that_the_loss_does_not_reach(own: Job) -> None:
    layer = own.model.get_base_model().model.layers[1].mlp.down_proj
    layer.forward = lambda x: layer.base_layer(x)  # the adapter of one layer is passed by
    assert_failed(asked(own, reach.check), "2 of 28 trainable matrices get no gradient, such as", "lora.target_modules")


def test_checkpointed_layers_whose_input_needs_no_gradient(folder: Path) -> None:
    job = prepare(config(folder, gradient_checkpointing=True))
    model = job.model.get_base_model()
    model.disable_input_require_grads()
    for layer in model.model.layers:  # what reentrant checkpointing of a frozen input does
        forward = layer.forward
        layer.forward = lambda *a, _forward=forward, **k: _detached(_forward(*a, **k))
    found = asked(job, reach.check)
    assert_failed(found, "the loss depends on nothing that is trained", "enable_input_require_grads")
    told("10a", f"{found.measure}. {found.fix}")


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])


def test_a_rate_that_is_rounded_away(folder: Path) -> None:
    found = asked(prepare(config(folder, lr=1e-12)), reach.check)
    shown("reach", found)
    assert_failed(found, "14 of 28 matrices stand still at train.lr=1e-12: a step is rounded away", "Raise train.lr")


def test_weights_that_hold_nan_are_not_put_down_to_anything_else(own: Job) -> None:
    with torch.no_grad():
        own.model.get_base_model().model.norm.weight[3] = torch.nan
    for found in (preflight.short(own), list(preflight.full(own))):
        assert [check.name for check in found] == ["loss"]
        assert_failed(found[-1], "the loss is nan, not finite, before anything has moved", "weights hold NaN")
    shown("loss", found[-1])


class Leaky(nn.Module):
    """A model that reads packed samples as one text, as those do that take no notice of positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **others: Any) -> Any:
        return self.model(input_ids=input_ids, **others)


def test_a_model_that_reads_across_packed_samples(own: Job) -> None:
    damaged = replace(own, model=Leaky(own.model), loss=SFT(chunked=False))
    found = asked(damaged, packing.check)
    assert_failed(found, "samples see each other: a swapped neighbour moved a sample's loss from", "data.packing=false")
    told("22a", f"{found.measure}. {found.fix}")
    shown("packing", found)


class CountsBatches(SFT):
    """A loss that takes every micro-batch for one thing, so that 4 of them weigh four times what 1 does."""

    def count(self, batch: Batch) -> int:
        return 1


class MeanOfRows(SFT):
    """The mean over a batch's tokens, given out for their sum: short rows weigh what long ones do."""

    def count(self, batch: Batch) -> int:
        return len(batch.input_ids)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        total, count = super().__call__(model, batch)
        return total / count * len(batch.input_ids), len(batch.input_ids)


@pytest.mark.parametrize(
    ("loss", "ratio", "key"), [(CountsBatches, "0.25x as long", "26a"), (MeanOfRows, "% off", "26b")]
)
def test_a_loss_that_accumulation_scales(job: Job, loss: type[SFT], ratio: str, key: str) -> None:
    damaged = replace(job, loss=loss(chunked=True))
    samples = [sample for sample in rows.looked_at(job)[:4]]
    with untouched(damaged):
        found = accumulation.check(damaged, samples)
    assert_failed(found, ratio, "train.accumulate=1")
    told(key, f"{found.measure}. {found.fix}")
    if loss is MeanOfRows:
        shown("accumulation", found)


def lose_a_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})


def lose_the_scale(folder: Path) -> None:
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "lora_alpha": 2 * settings["lora_alpha"]}))
    (folder / "decal.json").unlink()  # or the seal would tell before the logits do


def zero_a_tensor(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[1]].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "decal.json").unlink()


@pytest.mark.parametrize(
    ("damage", "measure"),
    [
        (lose_a_tensor, "cannot be saved and loaded: the tensors of"),
        (lose_the_scale, "it is another adapter: logits differ by"),
        (zero_a_tensor, "it is another adapter: logits differ by"),
    ],
)
def test_a_save_that_loses_something(own: Job, monkeypatch: pytest.MonkeyPatch, damage: Any, measure: str) -> None:
    save = own.model.save_pretrained

    def lossy(folder: Any, **settings: Any) -> None:
        save(folder, **settings)
        damage(Path(folder))

    monkeypatch.setattr(own.model, "save_pretrained", lossy)
    found = asked(own, roundtrip.check)
    assert found.status == "failed"
    assert measure in found.measure
    if damage is lose_the_scale:
        shown("round trip", found)
    assert own.model.active_adapters == ["default"]
    assert list(own.model.peft_config) == ["default"]


def shifted(sample: Sample, by: int) -> Sample:
    move = [(token + by) % 256 for token in sample.ids]
    return Sample(ids=move, labels=[IGNORE if label == IGNORE else (label + by) % 256 for label in sample.labels])


def test_ids_beyond_the_model(job: Job) -> None:
    samples = [Sample(ids=[1, 2, 3000], labels=[IGNORE, 2, 3000])]
    damaged = replace(job, data=replace(job.data, train=Samples(samples)))
    (found,), (short,) = preflight.full(damaged), preflight.short(damaged)
    assert short == found
    assert_failed(found, "token 3,000 occurs, and the model has 260 rows of embeddings", "the same folder or hub id")


@pytest.fixture(scope="module")
def learnt(folder: Path) -> Job:
    """A job whose model has learnt its rows: a model that makes sense of its tokenizer's ids."""
    finetune(config(folder, output="learnt", steps=60, method="full", lr=5e-3, check=False, eval_every=1000))
    settings = config(folder, lr=2e-3)
    return prepare(settings.model_copy(update={"model": str(folder / "learnt" / "model")}))


def test_ids_that_mean_other_words_to_the_model(learnt: Job) -> None:
    seen = rows.looked_at(learnt)
    with untouched(learnt):
        fine = tokenizer.check(learnt, seen[:4])
        wrong = tokenizer.check(learnt, [shifted(sample, 13) for sample in seen[:4]])
    assert fine.status == "passed", fine.measure
    assert_failed(wrong, "to this model the ids mean other words", "Use the tokenizer that the model was trained with")
    shown("tokenizer", wrong)


@pytest.mark.parametrize(
    ("lr", "measure", "fix"),
    [
        (1e-9, "steps at 1e-08 took the loss from", "Raise train.lr (now 1e-09)."),
        (1e3, "at a rate of 1000", "Lower train.lr (now 1000)."),
    ],
)
def test_a_rate_at_which_nothing_is_learnt(folder: Path, lr: float, measure: str, fix: str) -> None:
    assert_failed(overfitted(prepare(config(folder, lr=lr))), measure, fix)


def test_rows_that_contradict_each_other(job: Job) -> None:
    samples = [
        Sample(ids=[5, 6, 7, reply, 259], labels=[IGNORE, IGNORE, IGNORE, reply, 259]) for reply in (20, 21, 22, 23)
    ]
    damaged = replace(job, data=replace(job.data, train=Samples(samples)))
    # ln 4 for the first token of the reply, 0 for the second: 0.69 on average.
    found = overfitted(damaged)
    assert_failed(found, "no model can bring their loss under 0.69", "keep one reply for each prompt")
    assert "4 of 4 rows ask what another row asks" in found.measure
    shown("overfit", found)


def test_an_example_that_is_not_what_is_printed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    page = printed(failed("loss", "it is 5.7 on 1,024 rows", fix="Lower it."))
    monkeypatch.setattr(examples_, "examples", lambda: {"loss": page})
    shown("loss", failed("loss", "it is 5.6 on 1,024 rows", fix="Lower it."))
    for measure, fix in (("it is 9.7 on 1,024 rows", "Lower it."), ("it is 5.7 on 1,024 rows", "Raise it.")):
        with pytest.raises(AssertionError, match="has gone stale; now it is\nFAILED  loss"):
            shown("loss", failed("loss", measure, fix=fix))


def test_every_check_has_an_example_that_a_test_holds() -> None:
    modules = (accumulation, finite, overfit, packing, reach, resume, roundtrip, stops, tokenizer)
    assert set(examples()) == held() == {module.NAME for module in modules}


def test_unlike_texts_without_a_prompt_contradict_nothing() -> None:
    texts = [Sample(ids=[1, word, 9], labels=[IGNORE, word, 9]) for word in (5, 6, 7)]
    assert overfit.contradictions(texts) == (0.0, 0)


def test_a_run_does_not_begin_when_a_check_fails(folder: Path) -> None:
    with pytest.raises(RunError, match=r"the check 'reach' failed: .*train\.lr=1e-12.*Raise train\.lr"):
        finetune(config(folder, output="refused", lr=1e-12, check=True))
    assert not (folder / "refused").exists()


def test_the_short_form_asks_what_the_full_one_asks_first(job: Job) -> None:
    names = [check.name for check in preflight.short(job)]
    assert names == ["loss", "stop token", "packing", "reach", "accumulation", "round trip"]
    assert torch.is_grad_enabled()
