"""Evaluation mode for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off and gradients off in the block; give every module its own mode back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    for module in model.modules():  # some modules do not follow eval(): their dropout would blur what is measured
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
