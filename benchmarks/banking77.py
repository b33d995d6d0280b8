"""LoRA and QLoRA beside full fine-tuning on a real task: route a customer's message to one of 77 intents (banking77).

All run through `decal.train`, from the same script, over the same grid of learning rates; the rate is chosen on 1000
training messages held out, then three seeds train on all of them and are scored on the test set by free greedy
generation (the whole reply must be the intent). Beside them TF-IDF + logistic regression. Also measured: what training
made the model forget (perplexity on WikiText-2), and the loss on an instruction set before and after.

    python benchmarks/banking77.py tune  --model MODEL --data FOLDER --out OUT
    python benchmarks/banking77.py final --model MODEL --data FOLDER --out OUT
    python benchmarks/banking77.py table --out OUT

FOLDER holds banking77.{train,test}.jsonl.gz, wikitext2_test.txt.gz and dolly_short.jsonl.gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
HELD_OUT = 1000
METHODS = {  # method, target_modules, quantize
    "full": ("full", None, None),
    "lora all-linear": ("lora", "all-linear", None),
    "qlora all-linear": ("lora", "all-linear", "nf4"),
    "lora attention": ("lora", "attention", None),
}
TUNED = ("full", "lora all-linear", "qlora all-linear")


def rows(file: Path) -> list[dict[str, Any]]:
    """Read a gzipped JSON-lines file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(file: Path, kept: Sequence[dict[str, Any]]) -> Path:
    """Write rows as prompt and completion."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"prompt": r["text"], "completion": r["label"]}) + "\n" for r in kept)
    file.write_text(text, encoding="utf-8")
    return file


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Train and score one configuration in this process."""
    from transformers.utils import logging

    import decal
    from decal import api
    from decal.evaluate.tasks import exact_match, questions

    logging.disable_progress_bar()
    method, targets, quantize = METHODS[args.method]
    everything = rows(args.data / "banking77.train.jsonl.gz")
    random.Random(0).shuffle(everything)
    tuning = args.job == "tune"
    train = everything[HELD_OUT:] if tuning else everything
    asked = everything[:HELD_OUT] if tuning else rows(args.data / "banking77.test.jsonl.gz")
    folder = args.out / f"{args.job}-{args.method.replace(' ', '-')}-{args.rate}-{args.seed}"
    overrides = [
        f"train.method={method}",
        f"train.lr={args.rate}",
        f"train.seed={args.seed}",
        f"train.epochs={args.epochs}",
        "train.micro_batch=16",
        "data.max_length=128",
        "train.keep=1",
        "train.save_every=1000000",
    ]
    if targets:
        overrides.append(f"lora.target_modules={targets}")
    if quantize:
        overrides.append(f"quantize={quantize}")
    began = time.perf_counter()
    trained = api.train(
        model=str(args.model),
        data=str(write(folder / "train.jsonl", train)),
        output=str(folder / "run"),
        overrides=overrides,
    )
    seconds = time.perf_counter() - began
    tokenizer = decal.load_tokenizer(trained.result)
    if method == "full":
        model = decal.load_model(trained.result)
    else:
        model = decal.PeftModel.from_pretrained(decal.load_model(args.model, quantize=quantize), trained.result)
    sample = [{"prompt": r["text"], "completion": r["label"]} for r in asked]
    score = exact_match(model, tokenizer, questions(sample), batch_size=256)
    result = {
        "job": args.job,
        "method": args.method,
        "rate": args.rate,
        "seed": args.seed,
        "accuracy": score.accuracy,
        "scored": len(sample),
        "train_loss": trained.loss,
        "steps": trained.steps,
        "seconds": round(seconds, 1),
        "trainable": trained.trainable,
        "result_mb": sum(f.stat().st_size for f in trained.result.glob("*.safetensors")) / 1e6,
    }
    if not tuning:
        result["wikitext2_ppl"] = perplexity(model, tokenizer, args.data)
    return result


def perplexity(model: Any, tokenizer: Any, data: Path) -> float:
    """Perplexity per token on the WikiText-2 test text, in windows of 512 tokens that do not overlap."""
    import math

    import torch
    from torch.nn import functional as F

    with gzip.open(data / "wikitext2_test.txt.gz", "rt", encoding="utf-8") as file:
        ids = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    device = next(model.parameters()).device
    windows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)
    total = 0.0
    with torch.no_grad():
        for part in windows.split(32):
            part = part.to(device)
            logits = model(input_ids=part).logits[:, :-1].float()
            total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (windows.numel() - len(windows)))


def base(args: argparse.Namespace) -> dict[str, Any]:
    """What the base scores before any training, and the classical baseline."""
    import decal
    from decal.evaluate.tasks import exact_match, questions

    tokenizer, model = decal.load_tokenizer(args.model), decal.load_model(args.model)
    test = rows(args.data / "banking77.test.jsonl.gz")
    sample = [{"prompt": r["text"], "completion": r["label"]} for r in test]
    score = exact_match(model, tokenizer, questions(sample), batch_size=256)
    return {
        "job": "base",
        "method": "base",
        "accuracy": score.accuracy,
        "wikitext2_ppl": perplexity(model, tokenizer, args.data),
        "tfidf": tfidf(args.data),
    }


