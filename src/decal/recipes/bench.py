"""Measure decal's training step on this machine, on a model of any configuration with random weights.

What is timed is the step that `decal train` takes: the same loss, optimizer, lean layers and precision. A benchmark
that learns nothing measures nothing: the loss must fall, and the gradient must not be zero.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from decal.data.batch import Batch
from decal.errors import RunError
from decal.model.lean import general_note, lean, require_fp8
from decal.model.random import random_model
from decal.model.wrapper import PeftModel
from decal.ops import workspace
from decal.spec import LoraConfig, QuantConfig, TaskType, TrainConfig
from decal.training import losses, optim, precision
from decal.training.graphs import Graphs
from decal.training.losses import Loss
from decal.training.paged import Paged
from decal.training.precision import Precision
from decal.training.step import backward, take_step

WARM_UP = 4  # steps: allocator, autotuning, the first fp32 moments; on a card the fourth is recorded
RESET = 2  # steps after which the peak of memory is counted: what is replayed allocates as it is recorded
SQUARE = {"cuda": 8192, "cpu": 2048}  # of the products that the machine's own rate is measured with


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every system is to do: `rows` rows of `length` random tokens in each step, all of them learnt."""

    model: str
    rows: int = 1
    length: int = 2048
    rank: int = 16
    quantize: Literal["nf4", "fp4", "int8"] | None = None
    recompute: bool = False
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    lr: float = 1e-3  # large enough for the loss on one repeated batch to fall within a few steps
    steps: int = 6
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One system's figures. Times are medians in seconds; memory is in bytes: on a card max allocated and max reserved,
    elsewhere None. `flops` are the model's own in one step, whatever is computed twice."""

    system: str
    device: str
    precision: str
    seconds: float
    fastest: float
    tokens_per_s: float
    flops: float
    rate: float  # FLOP/s of a large product here, in the same precision; of 16 bits where the work is in 8
    parts: dict[str, float]  # seconds of the forward pass, the backward pass and the optimizer
    peak: int | None
    reserved: int | None
    first_loss: float
    last_loss: float
    grad_norm: float

    @property
    def utilisation(self) -> float:
        """The model's FLOP/s as a share of a large product's."""
        return self.flops / self.seconds / self.rate


