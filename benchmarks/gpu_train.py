"""decal's training step on one CUDA card: tokens per second, peak memory, model TFLOP/s, the longest kernels.

The model is built from a configuration with random normal weights, layer by layer on the card (speed and memory do not
depend on them). LoRA r=16 on all linear layers, fp32 adapters, AdamW, random tokens, whole sequences, no padding.
Four warm-up steps, then the median of `--steps`; peaks are torch's, from the last two warm-up steps on. Cases on the
same base run in one process, one after the other, each with an adapter of its own; one JSON line each. The loss must
fall and the gradient must not be zero.

    python benchmarks/gpu_train.py --out gpu_train.jsonl
    python benchmarks/gpu_train.py --only qlora-8b-4096x2 --profile
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the decal command does

LLAMA: dict[str, Any] = {"rope_theta": 500000.0, "max_position_embeddings": 131072, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
WARM_UP = 4
RESET = (
    2  # warm-up steps after which peaks count: the next one records the step, and what is replayed allocates nothing
)
KERNELS = 30  # of a profile
WORKS: list[dict[str, Any]] = [
    {"name": "qlora-8b-4096x2", "shape": "8b", "quantize": "nf4", "seq": 4096, "rows": 2},
    {"name": "qlora-8b-2048x1", "shape": "8b", "quantize": "nf4", "seq": 2048, "rows": 1},
    {"name": "lora-8b-2048x4", "shape": "8b", "quantize": None, "seq": 2048, "rows": 4},
    {"name": "qlora-70b-2048x1", "shape": "70b", "quantize": "nf4", "seq": 2048, "rows": 1},
]
WAYS: dict[str, dict[str, Any]] = {
    "": {"memory": "keep"},
    "-packed": {"memory": "keep", "packed": True},  # samples of 1 to 1,023 tokens, end to end
    "-recompute": {"memory": "recompute"},
    "-host": {"memory": "recompute", "on_host": True},  # the embedding's table
    "-offload": {"memory": "offload"},  # inputs of layers in host memory
    "-lean": {"memory": "offload", "on_host": True},
    "-slim": {"memory": "offload", "on_host": True, "head": "nf4", "optimizer": "adamw8bit"},
    "-8gib": {"memory": "offload", "on_host": True, "budget": 8 * 2**30},
    "-fp8": {"memory": "keep", "fp8": True},  # products of the layers in 8-bit floats
    "-recompute-fp8": {"memory": "recompute", "fp8": True},
    "-host-fp8": {"memory": "recompute", "on_host": True, "fp8": True},
}


def cases() -> list[dict[str, Any]]:
    """Return each work in every way; the largest model in those that need the least, the wide base in those it has."""
    found = []
    for work in WORKS:
        for ending, way in WAYS.items():
            small = work["shape"] == "8b" and work["quantize"] == "nf4"
            if (work["shape"] == "70b" and way["memory"] == "keep") or (ending in ("-slim", "-8gib") and not small):
                continue
            found.append({**work, **way, "name": work["name"] + ending})
    return found


CASES = cases()


def base_of(case: dict[str, Any]) -> tuple[str, str | None, str]:
    return case["shape"], case["quantize"], case.get("head", "wide")


def build(shape: str, quantize: str | None, head_format: str, device: Any) -> Any:
    """Return a Llama of the shape with random weights on the device, its linear layers coded if asked for."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from decal.model import quantized
    from decal.model.inject import place
    from decal.spec import QuantConfig

    config = LlamaConfig(**{**LLAMA, **SHAPES[shape]}, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    settings = None if quantize is None else QuantConfig(format=quantize, head=head_format)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        how = settings.of_head() if module is head and settings is not None else settings
        if isinstance(module, nn.Linear) and how is not None:
            layer = quantized.room_for(module, None, how)
            layer.in_slabs = module is head
            W = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
            place(model, name, quantized.fill(layer, *layer.encode(W, name), name))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            W = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
            module.weight = nn.Parameter(W, requires_grad=False)
        elif type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=torch.bfloat16, device=device))
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model


