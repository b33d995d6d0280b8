"""The watch: each thing that goes wrong is planted, in real runs where possible, and what is said is asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decal import LoraConfig, get_peft_model
from decal.data.batch import Batch
from decal.model.evaluating import evaluating
from decal.model.wrapper import PeftModel
from decal.spec import TrainConfig
from decal.training import losses, optim
from decal.training import watch as watching
from decal.training.precision import Precision
from decal.training.step import StepResult, take_step
from decal.training.watch import Advice, Memory, Watch
from tests import models
from tests.failures.page import told

FP32 = Precision(name="fp32", device=torch.device("cpu"))


# --- numbers alone -------------------------------------------------------------------------------------------------


class Moving(nn.Module):
    """One weight that is moved before every step, so that the weights give no reason for advice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def result(loss: float, norm: float = 1.0, *, skipped: bool = False) -> StepResult:
    return StepResult(loss=loss, grad_norm=norm, count=10, tokens=10, skipped=skipped)


def numbers(
    steps: Iterable[StepResult],
    *,
    evaluations: dict[int, float] | None = None,
    memory: Memory | None = None,
    **train: Any,
) -> dict[str, str]:
    """Return what a watch says of these steps."""
    model, settings = Moving(), TrainConfig(**train)
    watch = Watch(model, optim.build(model, settings), settings, memory or Memory())
    advice: list[Advice] = [*watch.begin()]
    for number, one in enumerate(steps, start=1):
        with torch.no_grad():
            model.weight.add_(1)
        advice += watch.step(number, one, share=1.0)
        if evaluations and number in evaluations:
            advice += watch.evaluation(number, evaluations[number])
    assert len({one.kind for one in advice}) == len(advice)
    return {one.kind: one.text for one in advice}


def noisy(count: int, level: float = 2.0, wave: float = 0.3) -> list[float]:
    """Return losses that go up and down around a level."""
    return [level + wave * math.sin(2.4 * i) for i in range(count)]


def test_a_level_that_jumps_and_stays_is_a_spike() -> None:
    seen = numbers([result(loss) for loss in [*noisy(60), *noisy(8, level=6.0)]])
    assert seen == {
        "spike": "the loss jumped to 6.00 from about 1.99 at step 61: lower train.lr (0.0002) or "
        "train.max_grad_norm (1), or lengthen train.warmup (0 steps)"
    }


def test_one_step_far_above_all_that_was_is_a_spike_and_two_hard_batches_are_none() -> None:
    assert "jumped to 9.00" in numbers([result(loss) for loss in [*noisy(60), 9.0, *noisy(20)]])["spike"]
    assert numbers([result(loss) for loss in [*noisy(60), 4.5, 2.0, 4.8, *noisy(20)]]) == {}


def test_a_loss_above_all_of_the_start_is_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [result(loss) for loss in [*noisy(15), *noisy(12, level=9.0)]]
    what = "diverged: the loss has been above 2.72, worse than at the start, since step 16; lower train.lr "
    assert numbers(steps, lr=0.5)["diverged"] == f"{what}(0.5), to a tenth or less"
    monkeypatch.setattr(watching, "LARGE", 4)  # what is usual for large models says nothing of small ones
    usual = "0.0001 to 0.0005 is usual from 1B parameters on"
    assert numbers(steps, lr=0.5)["diverged"] == f"{what}(0.5; {usual}), to a tenth or less"


def test_a_loss_that_comes_back_to_where_it_began_is_divergence() -> None:
    down = [4.0 - 0.03 * i for i in range(100)]
    back = [1.0 + 0.03 * i for i in range(100)]
    seen = numbers([result(loss) for loss in [*down, *back, *[4.0] * 20]])
    assert seen["diverged"].startswith("diverged: the loss is back at ")
    assert "spike" not in seen


def test_a_gradient_of_zero_is_divergence() -> None:
    seen = numbers([*[result(3.0)] * 5, *[result(3.0, 0.0)] * 12])
    assert seen["diverged"].startswith(
        "diverged: the gradient has been zero since step 6, so nothing is learnt any more"
    )


def test_a_gradient_out_of_all_proportion() -> None:
    norms = [1 + 0.5 * math.sin(i) for i in range(40)]
    seen = numbers([*[result(2.0, norm) for norm in norms], result(2.0, 120.0)])
    assert seen == {
        "gradient": "the gradient's norm jumped to 120 from about 1.04 at step 41 and was cut to 1: look at that "
        "batch's rows; if it happens again, lower train.max_grad_norm or train.lr (0.0002)"
    }
    assert numbers([*[result(2.0, norm) for norm in norms], result(2.0, 9.0)]) == {}
    assert numbers([*[result(2.0, norm / 100) for norm in norms], result(2.0, 1.2)]) == {}  # clipping made it harmless


def test_steps_that_are_all_cut_to_a_small_part() -> None:
    seen = numbers(result(2.0, 310 + 50 * math.sin(i)) for i in range(120))
    assert seen["clipping"].startswith(
        "nearly every step is clipped: the gradient's norm is about 310, train.max_grad_norm 1"
    )
    assert "raise it to 621, or lower train.lr (0.0002)" in seen["clipping"]


