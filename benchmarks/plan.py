"""A plan's forecast against what a run takes: peak memory and seconds of a step, over families, methods, lengths.

Models have random weights (memory and speed do not depend on them) and are made anew in a folder of their own. Each
configuration is forecast in one process and run in another: three steps, without data or logs. On a CPU the peak is
the resident memory above that of the same process with all imports done; beside it stand the bytes of the tensors
alone, seen by the tracker of decal.planning on the real step. On a card it is torch's own max_memory_allocated.

    python benchmarks/plan.py                      # CPU
    python benchmarks/plan.py --device cuda --out plan.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LLAMA_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
QWEN3 = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
GEMMA2 = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "vocab_size": 32000,
}
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 2048, "vocab_size": 50257}
PHI = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 10,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
QWEN2_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
GEMMA_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
QWEN3_1B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GPT2_L = {"n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 2048, "vocab_size": 50257}
PHI_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "vocab_size": 51200,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    family: str
    shape: str
    method: str = "lora"
    rows: int = 4
    length: int = 512
    packed: bool = False
    dtype: str = "float32"
    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extra = [f"{k}={v}" for k, v in {**self.train, **self.lora}.items()]
        kind = [self.shape, self.method, f"{self.rows}x{self.length}", self.dtype.replace("float", "fp")]
        return " ".join(kind + (["packed"] if self.packed else []) + extra)


CHECKPOINTED = {"gradient_checkpointing": True}
SHAPES = {name: value for name, value in list(globals().items()) if name.isupper() and isinstance(value, dict)}
CPU = [
    Case(family="Llama", shape="LLAMA_135M"),
    Case(family="Llama", shape="LLAMA_135M", rows=2, length=256),
    Case(family="Llama", shape="LLAMA_135M", rows=2, length=512, train=CHECKPOINTED),
    Case(family="Llama", shape="LLAMA_135M", rows=1, length=1024, dtype="bfloat16", packed=True),
    Case(family="Llama", shape="LLAMA_135M", rows=2, length=256, method="qlora"),
    Case(family="Llama", shape="LLAMA_135M", rows=1, length=128, method="full"),
    Case(family="Llama", shape="LLAMA_135M", rows=1, length=1024, lora={"target_modules": "attention", "r": 8}),
    Case(family="Qwen3", shape="QWEN3", rows=2, length=512),
    Case(family="Qwen3", shape="QWEN3", rows=2, length=256, method="qlora", train=CHECKPOINTED),
    Case(family="Qwen2", shape="QWEN3", rows=1, length=1024, lora={"lora_dropout": 0.1}),
    Case(family="Gemma2", shape="GEMMA2", rows=1, length=512),
    Case(family="GPT2", shape="GPT2", rows=2, length=256),
    Case(family="GPT2", shape="GPT2", rows=2, length=128, method="full", train={"optimizer": "adamw8bit"}),
    Case(family="Phi", shape="PHI", rows=1, length=512),
    Case(family="Llama", shape="QWEN3", rows=1, length=512, method="full", train=CHECKPOINTED),
]
CARD = [
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", rows=2, length=2048),
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", rows=2, length=2048, packed=True),
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", rows=2, length=4096, train=CHECKPOINTED),
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", method="qlora", rows=2, length=2048),
    Case(family="Llama", shape="LLAMA_1B", dtype="bfloat16", method="full", rows=2, length=1024),
    Case(
        family="Llama",
        shape="LLAMA_1B",
        dtype="bfloat16",
        method="full",
        rows=1,
        length=2048,
        train={**CHECKPOINTED, "optimizer": "adamw8bit"},
    ),
    Case(family="Qwen2", shape="QWEN2_3B", dtype="bfloat16", method="qlora", rows=1, length=4096),
    Case(family="Qwen2", shape="QWEN2_3B", dtype="bfloat16", rows=1, length=2048, train=CHECKPOINTED),
    Case(family="Qwen3", shape="QWEN3_1B", dtype="bfloat16", rows=4, length=1024, lora={"lora_dropout": 0.1}),
    Case(family="Qwen3", shape="QWEN3_1B", dtype="bfloat16", method="qlora", rows=4, length=512, train=CHECKPOINTED),
    Case(family="Gemma2", shape="GEMMA_2B", dtype="bfloat16", rows=1, length=1024),
    Case(family="GPT2", shape="GPT2_L", rows=4, length=512),
    Case(family="Phi", shape="PHI_1B", dtype="bfloat16", rows=4, length=512),
    Case(family="Llama", shape="LLAMA_135M", rows=4, length=512),
    Case(family="Llama", shape="LLAMA_135M", rows=16, length=512, lora={"target_modules": "attention", "r": 64}),
]
CASES = {"cpu": CPU, "cuda": CARD}
STEPS = {"cpu": 2, "cuda": 4}  # the first makes the optimizer's states


def config_of(case: Case, folder: Path, device: str) -> Any:
    """Return the settings of decal train that a case means."""
    from decal.spec import RunConfig

    return RunConfig(
        model=str(folder),
        data={"path": "none.jsonl", "max_length": case.length, "packing": case.packed},
        lora=case.lora,
        train={
            "method": case.method.removeprefix("q"),
            "micro_batch": case.rows,
            "device": device,
            **case.train,
        },
        quantize="nf4" if case.method == "qlora" else None,
    )


def make(case: Case, folder: Path) -> None:
    """Write the model's folder: configuration and random weights."""
    import torch
    import transformers

    config = getattr(transformers, f"{case.family}Config")(**SHAPES[case.shape])
    if case.family == "GPT2":
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    kind = getattr(transformers, f"{case.family}{'LMHeadModel' if case.family == 'GPT2' else 'ForCausalLM'}")
    config.dtype = dtype
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind(config)
    torch.set_default_dtype(torch.float32)
    model.to("cpu").save_pretrained(folder)


