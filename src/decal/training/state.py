"""Checkpoints: everything that decides how training goes on, as safetensors and JSON.

A checkpoint folder holds
  trainable.safetensors   every trainable parameter by name
  optimizer.safetensors   the optimizer's tensors as `<slot>:<parameter name>`, in their own dtypes; docs/files.md has
                          the slots. Paged or not is the same file
  rng.safetensors         the states of torch's generators: `cpu`, `cuda:0`, ...
  state.json              progress, data position, loss scale, and the states of `random` and numpy
  adapter/                the adapter in PEFT's format (method lora only; nothing here reads it back)
  complete.json           the size and SHA-256 of each file; written last, by RunDir
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from decal import rundir
from decal.errors import DecalError, RunError
from decal.reading import because, read_json
from decal.training.paged import Paged
from decal.training.watch import Memory
from decal.words import counted

TRAINABLE, OPTIMIZER, RNG, STATE = "trainable.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"


class Resumable(Protocol):
    """Something with a position: the data."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(kw_only=True)
class Progress:
    """How far a run has come; all of it survives in the checkpoint."""

    step: int = 0
    tokens: int = 0  # read by the model, padding included
    loss_tokens: int = 0
    seconds: float = 0.0  # of training, over all sittings
    evaluated: int | None = None  # the last step that was evaluated
    best_loss: float | None = None  # of an evaluation after training began
    best_step: int | None = None
    worse: int = 0  # evaluations since the best one
    skipped: int = 0  # fp16 steps in a row whose gradient overflowed
    cut: int = 1  # parts that each micro-batch is cut into, since memory ran out
    watch: Memory = field(default_factory=Memory)
    stopped: str | None = None  # why the run was ended before its time, and the step whose weights it falls back on
    kept: int | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> Progress:
        """Return what a checkpoint says; one from before there was a watch remembers nothing of it."""
        return cls(**{**values, "watch": Memory.of(values.get("watch", {}))})


@dataclass(kw_only=True)
class Training:
    """All that changes while a run trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: Resumable
    progress: Progress


def save(run: rundir.RunDir, training: Training, save_adapter: Callable[[Path], object] | None = None) -> Path:
    """Write checkpoints/step-N whole or not at all and return its path."""
    step = training.progress.step
    try:
        with run.checkpoint(step, best=training.progress.best_step) as folder:
            save_file(trainable(training.model), folder / TRAINABLE)
            save_file(_optimizer_tensors(training), folder / OPTIMIZER)
            save_file(_generators(), folder / RNG)
            rundir.write_json(folder / STATE, _state(training))
            if save_adapter is not None:
                save_adapter(folder / rundir.ADAPTER)
    except rundir.NotWritten as error:
        whole = run.checkpoints()
        raise RunError(
            f"the checkpoint of step {step} could not be written ({error.reason})",
            got=run.path,
            fix=f"Make room, then go on with --resume from {whole[-1].name}."
            if whole
            else "Make room and start again: no checkpoint has been written yet.",
        ) from error
    return run.path / rundir.CHECKPOINTS / f"step-{step}"


def check(folder: Path) -> None:
    """Raise RunError for a checkpoint that cannot be gone on from, before anything else is read.

    Every byte of it is compared with what was written, and of the best one that `keep_best` will want.
    """
    _refuse_altered(folder)
    best = _read_state(folder)["progress"]["best_step"]
    if best is not None and best != rundir.step_of(folder):
        _refuse_altered(folder.with_name(f"step-{best}"))


def _refuse_altered(folder: Path) -> None:
    found = rundir.altered(folder, (TRAINABLE, OPTIMIZER, RNG, STATE))
    if found is not None:
        raise _damaged(folder, *found)


def load(folder: Path, training: Training) -> None:
    """Put everything back as `save` found it, the random generators last. Raises RunError for a damaged file."""
    load_trainable(folder, training.model)
    _load_optimizer(training, _read_tensors(folder / OPTIMIZER))
    state = _read_state(folder)
    generators = _read_tensors(folder / RNG)
    with _reading(folder / STATE):
        training.progress.__dict__.update(Progress.of(state["progress"]).__dict__)
        training.batches.load_state_dict(state["data"])
        training.scaler.load_state_dict(state["scaler"])
    with _reading(folder / RNG):
        _restore_generators(generators, state["random"])


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn whatever a damaged file of a checkpoint raises in the block into a RunError that says how to go on."""
    try:
        yield
    except DecalError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(file.parent, file, because(error)) from None


