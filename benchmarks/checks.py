"""What the figures of docs/checks.md and docs/watch.md were measured with.

    python benchmarks/checks.py time                 # each check and the watch, on a model of SmolLM2-135M's shape
    python benchmarks/checks.py time --model FOLDER  # the same on another model
    python benchmarks/checks.py order --model FOLDER ... --data FILE ...
    python benchmarks/checks.py stalled              # entries of a 16-bit adapter that stand still

`order` prints, of each trained model on each data set, the loss of the rows in order, how much shuffling raises it, and
the same where all ids are shifted: by 1, by 7 and by a third of the vocabulary. Without --model and --data it is the
bundled model on tickets.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from decal import LoraConfig, get_peft_model
from decal.bundled import MODEL_DIR
from decal.checks import preflight, rows, tokenizer
from decal.checks.untouched import untouched
from decal.data import tickets
from decal.data.mask import Sample
from decal.spec import RunConfig, TrainConfig
from decal.training import optim
from decal.training.job import Job, prepare
from decal.training.step import StepResult, take_step
from decal.training.watch import LOOKS, Memory, Watch

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
STEPS = 3  # real ones, whose median is what the watch is compared with


def random_model(folder: Path) -> Path:
    """Write a model of SmolLM2-135M's shape with random weights and the bundled tokenizer."""
    made: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2_135M))
    made.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return folder


def job_of(model: Path, data: Path, folder: Path) -> Job:
    rows_ = {"path": str(data), "limit": rows.LOOKED_AT}
    settings = {"device": "cpu", "steps": 100}
    return prepare(RunConfig(model=str(model), data=rows_, train=settings, output=str(folder / "run")))


def time_checks(job: Job) -> None:
    """Print what each check takes and finds, the quick ones first."""
    for name, asked in (("decal train", preflight.short), ("decal check", preflight.full)):
        began = time.perf_counter()
        for check in asked(job):
            print(f"{name}  {check.name:14} {check.seconds:7.2f} s  {check.status}: {check.measure}", flush=True)
        print(f"{name}  {'all':14} {time.perf_counter() - began:7.2f} s", flush=True)


def time_watch(job: Job) -> None:
    """Print what the watch takes beside a step: at each, and where it looks at the weights."""
    optimizer, config = optim.build(job.model, job.config.train), job.config.train
    began = time.perf_counter()
    watch = Watch(job.model, optimizer, config, Memory())
    print(f"watch: {time.perf_counter() - began:.2f} s to begin")
    batches = iter(job.batches)
    took: list[float] = []
    for _ in range(STEPS):
        began = time.perf_counter()
        take_step(job.model, next(batches), job.loss, optimizer, job.numbers.scaler(), precision=job.numbers, limit=1.0)
        took.append(time.perf_counter() - began)
    print(f"a step: {statistics.median(took):.2f} s")
    looks, others = [], []
    for number in range(1, 201):
        began = time.perf_counter()
        list(watch.step(number, StepResult(loss=2.0, grad_norm=1.0, count=9, tokens=9, skipped=False), share=1.0))
        (looks if number in LOOKS or number % LOOKS[-1] == 0 else others).append(time.perf_counter() - began)
    print(f"watch: {1e3 * statistics.median(others):.3f} ms at a step, {statistics.median(looks):.3f} s at a look")


def shifted(sample: Sample, by: int, size: int) -> Sample:
    return Sample(ids=[(token + by) % size for token in sample.ids], labels=sample.labels)


def order(job: Job, name: str) -> None:
    """Print loss, what shuffling adds, and guessing, with the right ids and with wrong ones."""
    size = job.model.get_input_embeddings().weight.shape[0]
    seen = [rows.cut(sample, rows.TOKENS) for sample in rows.looked_at(job)]
    longest = sorted(seen, key=lambda sample: -len(sample.ids))[: preflight.ROWS]
    for by in (0, 1, 7, size // 3):
        with untouched(job):
            found = tokenizer.check(job, [shifted(sample, by, size) for sample in longest])
        numbers = [float(n) for n in re.findall(r"\d+\.\d+", found.measure)]
        ordered, shuffled, guessing = numbers
        print(
            f"{name:40} ids + {by:<6} loss {ordered:6.2f} ({ordered - guessing:+.2f} from guessing), "
            f"shuffled {shuffled - ordered:+.2f}  {found.status}",
            flush=True,
        )


def stalled() -> None:
    """Print which share of an adapter's entries stands still over 20 steps, by dtype and rate; width 576, r=8."""
    for dtype in (torch.bfloat16, torch.float32):
        for lr in (2e-5, 5e-5, 2e-4):
            torch.manual_seed(0)
            base = nn.Sequential(nn.Linear(576, 64, dtype=dtype))
            lora = LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
            model = get_peft_model(base, lora, autocast_adapter_dtype=False)
            optimizer = optim.build(model, TrainConfig(lr=lr))
            named = {name[-16:-15]: p for name, p in model.named_parameters() if p.requires_grad}
            for number in range(30):
                if number == 10:
                    before = {name: p.detach().clone() for name, p in named.items()}
                x = torch.randn(32, 576, dtype=dtype)
                F.mse_loss(model(x).float(), x[:, :64].float()).backward()
                optimizer.step()
                optimizer.zero_grad()
            shares = {name: float((p == before[name]).float().mean()) for name, p in named.items()}
            told = ", ".join(f"{share:.1%} of {name}" for name, share in sorted(shares.items()))
            print(f"{str(dtype).removeprefix('torch.'):9} at {lr:g}: {told} stand still over 20 steps")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("time", "order", "stalled"))
    parser.add_argument("--model", type=Path, nargs="*", default=[])
    parser.add_argument("--data", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    if given.what == "stalled":
        stalled()
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data = given.data or [folder / "tickets.jsonl"]
        if not given.data:
            tickets.write_jsonl(data[0], tickets.generate(400, split="train"))
        if given.what == "time":
            job = job_of(given.model[0] if given.model else random_model(folder / "model"), data[0], folder)
            time_checks(job)
            time_watch(job)
            return
        for model in given.model or [MODEL_DIR]:
            for file in data:
                order(job_of(model, file, folder), f"{model.name} on {file.name}")


if __name__ == "__main__":
    main()
