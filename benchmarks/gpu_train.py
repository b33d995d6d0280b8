"""decal's training step on one CUDA card: tokens per second, peak memory, model TFLOP/s, the longest kernels.

The model is built from a configuration with random normal weights, layer by layer on the card (speed and memory do not
depend on them). LoRA r=16 on all linear layers, fp32 adapters, AdamW, random tokens, whole sequences, no padding.
Four warm-up steps, then the median of `--steps`; peaks are torch's, from the last warm-up step on. Each configuration
runs in a process of its own, in turn; one JSON line each. The loss must fall and the gradient must not be zero.

    python benchmarks/gpu_train.py --out gpu_train.jsonl
    python benchmarks/gpu_train.py --only qlora-8b-4096x2 --profile
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
WARM_UP = 4  # the last one records the step where it can be
KERNELS = 30  # of a profile


def cases() -> list[dict[str, Any]]:
    """Each work in every way to hold memory: all activations kept; recomputed from layer inputs; so, with the

    embedding's table on the host; from inputs in host memory; both; both with an NF4 head and 8-bit optimizer states
    (`-slim`); within a budget of 8 GiB. The first three with the layers' products in 8-bit floats besides (`-fp8`).
    """
    works = [
        ("qlora-8b-4096x2", "8b", "nf4", 4096, 2),
        ("qlora-8b-2048x1", "8b", "nf4", 2048, 1),
        ("lora-8b-2048x4", "8b", None, 2048, 4),
        ("qlora-70b-2048x1", "70b", "nf4", 2048, 1),
    ]
    exact = [
        {"name": name + ending, "shape": shape, "quantize": quantize, "seq": seq, "rows": rows, "memory": memory}
        for name, shape, quantize, seq, rows in works
        for ending, memory in (
            ("", "keep"),
            ("-recompute", "recompute"),
            ("-host", "recompute"),
            ("-offload", "offload"),
            ("-lean", "offload"),
            ("-slim", "offload"),
            ("-8gib", "offload"),
        )
        if (shape != "70b" or memory != "keep")
        and (ending not in ("-slim", "-8gib") or (shape == "8b" and quantize == "nf4"))
    ]
    narrow = [case for case in exact if not case["name"].endswith(("-offload", "-lean", "-slim", "-8gib"))]
    return exact + [{**case, "name": f"{case['name']}-fp8", "fp8": True} for case in narrow]


CASES = cases()


def build(shape: str, quantize: str | None, device: Any, *, head_format: str = "wide") -> Any:
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


def measure(case: dict[str, Any], steps: int, profile: bool) -> dict[str, Any]:
    """Run the case in this process."""
    import torch

    from decal.data.batch import Batch
    from decal.model.lean import lean
    from decal.model.wrapper import PeftModel
    from decal.spec import LoraConfig, TrainConfig
    from decal.training import budget, losses, optim, precision
    from decal.training.graphs import Graphs
    from decal.training.step import backward, take_step

    device = torch.device(case.get("device", "cuda"))
    numbers = precision.Precision(name="bf16", device=device, fp8=case.get("fp8", False))
    slim = case["name"].endswith("-slim")
    model = build(case["shape"], case["quantize"], device, head_format="nf4" if slim else "wide")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = PeftModel(model, config, generator=torch.Generator().manual_seed(0))
    if case["memory"] != "keep":
        model.activation_checkpointing_enable(offload=case["memory"] == "offload")
    model.train()
    loss = losses.sft(model, lambda text: None)
    train = TrainConfig(lr=2e-4, optimizer="adamw8bit" if slim else "adamw")
    optimizer = optim.build(model, train)
    ids = torch.randint(case_vocabulary(model), (case["rows"], case["seq"]), generator=torch.Generator().manual_seed(1))
    group = [Batch(input_ids=ids, labels=ids, position_ids=None)]
    scaler = numbers.scaler()
    seconds, results = [], []
    on_host = case["name"].removesuffix("-fp8").endswith(("-host", "-lean", "-slim", "-8gib"))
    with ExitStack() as stack:
        stack.enter_context(lean(model, embedding_on_host=on_host, fp8=numbers.fp8))
        graphs = Graphs(numbers, say=print_aside)
        run = graphs.backward if case.get("graphs", True) else backward
        spend, warm_up = None, WARM_UP
        if case["name"].endswith("-8gib"):
            spend = budget.Budget(model, 8 * 2**30, tokens=ids.numel(), device=device, say=print_aside)
            run, warm_up = spend.guarded(run, graphs.forget), budget.WARM + budget.SETTLED + WARM_UP

        def step() -> None:
            began = time.perf_counter()
            results.append(take_step(model, group, loss, optimizer, scaler, precision=numbers, limit=1.0, run=run))
            if device.type == "cuda":
                torch.cuda.synchronize()
            if spend is not None:
                spend.stepped(graphs.forget)
            seconds.append(time.perf_counter() - began)

        for number in range(warm_up):
            if number == warm_up - 1 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # so that the last warm-up step counts: it may record a graph,
            step()  # whose memory is not seen as allocated when it is replayed
        for _ in range(steps):
            step()
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
        kernels = kernel_times(step) if profile else None
    timed = statistics.median(seconds[warm_up : warm_up + steps])
    return {
        **case,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "ms": 1e3 * timed,
        "ms_min": 1e3 * min(seconds[warm_up : warm_up + steps]),
        "tokens_per_s": ids.numel() / timed,
        "peak_gib": peak / 2**30,
        "reserved_gib": reserved / 2**30,
        "weights_gib": weights / 2**30,
        "model_tflops": model_flops(case) / timed / 1e12,
        "first_step_s": seconds[0],
        "context_gib": None if spend is None else spend.context / 2**30,
        "plan": None if spend is None else [spend.plan.keep, spend.plan.inputs],
        "first_loss": results[0].loss,
        "last_loss": results[-1].loss,
        "grad_norm": results[-1].grad_norm,
        "kernels": kernels,
    }


def print_aside(text: str) -> None:
    print(text, file=sys.stderr)


def case_vocabulary(model: Any) -> int:
    size: int = model.get_base_model().config.vocab_size
    return size


def model_flops(case: dict[str, Any]) -> float:
    """4·N·T for the frozen linear layers and the head (forward, and the input's gradient), 3 causal attentions."""
    s = {**LLAMA, **SHAPES[case["shape"]]}
    d, layers, tokens = s["hidden_size"], s["num_hidden_layers"], case["rows"] * case["seq"]
    kv = d * s["num_key_value_heads"] // s["num_attention_heads"]
    linear = layers * (2 * d * d + 2 * d * kv + 3 * d * s["intermediate_size"]) + d * s["vocab_size"]
    attention = 2 * case["rows"] * case["seq"] ** 2 * d * layers
    return float(4 * linear * tokens + 3 * attention)


def kernel_times(step: Any) -> dict[str, float]:
    """Return the milliseconds of one step's 30 longest kernels by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total = {"all kernels": round(sum(e.self_device_time_total for e in events) / 1e3, 2)}
    return total | {f"{e.key[:110]} x{e.count}": round(e.self_device_time_total / 1e3, 2) for e in events[:KERNELS]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--profile", action="store_true", help="the longest kernels of one more step")
    parser.add_argument("--no-graphs", action="store_true", help="launch by launch, never replayed")
    parser.add_argument("--out", type=Path, help="write the JSON lines here, too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(json.loads(options.case), options.steps, options.profile)))
        return
    chosen = [c for c in CASES if not options.only or c["name"] in options.only]
    for each in ({**c, "graphs": not options.no_graphs} for c in chosen):
        words = [sys.executable, __file__, "--case", json.dumps(each), "--steps", str(options.steps)]
        done = subprocess.run([*words, *(["--profile"] if options.profile else [])], capture_output=True, text=True)
        line = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""
        if not line:
            print(f"{each['name']}: failed\n{done.stderr[-1500:]}", file=sys.stderr)
            continue
        found = json.loads(line)
        if options.out is not None:
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        took = f"{found['ms']:>7.1f} ms (min {found['ms_min']:.0f}; first {found['first_step_s']:.1f} s)"
        speed = f"{found['tokens_per_s']:>8,.0f} tok/s {took}  {found['model_tflops']:.0f} TFLOP/s"
        memory = f"peak {found['peak_gib']:.2f} GiB (reserved {found['reserved_gib']:.2f})"
        learnt = f"loss {found['first_loss']:.3f} -> {found['last_loss']:.3f}  gradient {found['grad_norm']:.3f}"
        print(f"{found['name']:<28} {speed}  {memory}  {learnt}", flush=True)
        for name, ms in (found["kernels"] or {}).items():
            print(f"    {ms:8.2f} ms  {name}")


if __name__ == "__main__":
    main()
