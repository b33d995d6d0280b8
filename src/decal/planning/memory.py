"""What a run takes at its largest: in training, in evaluation, in saving and in merging, each by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
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
        most = max(phase.peak for phase in self.phases)
        if self.wanted.device == "cuda":
            return int(most * (1 + RESERVE)) + CONTEXT
        return most + max(0, self.resident - self.phase("training").peak)

    @cached_property
    def resident(self) -> int:
        """Bytes of resident memory that training on a CPU adds to the process: tensors, and holes between them."""
        return heap.resident(self.work.blocks, self.work.first)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def forecast(wanted: Wanted) -> Forecast:
    """Return what a run of `wanted` takes, from the model's configuration. Raises DecalError as training would."""
    model = empty.trainable(wanted)
    step = shapes.training_step(model, wanted)
    parameters, config = list(model.parameters()), model.config.get_text_config()
    training = _phase("training", step, wanted)
    evaluation = _evaluation(model, training, wanted)
    return Forecast(
        wanted=wanted,
        phases=(training, evaluation, _saving(training, wanted), _merging(model, wanted)),
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


def _evaluation(model: Any, training: Phase, wanted: Wanted) -> Phase:
    held = dict.fromkeys(PARTS, 0) | still(training)
    if not wanted.evaluates:
        return Phase(name="evaluation", parts=held)
    rows = replace(wanted, length=wanted.eval_length or wanted.length)
    return Phase(name="evaluation", parts=_phase("", shapes.evaluation(model, rows), wanted).parts | still(training))


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
    if wanted.full:
        return Phase(name="merging", parts=dict.fromkeys(PARTS, 0))
    counts = [m.weights if isinstance(m, Coded) else m.weight.numel() for m in _matrices(model)]
    adapted = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    widest = max((m.in_features * m.out_features for m in adapted), default=0)
    embedding: nn.Module = original(model.get_base_model().get_input_embeddings())
    edges = sum(p.numel() * 2 for p in embedding.parameters())
    return Phase(
        name="merging", parts=dict.fromkeys(PARTS, 0), host=edges + min(2 * sum(counts), SHARD) + 3 * 4 * widest
    )


def _matrices(model: nn.Module) -> list[Any]:
    """Return the frozen layers that have a weight of two dimensions or codes of one."""
    held: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    return [m for m in held if not m.weight.requires_grad and (isinstance(m, Coded) or m.weight.dim() > 1)]