def test_skipped_fp16_steps_are_counted() -> None:
    steps = [result(2.0, math.inf, skipped=True) if i % 6 else result(2.0) for i in range(50)]
    assert numbers(steps) == {
        "skipped": "41 of 50 steps skipped, for their fp16 gradients overflowed: use train.precision=bf16 or fp32, or "
        "lower train.lr (0.0002)"
    }
    told("29a", numbers(steps)["skipped"])
    search = [result(2.0, math.inf, skipped=True)] * 10 + [result(2.0)] * 40  # a scaler finding its scale
    assert numbers(search) == {}


def test_validation_up_while_training_goes_down_is_overfitting() -> None:
    losses_ = [2.0 * 0.97**i for i in range(100)]
    seen = numbers([result(loss) for loss in losses_], evaluations={20: 1.5, 40: 1.3, 60: 1.2, 80: 1.3, 100: 1.45})
    assert seen["overfit"] == (
        "overfitting: the held-out loss rose to 1.450 from 1.200 at step 60 while the training loss fell to "
        "0.133: train for fewer epochs, or set train.early_stopping; or raise lora_dropout (0.05 to 0.1), lower lora.r"
    )
    assert numbers([result(loss) for loss in losses_], evaluations={20: 1.5, 40: 1.3, 60: 1.31, 80: 1.32}) == {}


def test_each_thing_is_said_once_even_over_a_resume() -> None:
    bad = [result(loss) for loss in [*noisy(60), *noisy(8, level=6.0), *noisy(60), *noisy(8, level=6.0)]]
    memory = Memory()
    assert set(numbers(bad, memory=memory)) == {"spike"}
    again = Memory.of(json.loads(json.dumps(memory.__dict__)))
    assert again == memory
    assert numbers(bad, memory=again) == {}


# --- weights -------------------------------------------------------------------------------------------------------


def batch() -> Batch:
    ids = models.tokens(rows=4, length=16)
    return Batch(input_ids=ids, labels=ids, position_ids=None)


def walk(
    model: nn.Module, steps: int, *, batches: Callable[[int], Batch] | None = None, **train: Any
) -> dict[str, str]:
    """Train for real, watched, and return what was said."""
    settings = TrainConfig(**{"lr": 1e-2, **train})
    optimizer = optim.build(model, settings)
    watch = Watch(model, optimizer, settings, Memory())
    advice, scaler = [*watch.begin()], FP32.scaler()
    one, loss = batch(), losses.SFT(chunked=True)
    model.train()
    for number in range(1, steps + 1):
        group = [one if batches is None else batches(number)]
        done = take_step(model, group, loss, optimizer, scaler, precision=FP32, limit=settings.max_grad_norm)
        advice += watch.step(number, done, share=1.0)
    return {one.kind: one.text for one in advice}


def adapted(**settings: Any) -> Any:
    return get_peft_model(
        models.make("llama", torch.float32), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    )


def test_a_healthy_walk_says_nothing() -> None:
    assert walk(adapted(use_dora=True, lora_dropout=0.1, modules_to_save=["lm_head"]), 31) == {}


def test_b_matrices_that_no_gradient_reaches_are_counted() -> None:
    """As gradient checkpointing does where the inputs need no gradient: what lies before the cut never learns."""
    model = adapted()
    model.get_base_model().model.layers[0].register_forward_hook(lambda layer, args, out: out.detach())
    seen = walk(model, 3)
    told("10b", seen["dead"])
    assert seen == {
        "dead": "7/14 B matrices never moved in 3 steps, such as base_model.model.model.layers.0.self_attn.q_proj."
        "lora_B.default.weight: no gradient reaches them; check lora.target_modules, and that nothing detaches the "
        "layers' inputs"
    }


@pytest.mark.parametrize(
    ("part", "settings", "group"),
    [
        ("lora_magnitude_vector", {"use_dora": True}, "14/14 DoRA magnitudes"),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}, "1/1 modules_to_save tensors"),
        ("trainable_tokens_delta", {"trainable_token_indices": {"embed_tokens": [5, 6]}}, "1/1 trained token rows"),
    ],
)
def test_a_group_that_never_moves_is_named(part: str, settings: dict[str, Any], group: str) -> None:
    model = adapted(**settings)
    for name, parameter in model.named_parameters():
        if part in name and parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    assert walk(model, 3)["dead"].startswith(f"{group} never moved in 3 steps, such as base_model.model.")


def test_magnitudes_frozen_beside_their_adapter_are_named_before_the_first_step() -> None:
    model = adapted(use_dora=True)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.requires_grad_(False)
    seen = walk(model, 1)
    told("12a", seen["frozen"])
    assert seen == {
        "frozen": "14 of 14 DoRA magnitudes are frozen, so they will not learn: set requires_grad on them, or leave "
        "them out"
    }


