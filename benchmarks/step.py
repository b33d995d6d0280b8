"""One training step of a SmolLM2-135M-shaped model on the CPU: decal beside PEFT + transformers,
on weights stored in fp32, bf16 and NF4; both with dropout of 0.05, too.

4 x 512 tokens, LoRA r=16 on all linear layers, AdamW, fp32, random weights (speed and memory do not depend on them).
Each system runs in a process of its own, in turn, `--rounds` times; the table gives the best step of all rounds and
the highest peak of resident memory.

    python benchmarks/step.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
SYSTEMS = ("peft", "decal", "decal-bf16", "decal-nf4", "peft-dropout", "decal-dropout")
DROPOUT = 0.05
STEPS = 3


def measure(system: str, steps: int) -> dict[str, float]:
    """Run `steps` training steps of one system in this process and return seconds, peak memory and the losses."""
    import torch

    torch.manual_seed(0)
    times, losses = [], []
    with ExitStack() as stack:
        library, _, kind = system.partition("-")
        dropout = DROPOUT if kind == "dropout" else 0.0
        stored = kind if kind in ("bf16", "nf4") else "fp32"
        step = _peft_step(dropout) if library == "peft" else _decal_step(stack, stored=stored, dropout=dropout)
        for _ in range(steps + 1):
            began = time.perf_counter()
            losses.append(step())
            times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": min(times[1:]), "peak_gib": peak, "first_loss": losses[0], "last_loss": losses[-1]}


def _model(dtype: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)


def _ids() -> Any:
    import torch

    return torch.randint(0, SHAPE["vocab_size"], (4, 512), generator=torch.Generator().manual_seed(1))


def _peft_step(dropout: float) -> Any:
    import peft
    import torch

    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(_model(torch.float32), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    ids = _ids()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _decal_step(stack: ExitStack, *, stored: str, dropout: float) -> Any:
    import torch

    from decal import LoraConfig, get_peft_model
    from decal.data.batch import Batch
    from decal.model import load, quantized
    from decal.model.lean import lean
    from decal.spec import TrainConfig
    from decal.training import optim
    from decal.training.losses import SFT
    from decal.training.precision import Precision
    from decal.training.step import take_step

    base: Any = _model(torch.bfloat16 if stored == "bf16" else torch.float32)
    if stored == "bf16":
        load.compute_in_fp32(base)
    elif stored == "nf4":
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        base.save_pretrained(folder)
        base = load.load_model(folder, quantize="nf4", device="cpu")
        share = quantized.bits_per_weight(base) / 16
        print(f"weights of the quantised linears: {share:.3f}x of bf16", file=sys.stderr)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(base, lora).train()
    stack.enter_context(lean(model))
    config = TrainConfig()
    optimizer = optim.build(model, config)
    precision = Precision(name="fp32", device=torch.device("cpu"))
    ids = _ids()
    batch = Batch(input_ids=ids, labels=ids, position_ids=None)

    def step() -> float:
        result = take_step(
            model, [batch], SFT(chunked=True), optimizer, precision.scaler(), precision=precision, limit=1.0
        )
        return result.loss

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--one", choices=SYSTEMS, help="measure one system in this process and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, STEPS)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for system in args.systems:
            out = subprocess.run(
                [sys.executable, __file__, "--one", system], check=True, capture_output=True, text=True
            )
            got = json.loads(out.stdout.strip().splitlines()[-1])
            seen = best.setdefault(system, got)
            seen["seconds"] = min(seen["seconds"], got["seconds"])
            seen["peak_gib"] = max(seen["peak_gib"], got["peak_gib"])
    print(f"{'system':12} {'s/step':>8} {'tok/s':>7} {'peak GiB':>9} {'time':>6} {'memory':>7}  loss")
    first = best[args.systems[0]]
    for system, got in best.items():
        print(
            f"{system:12} {got['seconds']:8.2f} {2048 / got['seconds']:7.0f} {got['peak_gib']:9.2f} "
            f"{got['seconds'] / first['seconds']:5.2f}x {got['peak_gib'] / first['peak_gib']:6.2f}x  "
            f"{got['first_loss']:.3f} -> {got['last_loss']:.3f}"
        )


if __name__ == "__main__":
    main()
