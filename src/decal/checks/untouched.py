"""Try things on a job and leave no trace: weights, buffers, modes, positions and generators end in the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from decal.model.lean import lean
from decal.training.job import Job


@contextmanager
def untouched(job: Job, *, weights: bool = True) -> Iterator[None]:
    """Put everything that a step moves back at the end of the block, which runs as training does (lean forms).

    `weights=False` keeps no copy of the weights: for a block that moves none. Gradients are dropped.
    """
    model, position = job.model, dict(job.batches.state_dict())
    modes = {module: module.training for module in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    kept = [(p, p.detach().clone()) for p, moves in wanted.items() if moves] if weights else []
    kept += [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with _generators(job.numbers.device), lean(model, fp8=job.numbers.fp8):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        for parameter, moves in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(moves)
        for module, training in modes.items():
            module.training = training
        job.batches.load_state_dict(position)


@contextmanager
def _generators(device: torch.device) -> Iterator[None]:
    """Restore Python's, numpy's and torch's global generators at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Compute in evaluation mode in the block: two passes over the same tokens must agree."""
    model.eval()
    try:
        yield
    finally:
        model.train()
