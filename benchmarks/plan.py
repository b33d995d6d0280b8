"""A plan's forecast against what a run takes: peak memory and seconds of a step, over families, methods, lengths.

Models have random weights (memory and speed do not depend on them) and are made anew in a folder of their own. Each
configuration is forecast in one process and run in another: a few steps, without data or logs. On a CPU the peak is
the resident memory above that of the same process with all imports done; beside it stand the bytes of the tensors
alone, seen by the tracker of decal.planning on the real step. On a card it is torch's own max_memory_allocated.

Time is that of all steps as it is foretold from the second one (the first pays for beginnings) against what they took;
on a CPU in seconds of the process, which other work on the machine does not lengthen by its turns.

A row is outside if its tensors or its peak are off by more than 5% (resident memory: or 128 MiB, if that is more), or
its time by more than 15%. The exit code is 1 if any row is outside.

    OMP_NUM_THREADS=1 python benchmarks/plan.py    # CPU
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan_cases import CASES, SHAPES, Case

STEPS = {"cpu": 3, "cuda": 4}  # the first makes the optimizer's states
MEMORY, AT_LEAST, TIME = 0.05, 128 << 20, 0.15  # what a forecast may be off by; AT_LEAST in resident bytes
MIB = 2**20


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
    """Take a few steps and return the peak, the seconds of each step and those foretold from the second."""
    import torch

    from decal.data.batch import Batch
    from decal.model.lean import lean
    from decal.planning import rss, shapes, traced
    from decal.planning import time as planned
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
    times, clock = [], time.process_time if device == "cpu" else time.perf_counter
    trace = traced.Trace()

    def one() -> float:
        done = take_step(model, [batch], loss, optimizer, numbers.scaler(), precision=numbers, limit=1.0)
        return done.loss

    with lean(model):
        losses = []
        for _ in range(STEPS[device]):
            began = clock()
            losses.append(one())
            times.append(clock() - began)
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
        "times": times,
        "foretold": planned.foretold(times, [batch.tokens] * len(times)),
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
    outside = 0
    print("\n".join(HEADS[args.device]), flush=True)
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
        text, within = told(case, planned, got, args.device)
        outside += not within
        print(text, flush=True)
    if outside:
        sys.exit(f"{outside} outside the bounds")


HEADS = {
    "cpu": (
        "| configuration, rows x tokens | tensors, MiB | | resident, MiB | | | after a step, s | | | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ),
    "cuda": (
        "| configuration, rows x tokens | peak, GiB | | | after a step, s | | | |",
        "|---|---|---|---|---|---|---|---|",
    ),
}


def told(case: Case, planned: dict[str, Any], got: dict[str, Any], device: str) -> tuple[str, bool]:
    """Return a line of the table, forecast before measured, and whether all in it is within the bounds."""
    for part in (planned, got):
        if "error" in part:
            return f"| {case.family} {case.name} | {part['error']} |", False
    cpu = device == "cpu"
    unit, digits = (MIB, 0) if cpu else (2**30, 2)
    cells, outside = [f"{case.family} {case.name}"], []
    if cpu:
        off = planned["forecast"] / got["tensors"] - 1
        cells += [f"{size / unit:,.{digits}f}" for size in (planned["forecast"], got["tensors"])]
        outside += ["tensors"] if abs(off) > MEMORY else []
    said = planned["resident"] if cpu else planned["forecast"]
    off = said - got["measured"]
    cells += [f"{size / unit:,.{digits}f}" for size in (said, got["measured"])]
    cells.append(f"{off / unit:+,.{digits}f} ({off / got['measured']:+.1%})")
    outside += ["peak"] if abs(off) > max(MEMORY * got["measured"], AT_LEAST * cpu) else []
    late = got["foretold"] / sum(got["times"]) - 1
    cells += [f"{got['foretold']:.2f}", f"{sum(got['times']):.2f}", f"{late:+.1%}"]
    outside += ["time"] if abs(late) > TIME else []
    return f"| {' | '.join(cells)} | {', '.join(outside) or 'within'} |", not outside


if __name__ == "__main__":
    main()
