"""Other libraries' training step on the very work of `decal bench`: PEFT (bitsandbytes, Liger) and Unsloth.

Each system has a process of its own, because some of these libraries change transformers for good. This is the one file
of decal that imports them.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
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

# Packages of each system; and bitsandbytes, where the base is quantised.
NEEDS = {"peft": ("peft",), "peft+liger": ("peft", "liger_kernel"), "unsloth": ("unsloth", "unsloth_zoo")}
CODES = {"unsloth": ("nf4",)}  # what a system stores a base in, where that is not all of FOUR_BITS
FOUR_BITS = ("nf4", "fp4")
ON_A_CARD = {"liger_kernel", "unsloth"}
FIRST = {"unsloth": "import unsloth; "}  # it wants to be imported before transformers


def installed(work: Work) -> tuple[list[str], list[str]]:
    """Return the systems that can do the work here, and those that cannot with what they lack."""
    there, lacking = [], []
    for system, packages in NEEDS.items():
        wanted = (*packages, *(("bitsandbytes",) if work.quantize else ()))
        missing = [name for name in wanted if importlib.util.find_spec(name) is None]
        if work.quantize not in (None, *CODES.get(system, FOUR_BITS)):
            lacking.append(f"{system} (no {work.quantize} as decal's)")
            continue
        on_cpu = bool(ON_A_CARD & {*wanted}) and precision.pick_device(work.device).type != "cuda"
        if missing or on_cpu:
            lacking.append(f"{system} (needs {', '.join(missing) or 'a CUDA card'})")
        else:
            there.append(system)
    return there, lacking


def measure(work: Work, system: str) -> Bench:
    """Measure one system in a process of its own. Raises RunError with its last words if it fails."""
    program = f"{FIRST.get(system, '')}from decal.recipes.peers import main; main()"
    words = [sys.executable, "-c", program, json.dumps(asdict(work)), system]
    if torch.cuda.is_available():  # what this process has cached, the other would lack
        gc.collect()
        torch.cuda.empty_cache()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{system} could not do the work", got=last, fix="Leave --peers out, or give smaller work.")
    figures = [line for line in done.stdout.splitlines() if line.startswith('{"system"')]  # libraries print, too
    if not figures:
        raise RunError(f"{system} gave no figures", fix="Leave --peers out, or give smaller work.")
    return Bench(**json.loads(figures[-1]))


def peft_model(work: Work, *, liger: bool) -> Any:
    """Return PEFT's model with its own defaults: fp32 adapters."""
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
    return model


def unsloth_model(work: Work) -> Any:
    """Return Unsloth's model, read from a folder of random weights, which is the one way in; its own recomputation."""
    from unsloth import FastLanguageModel

    numbers = precision.resolve(work.precision, precision.pick_device(work.device))
    with tempfile.TemporaryDirectory() as folder:
        base: Any = random_model(work.model, device=numbers.device, dtype=numbers.dtype, seed=work.seed)
        base.save_pretrained(folder)
        kinds = base.config.model_type
        small_tokenizer(folder)
        del base
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            model_name=folder,
            max_seq_length=work.length,
            dtype=numbers.dtype,
            load_in_4bit=work.quantize is not None,
        )
    again = "unsloth" if work.recompute else False
    targets = PHI3_LINEARS if kinds == "phi3" else LINEARS
    model = FastLanguageModel.get_peft_model(
        model,
        r=work.rank,
        lora_alpha=2 * work.rank,
        lora_dropout=0,
        bias="none",
        target_modules=targets,
        use_gradient_checkpointing=again,
        max_seq_length=work.length,
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=again)
    return model


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI3_LINEARS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def small_tokenizer(folder: str) -> None:
    """Write a tokenizer of a few words, for a loader that wants one: the work is of token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "a"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def timed(system: str, model: Any, work: Work, rate: float) -> Bench:
    """Return the figures of a model that gives its own loss, under autocast, with torch's AdamW."""
    numbers = precision.resolve(work.precision, precision.pick_device(work.device))
    batch = bench.batch_of(work, vocabulary=model.config.vocab_size).to(numbers.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0, fused=True)
    moments: list[float] | None = None  # of the parts of a step, each waited for

    def passed() -> None:
        if moments is not None:
            moments.append(bench.now(numbers.device))

    def step() -> tuple[float, float]:
        passed()
        with numbers.autocast():
            loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        passed()
        loss.backward()
        passed()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        passed()
        return loss.item(), norm.item()

    figures = bench.timed(step, work, numbers.device)
    moments = []
    step()
    began, forward, both, moved = moments
    return Bench(
        system=system,
        device=bench.device_name(numbers.device),
        precision=numbers.name,
        flops=0.0,  # the same work: decal's figure holds
        rate=rate,
        parts={"forward": forward - began, "backward": both - forward, "optimizer": moved - both},
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


MODELS: dict[str, Callable[[Work], Any]] = {
    "peft": lambda work: peft_model(work, liger=False),
    "peft+liger": lambda work: peft_model(work, liger=True),
    "unsloth": unsloth_model,
}


def main() -> None:
    """Measure the system that the command line names and write its figures as one line of JSON to stdout."""
    work, system = Work(**json.loads(sys.argv[1])), sys.argv[2]
    rate = bench.product_rate(precision.resolve(work.precision, precision.pick_device(work.device)))
    found = timed(system, MODELS[system](work), work, rate)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