def forecast(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """Return what the plan says."""
    import torch

    from decal.planning import cards, memory, wanted
    from decal.planning import time as planned
    from decal.training import precision

    numbers = precision.resolve("auto", torch.device(device))
    asked = wanted.of_run(config_of(case, folder, device), device=device, numbers=numbers.name)  # type: ignore[arg-type]
    began = time.perf_counter()
    found = memory.forecast(asked)
    took = time.perf_counter() - began
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pace = planned.pace(found.work, asked, cards.measured(torch.device(device), dtype))
    training = found.phase("training")
    return {
        "forecast": training.peak,
        "resident": found.resident,
        "parts": training.parts,
        "seconds": pace.step,
        "planned_in": round(took, 2),
    }


def run(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """Take a few steps and return the peak and the seconds of the best step after the first."""
    import torch

    from decal.data.batch import Batch
    from decal.model.lean import lean
    from decal.planning import rss, shapes, traced
    from decal.training import job, optim, precision
    from decal.training.losses import SFT, sft
    from decal.training.step import take_step

    where = torch.device(device)
    kernel_modules(case)
    config = config_of(case, folder, device)
    numbers = precision.resolve("auto", where)
    before = rss.resident()
    model = job.trainable_model(config, numbers)
    loss = sft(model, lambda note: None)
    optimizer = optim.build(model, config.train)
    model.train()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (case.rows, case.length), generator=generator)
    positions = None
    if case.packed:
        half = case.length // 2
        positions = torch.cat([torch.arange(half), torch.arange(case.length - half)]).expand(ids.shape).contiguous()
    batch = Batch(input_ids=ids, labels=ids, position_ids=positions)
    loaded = rss.resident()
    rss.reset_peak()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    trace = traced.Trace()

    def one() -> float:
        done = take_step(model, [batch], loss, optimizer, numbers.scaler(), precision=numbers, limit=1.0)
        return done.loss

    with lean(model):
        losses = []
        for _ in range(STEPS[device]):
            began = time.perf_counter()
            losses.append(one())
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() if where.type == "cuda" else rss.peak() - before
        counted = 0
        if device == "cpu":
            with trace:
                for tensor in [*model.parameters(), *model.buffers()]:
                    trace.see(tensor)
                for state in optimizer.state.values():
                    for value in state.values():
                        trace.see(value)
                one()
            counted = traced.peak(trace.blocks, 0, trace.now)[0]
    assert isinstance(loss, SFT)
    return {
        "measured": peak,
        "loaded": loaded - before,
        "tensors": counted,
        "seconds": min(times[1:]),
        "times": [round(t, 3) for t in times],
        "chunked": [loss.chunked, shapes.chunks(model)],
        "losses": losses,
        "reserved": torch.cuda.max_memory_reserved() if where.type == "cuda" else 0,
    }


def kernel_modules(case: Case) -> None:
    """Import what a run imports late, so that it is not taken for the run's memory."""
    import torch
    import torch._dynamo
    import transformers

    getattr(transformers, f"{case.family}Config")
    if case.method == "qlora":
        from decal.ops import nf4

        for dtype in (torch.float32, torch.bfloat16):
            nf4.dequantize(*nf4.quantize(torch.ones(1 << 18, dtype=dtype)), shape=(1 << 18,), dtype=dtype)


def in_process(*words: str) -> Any:
    """Run this file again and return the JSON that it prints last."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": [*done.stderr.strip().splitlines()[-1:], done.stderr[-2000:]]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of cases")
    parser.add_argument("--out", type=Path, help="also write JSON lines here")
    parser.add_argument("--act", choices=["forecast", "run"], help="one act in this process")
    parser.add_argument("--case", type=int)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.act:
        case = CASES[args.device][args.case]
        if args.act == "forecast":
            make(case, args.folder)
            print(json.dumps(forecast(case, args.folder, args.device)))
        else:
            print(json.dumps(run(case, args.folder, args.device)))
        return
    out = args.out or (Path(os.environ["OUT"]) / "plan.jsonl" if "OUT" in os.environ else None)
    for number, case in enumerate(CASES[args.device]):
        if args.only and number not in args.only:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            words = ["--device", args.device, "--case", str(number), "--folder", folder]
            planned = in_process(*words, "--act", "forecast")
            got = in_process(*words, "--act", "run")
        line = {"case": case.name, **asdict(case), "plan": planned, "run": got}
        line["took"] = round(time.perf_counter() - began, 1)
        if out is not None:
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        print(told(case, planned, got, args.device), flush=True)


def told(case: Case, planned: dict[str, Any], got: dict[str, Any], device: str) -> str:
    """Return a line of the table."""
    for part in (planned, got):
        if "error" in part:
            return f"{case.family:7} {case.name}: {part['error']}"
    gib = 2**30
    cells = [f"{case.family:7} {case.name:60}"]
    if device == "cpu":
        off = planned["forecast"] / got["tensors"] - 1
        cells.append(f"tensors {planned['forecast'] / gib:6.3f} {got['tensors'] / gib:6.3f} {100 * off:+5.1f}%")
    said = planned["resident"] if device == "cpu" else planned["forecast"]
    off = said / got["measured"] - 1
    cells.append(f"peak {said / gib:6.3f} {got['measured'] / gib:6.3f} {100 * off:+5.1f}%")
    cells.append(f"{(said - got['measured']) / 2**20:+7.1f} MiB")
    cells.append(f"s/step {planned['seconds']:6.2f} {got['seconds']:6.2f}")
    return "  ".join(cells)


if __name__ == "__main__":
    main()
