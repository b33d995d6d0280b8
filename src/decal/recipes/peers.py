"""Other libraries' training step on the very work of `decal bench`: PEFT, with bitsandbytes and Liger where installed.

Run as `python -m decal.recipes.peers WORK SYSTEM`, with the work as JSON: each system has a process of its own, because
some of these libraries change transformers for good. This is the one file of decal that imports them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from decal.errors import RunError
from decal.model.inject import place
from decal.model.random import random_model
from decal.model.targets import output_head
from decal.recipes import bench
from decal.recipes.bench import Bench, Work
from decal.training import precision

NEEDS = {"peft": ("peft",), "peft+liger": ("peft", "liger_kernel")}  # and bitsandbytes, where the base is quantised


def installed(work: Work) -> tuple[list[str], list[str]]:
    """Return the systems that can do the work here, and those that cannot with what they lack."""
    there, lacking = [], []
    for system, packages in NEEDS.items():
        wanted = (*packages, *(("bitsandbytes",) if work.quantize else ()))
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        on_cpu = "liger_kernel" in wanted and precision.pick_device(work.device).type != "cuda"
        if missing or on_cpu:
            lacking.append(f"{system} (needs {', '.join(missing) or 'a CUDA card'})")
        else:
            there.append(system)
    return there, lacking


def measure(work: Work, system: str) -> Bench:
    """Measure one system in a process of its own. Raises RunError with its last words if it fails."""
    words = [sys.executable, "-m", "decal.recipes.peers", json.dumps(asdict(work)), system]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{system} could not do the work", got=last, fix="Leave --peers out, or give smaller work.")
    return Bench(**json.loads(done.stdout.strip().splitlines()[-1]))


def peft_bench(work: Work, *, liger: bool, rate: float) -> Bench:
    """Return PEFT's figures: its own defaults (fp32 adapters, autocast), AdamW from torch."""
    import peft

    numbers = precision.resolve(work.precision, precision.pick_device(work.device))
    base: Any = random_model(work.model, device=numbers.device, dtype=numbers.dtype, seed=work.seed)
    if work.quantize is not None:
        quantize(base, work.quantize)
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=base)
    settings = peft.LoraConfig(
        r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings).train()
    if work.recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = bench.batch_of(work, vocabulary=base.config.vocab_size).to(numbers.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0, fused=True)
    parts: dict[str, float] = {}

    def step() -> tuple[float, float]:
        began = bench.now(numbers.device)
        with numbers.autocast():
            loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        forward = bench.now(numbers.device)
        loss.backward()
        both = bench.now(numbers.device)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved = bench.now(numbers.device)
        parts.update(forward=forward - began, backward=both - forward, optimizer=moved - both)
        return loss.item(), norm.item()

    figures = bench.timed(step, work, numbers.device)
    return Bench(
        system="peft+liger" if liger else "peft",
        device=bench.device_name(numbers.device),
        precision=numbers.setting,
        flops=0.0,  # the same work: decal's figure holds
        rate=rate,
        parts=dict(parts),
        **figures,
    )


def quantize(model: nn.Module, kind: str) -> None:
    """Put bitsandbytes' 4-bit layers, doubly quantised, in the place of the linear ones."""
    import bitsandbytes as bnb

    head = output_head(model)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=module.weight.dtype,
            compress_statistics=True,
            quant_type=kind,
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type=kind
        )
        layer.bias = module.bias
        place(model, name, layer.to(module.weight.device))


SYSTEMS: dict[str, Callable[[Work, float], Bench]] = {
    "peft": lambda work, rate: peft_bench(work, liger=False, rate=rate),
    "peft+liger": lambda work, rate: peft_bench(work, liger=True, rate=rate),
}


def main() -> None:
    """Measure the system that the command line names and write its figures as one line of JSON to stdout."""
    work = Work(**json.loads(sys.argv[1]))
    numbers = precision.resolve(work.precision, precision.pick_device(work.device))
    found = SYSTEMS[sys.argv[2]](work, bench.product_rate(numbers))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
