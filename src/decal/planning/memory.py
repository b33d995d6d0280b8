"""What a run takes at its largest: in training, in evaluation, in saving and in merging, each by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from decal.files.checkpoint import SHARD
from decal.layers.adapted import AdaptedLinear
from decal.layers.coded import Coded, uncounted
from decal.model.targets import original
from decal.planning import empty, heap, shapes
from decal.planning.shapes import EDGES, FROZEN, OPTIMIZER, PARTS, TRAINED, WORKSPACE, Counted
from decal.planning.wanted import Wanted

GIB = 2**30
# cuBLAS takes its workspace through torch's allocator: torch 2.11's default on Hopper is 4096 x 8 KiB.
CUBLAS = 32 << 20
# Outside the allocator, and so in no figure of torch: CUDA's own context with torch's and cuBLAS' kernels loaded.
CONTEXT = 600 << 20
RESERVE = 0.03  # of what the allocator gives out, in holes between blocks: what a card must have beyond the peak


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The peak of one phase in bytes: on the device that trains, and (`host`) in the computer's memory beside it."""

    name: str
    parts: dict[str, int]
    host: int = 0

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return {"peak": self.peak, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take. `work` is of one micro-batch's step; `parameters` as PEFT counts them."""

    wanted: Wanted
    phases: tuple[Phase, ...]
    work: Counted
    trainable: int
    parameters: int
    positions: int | None  # the longest row that the model was made for
    dtype_assumed: bool  # the configuration does not say how the weights are stored

    @property
    def peak(self) -> int:
        """Bytes of tensors at the largest moment of training or evaluation."""
        return max(phase.peak for phase in self.phases[:2])

    @property
    def needed(self) -> int:
        """Bytes that the device must have: on a card, what lies outside the allocator and its holes are added."""
        most = max(phase.peak for phase in self.phases[:3])  # merging is no part of the run
        if self.wanted.device == "cuda":
            return int(on_card(most))
        return most + max(0, self.resident - self.phase("training").peak)

    def needed_at(self, peak: float) -> float:
        """Return about what the device must have for another peak of training."""
        return on_card(peak) if self.wanted.device == "cuda" else peak * self.needed / self.phase("training").peak

    @cached_property
    def resident(self) -> int:
        """Bytes of resident memory that training on a CPU adds to the process: tensors, and holes between them."""
        return heap.resident(self.work.blocks, self.work.first)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def on_card(peak: float) -> float:
    """Return what a card must have for tensors of `peak` bytes."""
    return peak * (1 + RESERVE) + CONTEXT


@dataclass(kw_only=True)
class Known:
    """What has been counted, for further forecasts: models, steps and evaluations, by the settings that decide them."""

    models: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Counted] = field(default_factory=dict)
    evaluations: dict[str, dict[str, int]] = field(default_factory=dict)

    def model(self, wanted: Wanted) -> Any:
        """Return the model as training would have it."""
        key = repr((_base(wanted), wanted.train.gradient_checkpointing))
        if key not in self.models:
            self.models[key] = empty.trainable(wanted)
        return self.models[key]

    def step(self, wanted: Wanted) -> Counted:
        """Return one step of training, counted."""
        key = repr(replace(wanted, evaluates=True, eval_length=None))
        if key not in self.steps:
            self.steps[key] = shapes.training_step(self.model(wanted), wanted)
        return self.steps[key]

    def evaluation(self, wanted: Wanted) -> dict[str, int]:
        """Return the parts of one micro-batch's evaluation, which neither optimizer nor recomputing changes."""
        rows = replace(wanted, length=wanted.eval_length or wanted.length)
        key = repr((_base(rows), rows.train.micro_batch, rows.length, rows.packed, rows.loss_rows))
        if key not in self.evaluations:
            self.evaluations[key] = _phase("", shapes.evaluation(self.model(wanted), rows), rows).parts
        return self.evaluations[key]


def _base(w: Wanted) -> tuple[object, ...]:
    return w.model, w.revision, w.lora, w.train.method, w.quantize, w.device, w.numbers


def forecast(wanted: Wanted, known: Known | None = None) -> Forecast:
    """Return what a run of `wanted` takes, from the model's configuration. Raises DecalError as training would.

    `known` holds what earlier forecasts counted and takes what this one counts.
    """
    known = known or Known()
    model, step = known.model(wanted), known.step(wanted)
    parameters, config = list(model.parameters()), model.config.get_text_config()
    training = _phase("training", step, wanted)
    held = dict.fromkeys(PARTS, 0) | still(training)
    evaluation = (known.evaluation(wanted) if wanted.evaluates else held) | still(training)
    return Forecast(
        wanted=wanted,
        phases=(
            training,
            Phase(name="evaluation", parts=evaluation),
            _saving(training, wanted),
            _merging(model, wanted),
        ),
        work=step,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        parameters=sum(p.numel() for p in parameters) + uncounted(model),
        positions=getattr(config, "max_position_embeddings", None),
        dtype_assumed=model.config.dtype is None and not wanted.stored_wide,
    )


def _phase(name: str, counted: Counted, wanted: Wanted) -> Phase:
    parts = {part: round(size) for part, size in counted.parts.items()}
    if wanted.device == "cuda":
        parts[WORKSPACE] += CUBLAS
    return Phase(name=name, parts=parts)


def still(training: Phase) -> dict[str, int]:
    """Return what is there whatever the phase."""
    return {part: training.parts[part] for part in (FROZEN, EDGES, TRAINED, OPTIMIZER)}


def _saving(training: Phase, wanted: Wanted) -> Phase:
    """A checkpoint's tensors go through the host: once as they are, once as the bytes of the file."""
    held = dict.fromkeys(PARTS, 0) | still(training)
    state = training.parts[TRAINED] + training.parts[OPTIMIZER]
    if wanted.device == "cuda":
        return Phase(name="saving", parts=held, host=2 * state)
    return Phase(name="saving", parts={**held, WORKSPACE: state})


def _merging(model: Any, wanted: Wanted) -> Phase:
    """`decal merge` sums one weight at a time on the host: a file that fills up, and one weight's wide copies."""
    parts = dict.fromkeys(PARTS, 0)
    if wanted.full:
        return Phase(name="merging", parts=parts)
    counts = [m.weights if isinstance(m, Coded) else m.weight.numel() for m in _matrices(model)]
    adapted = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    widest = max((m.in_features * m.out_features for m in adapted), default=0)
    embedding: nn.Module = original(model.get_base_model().get_input_embeddings())
    held = {
        EDGES: sum(p.numel() * 2 for p in embedding.parameters()),
        FROZEN: min(2 * sum(counts), SHARD),
        WORKSPACE: 3 * 4 * widest,
    }
    if wanted.device == "cuda":
        return Phase(name="merging", parts=parts, host=sum(held.values()))
    return Phase(name="merging", parts=parts | held)


def _matrices(model: nn.Module) -> list[Any]:
    """Return the frozen layers that have a weight of two dimensions or codes of one, each once."""
    named = (m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
    held: list[Any] = list({id(m.weight): m for m in named}.values())  # an adapted layer answers for its base
    return [m for m in held if not m.weight.requires_grad and (isinstance(m, Coded) or m.weight.dim() > 1)]