def tfidf(data: Path) -> float:
    """Accuracy of TF-IDF (words and pairs) + logistic regression on the same split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = rows(data / "banking77.train.jsonl.gz"), rows(data / "banking77.test.jsonl.gz")
    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=20, max_iter=2000)
    )
    pipeline.fit([r["text"] for r in train], [r["label"] for r in train])
    return float(pipeline.score([r["text"] for r in test], [r["label"] for r in test]))


def dolly(args: argparse.Namespace) -> dict[str, Any]:
    """Loss on 640 held-out rows of dolly_short before and after one method's training on the rest."""
    from decal import api

    method, targets, _ = METHODS[args.method]
    folder = args.out / f"dolly-{args.method.replace(' ', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "dolly.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows(args.data / "dolly_short.jsonl.gz")), encoding="utf-8")
    overrides = [f"train.method={method}", f"train.lr={args.rate}", "train.epochs=2", "train.micro_batch=8"]
    overrides += ["data.max_length=512", "data.eval_rows=640"]
    if targets:
        overrides.append(f"lora.target_modules={targets}")
    trained = api.train(model=str(args.model), data=str(file), output=str(folder / "run"), overrides=overrides)
    return {
        "job": "dolly",
        "method": args.method,
        "rate": args.rate,
        "before": trained.eval_before,
        "after": trained.eval_loss,
        "steps": trained.steps,
    }


def run_jobs(args: argparse.Namespace, jobs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run each job in a process of its own, `--jobs` at a time; failures are shown and counted."""
    common = [
        "--model",
        str(args.model),
        "--data",
        str(args.data),
        "--out",
        str(args.out),
        "--epochs",
        str(args.epochs),
    ]
    waiting, running, results = list(jobs), [], []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            job = waiting.pop(0)
            log = args.out / f"{'-'.join(job).replace(' ', '_').replace('/', '')}.log"
            with open(log, "w") as file:
                running.append(
                    (subprocess.Popen([sys.executable, __file__, *job, *common], stdout=file, stderr=file), log)
                )
        for process, log in [entry for entry in running if entry[0].poll() is not None]:
            running.remove((process, log))
            lines = log.read_text().strip().splitlines()
            if process.returncode:
                print(f"FAILED {log.name}: {' | '.join(lines[-4:])}", flush=True)
            else:
                results.append(json.loads(lines[-1]))
                print(lines[-1], flush=True)
        time.sleep(0.5)
    with open(args.out / "results.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in results)
    return results


def table(args: argparse.Namespace) -> None:
    """Print what docs/results.md quotes."""
    results = [json.loads(line) for line in (args.out / "results.jsonl").read_text().splitlines()]
    for r in sorted((r for r in results if r["job"] == "tune"), key=lambda r: (r["method"], r["rate"])):
        print(f"tune   {r['method']:16} lr {r['rate']:<7g} held-out {100 * r['accuracy']:.1f}%")
    for r in results:
        if r["job"] == "base":
            print(f"base   {100 * r['accuracy']:.1f}%  wikitext2 ppl {r['wikitext2_ppl']:.1f}")
            print(f"TF-IDF + logistic regression {100 * r['tfidf']:.2f}%")
        if r["job"] == "dolly":
            print(f"dolly  {r['method']:16} loss {r['before']:.3f} -> {r['after']:.3f} (lr {r['rate']:g})")
    for method in METHODS:
        final = [r for r in results if r["job"] == "final" and r["method"] == method]
        if final:
            scores = [100 * r["accuracy"] for r in final]
            each = ", ".join(f"{score:.2f}" for score in scores)
            ppl = statistics.mean(r["wikitext2_ppl"] for r in final)
            print(f"final  {method:16} {statistics.mean(scores):.2f}% ({each}) at lr {final[0]['rate']:g}")
            print(f"       {final[0]['trainable']:,} trained, {final[0]['result_mb']:.1f} MB, wikitext2 ppl {ppl:.1f}")


def best_rate(args: argparse.Namespace, method: str) -> float:
    """The rate with the best held-out accuracy; attention-only takes LoRA's."""
    method = "lora all-linear" if method == "lora attention" else method
    results = [json.loads(line) for line in (args.out / "results.jsonl").read_text().splitlines()]
    tuned = [r for r in results if r["job"] == "tune" and r["method"] == method]
    return float(max(tuned, key=lambda r: r["accuracy"])["rate"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "final", "table", "one", "base", "dolly"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", choices=("tune", "final"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage == "table":
        table(args)
    elif args.stage in ("one", "base", "dolly"):
        print(json.dumps({"one": one, "base": base, "dolly": dolly}[args.stage](args)))
    elif args.stage == "tune":
        grid = [(m, r) for m in TUNED for r in RATES]
        run_jobs(args, [["base"], *(["one", "--job", "tune", "--method", m, "--rate", str(r)] for m, r in grid)])
    else:
        rates = {m: str(best_rate(args, m)) for m in METHODS}
        finals = [
            ["one", "--job", "final", "--method", m, "--rate", rates[m], "--seed", str(s)]
            for m in METHODS
            for s in SEEDS
        ]
        run_jobs(args, [*finals, *(["dolly", "--method", m, "--rate", rates[m]] for m in ("full", "lora all-linear"))])
        table(args)


if __name__ == "__main__":
    main()