def _damaged(folder: Path, file: Path, why: str) -> RunError:
    step, whole = rundir.step_of(folder), rundir.RunDir(folder.parent.parent).checkpoints()
    older = [path.name for path in whole if rundir.step_of(path) < step]
    later = [path.name for path in whole if rundir.step_of(path) > step]  # --resume would take the last of them
    return RunError(
        f"{file.name} of the checkpoint {folder.name} is damaged or missing ({why})",
        got=file,
        fix=f"Delete {' and '.join([folder.name, *later])} in {folder.parent}, and --resume "
        + (f"goes on from {older[-1]}." if older else "begins the run again: there is no older checkpoint."),
    )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with _reading(file):
        return load_file(file)


def _read_state(folder: Path) -> dict[str, Any]:
    with _reading(folder / STATE):
        state: dict[str, Any] = read_json(folder / STATE)
        Progress.of(state["progress"])
        if not all(isinstance(state[key], dict) for key in ("data", "scaler", "random")):
            raise TypeError("data, scaler and random must be objects")
        return state


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name, detached and on the CPU."""
    return {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def load_trainable(folder: Path, model: nn.Module) -> None:
    """Copy a checkpoint's parameters into the model; their names and shapes must be exactly the model's."""
    stored = _read_tensors(folder / TRAINABLE)
    here = {n: p for n, p in model.named_parameters() if p.requires_grad}
    _refuse(sorted(stored.keys() ^ here.keys()) or [n for n, p in here.items() if p.shape != stored[n].shape])
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(stored[name])


def _refuse(odd: list[str]) -> None:
    if odd:
        raise RunError(
            f"the checkpoint does not fit the model in {counted(len(odd), 'parameter')}",
            got=", ".join(odd[:3]),
            fix="Resume with the model and adapter settings that the run was started with.",
        )


def keep_best(run: rundir.RunDir, progress: Progress, model: nn.Module) -> int:
    """Give the model the weights of the best evaluation, if there was one, or those that a stopped run falls back on;
    return the step whose weights it has."""
    kept = progress.step if progress.best_step is None else progress.best_step
    kept = kept if progress.kept is None else progress.kept
    if kept != progress.step:
        folder = run.path / rundir.CHECKPOINTS / f"step-{kept}"
        _refuse_altered(folder)
        load_trainable(folder, model)
    return kept


def _named(training: Training) -> dict[str, nn.Parameter]:
    return {name: p for name, p in training.model.named_parameters() if p.requires_grad}


def _optimizer_tensors(training: Training) -> dict[str, Tensor]:
    state = training.optimizer.state
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(training).items():
        for slot, value in state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"{slot} is {type(value)}: the optimizers hold tensors only"
            tensors[f"{slot}:{name}"] = value.detach().cpu().contiguous()
    return tensors


def _load_optimizer(training: Training, tensors: dict[str, Tensor]) -> None:
    named = _named(training)
    _refuse(sorted({key.partition(":")[2] for key in tensors} - named.keys()))
    fused, paged = training.optimizer.defaults.get("fused"), isinstance(training.optimizer, Paged)
    training.optimizer.state.clear()
    for key, value in tensors.items():
        slot, _, name = key.partition(":")
        # An unfused AdamW counts its steps on the CPU; a paged one takes its states to the card itself, if they fit.
        there = fused if slot == "step" else not paged
        training.optimizer.state[named[name]][slot] = value.to(named[name].device) if there else value


def _state(training: Training) -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return {
        "progress": asdict(training.progress),
        "data": dict(training.batches.state_dict()),
        "scaler": training.scaler.state_dict(),
        "random": {
            "python": [version, list(words), gauss_next],
            "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
        },
    }


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_generators(states: dict[str, Tensor], others: dict[str, Any]) -> None:
    version, words, gauss_next = others["python"]
    random.setstate((version, tuple(words), gauss_next))
    kind, keys, position, has_gauss, gauss = others["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for name, state in states.items():
            if name != "cpu" and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, name)