def measure(base: Any, case: dict[str, Any], device: Any, steps: int, profile: bool) -> dict[str, Any]:
    """Run the case on a new adapter of the base."""
    import torch

    from decal.model.lean import lean
    from decal.model.wrapper import PeftModel
    from decal.spec import LoraConfig, TrainConfig
    from decal.training import budget, losses, optim, precision
    from decal.training.graphs import Graphs
    from decal.training.step import backward, take_step

    numbers = precision.Precision(name="bf16", device=device, fp8=case.get("fp8", False))
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = PeftModel(base, config, generator=torch.Generator().manual_seed(0))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.gradient_checkpointing_disable()
    if case["memory"] != "keep":
        model.activation_checkpointing_enable(offload=case["memory"] == "offload")
    model.train()
    loss = losses.sft(model, lambda text: None)
    optimizer = optim.build(model, TrainConfig(lr=2e-4, optimizer=case.get("optimizer", "adamw")))
    group = [batch_of(case, vocabulary=base.config.vocab_size)]
    tokens = case["rows"] * case["seq"]
    scaler = numbers.scaler()
    seconds, results = [], []
    with ExitStack() as stack:
        stack.enter_context(lean(model, embedding_on_host=case.get("on_host", False), fp8=numbers.fp8))
        graphs = Graphs(numbers, say=print_aside)
        run = graphs.backward if case.get("graphs", True) else backward
        spend, warm_up = None, WARM_UP
        if "budget" in case:
            spend = budget.Budget(model, case["budget"], tokens=tokens, numbers=numbers, say=print_aside)
            run, warm_up = spend.guarded(run, graphs.forget), budget.WARM + budget.SETTLED + WARM_UP

        def step() -> None:
            began = time.perf_counter()
            results.append(take_step(model, group, loss, optimizer, scaler, precision=numbers, limit=1.0, run=run))
            torch.cuda.synchronize()
            if spend is not None:
                spend.stepped(graphs.forget)
            seconds.append(time.perf_counter() - began)

        for number in range(warm_up + steps):
            if number == warm_up - WARM_UP + RESET:
                torch.cuda.reset_peak_memory_stats()
            step()
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        kernels = kernel_times(step) if profile else None
        if spend is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)
    timed = statistics.median(seconds[warm_up : warm_up + steps])
    model.zero_grad()
    model.unload()
    assert results[-1].loss < results[0].loss, "it has to learn"
    assert results[-1].grad_norm > 0, "it has to learn"
    return {
        **case,
        "device": torch.cuda.get_device_name(),
        "ms": 1e3 * timed,
        "ms_min": 1e3 * min(seconds[warm_up : warm_up + steps]),
        "tokens_per_s": tokens / timed,
        "peak_gib": peak / 2**30,
        "reserved_gib": reserved / 2**30,
        "weights_gib": weights / 2**30,
        "model_tflops": model_flops(case) / timed / 1e12,
        "first_step_s": seconds[0],
        "context_gib": None if spend is None else spend.context() / 2**30,
        "plan": None if spend is None else [spend.plan.keep, spend.plan.inputs],
        "first_loss": results[0].loss,
        "last_loss": results[-1].loss,
        "grad_norm": results[-1].grad_norm,
        "kernels": kernels,
    }


def batch_of(case: dict[str, Any], *, vocabulary: int) -> Any:
    """Return random tokens, all of them learnt."""
    import torch

    from decal.data.batch import Batch

    make = torch.Generator().manual_seed(1)
    rows, length = case["rows"], case["seq"]
    ids = torch.randint(vocabulary, (rows, length), generator=make)
    if not case.get("packed"):
        return Batch(input_ids=ids, labels=ids, position_ids=None)
    places = torch.empty(rows, length, dtype=torch.long)
    for row in places:
        at = 0
        while at < length:
            sample = min(int(torch.randint(1, 1024, (), generator=make)), length - at)
            row[at : at + sample] = torch.arange(sample)
            at += sample
    return Batch(input_ids=ids, labels=ids, position_ids=places)