def bench(work: Work, say: Callable[[str], object] = lambda text: None) -> Bench:
    """Measure decal; `say` is told where layers or steps take a slower way.

    Raises RunError if the loss does not fall or the gradient is zero.
    """
    numbers = precision.resolve(work.precision, precision.pick_device(work.device))
    rate = product_rate(numbers)
    model = PeftModel(
        random_model(
            work.model,
            device=numbers.device,
            dtype=numbers.dtype,
            quantize=None if work.quantize is None else QuantConfig(format=work.quantize),
            seed=work.seed,
        ),
        LoraConfig(r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", task_type=TaskType.CAUSAL_LM),
        generator=torch.Generator().manual_seed(work.seed),
    )
    if numbers.fp8:
        require_fp8(model, numbers.dtype)
    if work.recompute:
        model.gradient_checkpointing_enable()
    model.train()
    loss = losses.sft(model, lambda text: None)
    optimizer = optim.build(model, TrainConfig(lr=work.lr, optimizer=work.optimizer))
    batch = batch_of(work, vocabulary=model.get_base_model().config.vocab_size)  # type: ignore[union-attr, arg-type]
    scaler = numbers.scaler()

    paged = isinstance(optimizer, Paged)  # its states watch every backward pass, as in training
    run = backward if paged else Graphs(numbers, say=say).backward

    def step() -> tuple[float, float]:
        result = take_step(model, [batch], loss, optimizer, scaler, precision=numbers, limit=math.inf, run=run)
        return result.loss, result.grad_norm

    with lean(model, fp8=numbers.fp8):
        if (slower := general_note(model, numbers.dtype)) is not None:
            say(slower)
        figures = timed(step, work, numbers.device)
        parts = parts_of(model, batch, loss, optimizer, numbers)
    workspace.release()
    return Bench(
        system="decal",
        device=device_name(numbers.device),
        precision=numbers.setting,
        flops=model_flops(model, work),
        rate=rate,
        parts=parts,
        **figures,
    )


def batch_of(work: Work, *, vocabulary: int) -> Batch:
    """Return the batch that is learnt again and again: random tokens, the same for every system."""
    generator = torch.Generator().manual_seed(work.seed + 1)
    ids = torch.randint(vocabulary, (work.rows, work.length), generator=generator)
    return Batch(input_ids=ids, labels=ids, position_ids=None)


def timed(step: Callable[[], tuple[float, float]], work: Work, device: torch.device) -> dict[str, Any]:
    """Run warm-up and timed steps of (loss, gradient norm) and return what Bench holds of them."""
    seconds, seen = [], []
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what building the model has left
    for number in range(WARM_UP + work.steps):
        if number == RESET and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = now(device)
        seen.append(step())
        seconds.append(now(device) - began)
    (first, _), (last, norm) = seen[0], seen[-1]
    if not (last < first and norm > 0):
        raise RunError(
            "the benchmark learnt nothing, so its speed means nothing",
            got=f"loss {first:.4f} -> {last:.4f}, gradient norm {norm:.3g}",
            fix="Give more --steps.",
        )
    median = statistics.median(seconds[WARM_UP:])
    card = device.type == "cuda"
    return {
        "seconds": median,
        "fastest": min(seconds[WARM_UP:]),
        "tokens_per_s": work.tokens / median,
        "peak": torch.cuda.max_memory_allocated(device) if card else None,
        "reserved": torch.cuda.max_memory_reserved(device) if card else None,
        "first_loss": first,
        "last_loss": last,
        "grad_norm": norm,
    }


def parts_of(
    model: nn.Module, batch: Batch, loss: Loss, optimizer: torch.optim.Optimizer, numbers: Precision
) -> dict[str, float]:
    """Return the seconds of each part of one step, waited for one by one and launched kernel by kernel.

    Their sum is more than a step, most of all where that is recorded.
    """
    began = now(numbers.device)
    with numbers.autocast():
        total, count = loss(model, batch)
    forward = now(numbers.device)
    (total / count).backward()  # type: ignore[no-untyped-call]  # torch's
    both = now(numbers.device)
    optimizer.step()
    moved = now(numbers.device)
    optimizer.zero_grad(set_to_none=True)
    return {
        "forward": forward - began,
        "backward": both - forward,
        "optimizer": moved - both,
    }


def model_flops(model: nn.Module, work: Work) -> float:
    """Return the FLOPs that one step needs: 4 for each frozen weight in a product and token (forward, and the input's
    gradient), 6 for each trained one, and 7 products of causal attention, 2 forward and 5 backward.

    Nothing computed again counts, nor do embeddings, norms and other elementwise work.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inner: Any = model
    config = inner.get_base_model().config
    frozen = inner.get_nb_trainable_parameters()[1] - trained
    embedding = inner.get_base_model().get_input_embeddings().weight
    if inner.get_base_model().get_output_embeddings().weight is not embedding:
        frozen -= embedding.numel()  # a table that is read, not multiplied by
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    one = config.num_hidden_layers * work.rows * work.length**2 * width  # multiply-adds of one causal product, times 2
    return float((4 * frozen + 6 * trained) * work.tokens + 7 * one)


def product_rate(numbers: Precision) -> float:
    """Return the FLOP/s of a large square product on this device in this precision: the best of five."""
    n = SQUARE.get(numbers.device.type, 2048)
    a, b = (torch.randn(n, n, device=numbers.device, dtype=numbers.dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        began = now(numbers.device)
        torch.mm(a, b)
        best = min(best, now(numbers.device) - began)
    return 2 * n**3 / best


def now(device: torch.device) -> float:
    """Return the time in seconds at which the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """Return what the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type