def wide(dtype: torch.dtype, lr: float) -> dict[str, str]:
    """Train an adapter of a layer as wide as a 135M model's, in `dtype`, at that rate, and return what was said."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(576, 64, dtype=dtype))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]), autocast_adapter_dtype=False)
    settings = TrainConfig(lr=lr)
    optimizer = optim.build(model, settings)
    watch = Watch(model, optimizer, settings, Memory())
    advice: list[Advice] = []
    for number in range(1, 31):
        x = torch.randn(32, 576, dtype=dtype)
        loss = F.mse_loss(model(x).float(), x[:, :64].float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advice += watch.step(number, result(loss.item()), share=1.0)
    return {one.kind: one.text for one in advice}


def test_16_bit_adapters_at_a_small_rate_are_stalled_and_fp32_ones_are_not() -> None:
    seen = wide(torch.bfloat16, 2e-5)
    assert list(seen) == ["stalled"]
    share = int(seen["stalled"].split("%")[0])
    assert 50 <= share <= 95  # simulated for 300 steps: 81% of A at this width; these are 20 steps
    assert seen["stalled"].endswith(
        "of the entries of the A matrices stood still over 20 steps: at train.lr=2e-05 a step is rounded away in "
        "bfloat16; keep adapters in fp32 (autocast_adapter_dtype=True) or raise train.lr"
    )
    told("11a", seen["stalled"])
    assert wide(torch.float32, 2e-5) == {}
    assert wide(torch.bfloat16, 5e-4) == {}


def test_some_poisoned_batches_are_seen_in_a_real_run() -> None:
    good = batch()
    wrong = Batch(input_ids=good.input_ids, labels=good.labels.flip(0, 1).contiguous(), position_ids=None)
    seen = walk(adapted(), 63, batches=lambda number: wrong if number >= 58 else good, lr=3e-2)
    assert seen["spike"].endswith(" at step 60: lower train.lr (0.03), to a tenth or less")


@pytest.mark.parametrize(
    ("settings", "text", "key"),
    [
        ({"r": 16, "lora_alpha": 32, "use_rslora": True}, "lora_alpha / sqrt(r), is 8 (r=16, lora_alpha=32)", "8b"),
        ({"r": 4, "lora_alpha": 400}, "lora_alpha / r, is 100 (r=4, lora_alpha=400)", "8c"),
        ({"r": 64, "lora_alpha": 1}, "lora_alpha / r, is 0.01562 (r=64, lora_alpha=1)", "8d"),
    ],
)
def test_a_scale_outside_the_usual_is_said_before_the_first_step(settings: dict[str, Any], text: str, key: str) -> None:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(target_modules=["q_proj"], **settings))
    seen = walk(model, 1)
    assert text in seen["scale"]
    told(key, seen["scale"])


def test_scales_in_use_are_not_commented_on() -> None:
    for settings in (
        {"r": 64, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 32},
        {"r": 16, "lora_alpha": 8, "use_rslora": True},
    ):
        model = get_peft_model(models.make("llama", torch.float32), LoraConfig(target_modules=["q_proj"], **settings))
        assert walk(model, 1) == {}


# --- modes ---------------------------------------------------------------------------------------------------------


def test_evaluation_mode_while_training_is_mended_and_said() -> None:
    model = adapted(lora_dropout=0.5)
    settings = TrainConfig()
    watch = Watch(model, optim.build(model, settings), settings, Memory())
    model.train()
    assert list(watch.evaluation(1, 3.0)) == []
    model.eval()  # as a measurement does that forgets to give the mode back
    (advice,) = watch.evaluation(2, 3.0)
    assert advice.text == (
        "14 dropout layers were in evaluation mode while training: set back to training mode; the "
        "steps before had no dropout"
    )
    told("27a", advice.text)
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout))


class Stubborn(nn.Dropout):
    """A dropout that does not follow eval()."""

    def train(self, mode: bool = True) -> Stubborn:
        return self


def test_dropout_is_off_at_evaluation_even_where_a_module_does_not_follow() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Stubborn(0.5))
    x = torch.randn(4, 8)
    with evaluating(model):
        assert torch.equal(model(x), model(x))
    assert model[1].training


def test_no_cache_is_kept_while_training() -> None:
    model = adapted()
    model.config.use_cache = True
    caches: list[Any] = []
    body = model.get_base_model().model
    body.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    walk(model, 1)
    with evaluating(model):
        losses.SFT(chunked=True)(model, batch())
    assert caches == [None, None]


def test_watching_changes_no_bit() -> None:
    """The walk of one model with and without the watch ends in equal weights."""
    ends = []
    for watched in (True, False):
        torch.manual_seed(0)
        model: PeftModel = adapted(lora_dropout=0.1)
        settings = TrainConfig(lr=1e-2)
        optimizer = optim.build(model, settings)
        watch = Watch(model, optimizer, settings, Memory()) if watched else None
        model.train()
        for number in range(1, 12):
            args = (model, [batch()], losses.SFT(chunked=True), optimizer, FP32.scaler())
            done = take_step(*args, precision=FP32, limit=1.0)
            if watch is not None:
                assert list(watch.step(number, done, share=1.0)) == []
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