def print_aside(text: str) -> None:
    print(text, file=sys.stderr)


def model_flops(case: dict[str, Any]) -> float:
    """4·N·T for the frozen linear layers and the head (forward, input's gradient), 3 attentions of whole rows."""
    s = {**LLAMA, **SHAPES[case["shape"]]}
    d, layers, tokens = s["hidden_size"], s["num_hidden_layers"], case["rows"] * case["seq"]
    kv = d * s["num_key_value_heads"] // s["num_attention_heads"]
    linear = layers * (2 * d * d + 2 * d * kv + 3 * d * s["intermediate_size"]) + d * s["vocab_size"]
    attention = 2 * case["rows"] * case["seq"] ** 2 * d * layers
    return float(4 * linear * tokens + 3 * attention)


def kernel_times(step: Any) -> dict[str, float]:
    """Return the milliseconds of one step's kernels, from the first one to the last, and of the 30 longest."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    spans = [e.time_range for e in found.events() if e.device_type == DeviceType.CUDA]
    total = {
        "all kernels": round(sum(e.self_device_time_total for e in events) / 1e3, 2),
        "from the first to the last": round((max(s.end for s in spans) - min(s.start for s in spans)) / 1e3, 2),
    }
    return total | {f"{e.key[:110]} x{e.count}": round(e.self_device_time_total / 1e3, 2) for e in events[:KERNELS]}


def measure_all(cases: list[dict[str, Any]], steps: int, profile: bool) -> None:
    """Build the base that the cases share and print a JSON line for each; a case that fails says why and is left."""
    import torch

    from decal.ops import workspace

    device = torch.device("cuda")
    base = build(*base_of(cases[0]), device)
    for case in cases:
        try:
            print(json.dumps(measure(base, case, device, steps, profile)), flush=True)
        except Exception:
            traceback.print_exc()
            print(json.dumps({**case, "failed": traceback.format_exc()[-1500:]}), flush=True)
            base = None
            gc.collect()
            torch.cuda.empty_cache()
            base = build(*base_of(case), device)
        workspace.release()
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--profile", action="store_true", help="the longest kernels of one more step")
    parser.add_argument("--no-graphs", action="store_true", help="launch by launch, never replayed")
    parser.add_argument("--out", type=Path, help="write the JSON lines here, too")
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cases:
        measure_all(json.loads(options.cases), options.steps, options.profile)
        return
    chosen = [{**c, "graphs": not options.no_graphs} for c in CASES if not options.only or c["name"] in options.only]
    for base in dict.fromkeys(base_of(case) for case in chosen):
        cases = [case for case in chosen if base_of(case) == base]
        words = [sys.executable, __file__, "--cases", json.dumps(cases), "--steps", str(options.steps)]
        words += ["--profile"] if options.profile else []
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                show(json.loads(line))
                if options.out is not None:
                    with open(options.out, "a", encoding="utf-8") as file:
                        file.write(line)


def show(found: dict[str, Any]) -> None:
    """Print what was found in one line."""
    if "failed" in found:
        print(f"{found['name']}: failed", flush=True)
        return
    took = f"{found['ms']:>7.1f} ms (min {found['ms_min']:.0f}; first {found['first_step_s']:.1f} s)"
    speed = f"{found['tokens_per_s']:>8,.0f} tok/s {took}  {found['model_tflops']:.0f} TFLOP/s"
    memory = f"peak {found['peak_gib']:.2f} GiB (reserved {found['reserved_gib']:.2f})"
    learnt = f"loss {found['first_loss']:.3f} -> {found['last_loss']:.3f}  gradient {found['grad_norm']:.3f}"
    spent = "" if found["plan"] is None else f"  context {found['context_gib']:.2f} plan {found['plan']}"
    print(f"{found['name']:<28} {speed}  {memory}  {learnt}{spent}", flush=True)
    for name, ms in (found["kernels"] or {}).items():
        print(f"    {ms:8.2f} ms  {name}")


if __name__ == "__main__":
    main()
