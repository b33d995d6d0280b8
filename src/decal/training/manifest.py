"""What a run writes down about itself: versions, settings, machine, sizes, outcome."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from decal.layers.coded import uncounted
from decal.rundir import RunDir
from decal.training.job import Job
from decal.training.state import Progress

PACKAGES = ("decal", "torch", "transformers", "safetensors", "datasets", "tokenizers")


def facts(job: Job) -> dict[str, Any]:
    """Return what is known before the first step."""
    device = job.numbers.device
    trainable, total = count(job.model)
    return {
        "config": job.config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "precision": job.numbers.setting,
        "parameters": {"trainable": trainable, "total": total, "percent": 100 * trainable / total},
        "data": job.data.ledger.to_dict(),
        "evaluation": None if job.data.eval_ledger is None else job.data.eval_ledger.to_dict(),
    }


def count(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameters; a weight used twice counts once."""
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters) + uncounted(model)
    return sum(p.numel() for p in parameters if p.requires_grad), total


def outcome(run: RunDir, progress: Progress, *, kept: int, seconds: float) -> dict[str, Any]:
    """Return what is known after the last step."""
    return {
        "steps": progress.step,
        "kept_step": kept,
        "stopped": progress.stopped,
        "loss": last(run, "step", "loss"),
        "eval_loss_before": eval_loss(run, 0),
        "eval_loss": eval_loss(run, kept),
        "tokens": progress.tokens,
        "loss_tokens": progress.loss_tokens,
        "train_seconds": round(progress.seconds, 3),
        "seconds": round(seconds, 3),
    }


def last(run: RunDir, kind: str, field: str) -> float | None:
    """Return a field of the last event of a kind."""
    values = [event[field] for event in run.events() if event["kind"] == kind]
    return values[-1] if values else None


def eval_loss(run: RunDir, step: int) -> float | None:
    """Return the evaluation loss at a step."""
    values = [event["loss"] for event in run.events() if event["kind"] == "eval" and event["step"] == step]
    return values[-1] if values else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
