"""500 steps of decal's ways to run a layer beside transformers' own, on real text: the loss must follow the same curve.

On a CPU with the very functions that a card compiles (`fuse.forced("plain")`), in fp32 (bf16 is some 20 times slower
there), 8-bit floats in PyTorch's own arithmetic; on a card (`--device cuda`) in bf16 with its kernels. LoRA r=8 on all
linear layers, AdamW, one batch of text after the other, the same ones for all. Printed are the means of the first and
the last 50 steps, and how far from the reference the curve (means of 50 steps) is at most.

    python benchmarks/curves.py --text FILE
"""

from __future__ import annotations

import argparse
import gzip
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal.bundled import MODEL_DIR
from decal.data.batch import Batch
from decal.model.lean import lean
from decal.model.wrapper import PeftModel
from decal.ops import fuse
from decal.spec import LoraConfig, TrainConfig
from decal.training import optim
from decal.training.losses import SFT
from decal.training.precision import Precision
from decal.training.step import take_step

WINDOW = 50  # steps that a point of the curve is the mean of
SAMPLES = (48, 80)  # tokens of the samples of a packed row
WAYS: dict[str, dict[str, Any]] = {
    "reference": {"general": True},
    "keep": {},
    "recompute": {"recompute": True},
    "reference, packed": {"general": True, "packed": True},
    "packed": {"packed": True},
    "fp8": {"fp8": True},
}


def batches(text: str, steps: int, *, packed: bool) -> list[Batch]:
    """Return `steps` batches of two rows of text; with `packed` each row is two samples."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL_DIR)(text)["input_ids"])
    length = sum(SAMPLES)
    assert len(ids) >= steps * 2 * length, f"the text has {len(ids)} tokens, {steps * 2 * length} are wanted"
    places = torch.cat([torch.arange(n) for n in SAMPLES]).expand(2, length)
    found = []
    for rows in ids[: steps * 2 * length].view(steps, 2, length):
        labels = rows.clone()
        if packed:
            labels[:, SAMPLES[0]] = -100  # a sample's first token is no target
        found.append(Batch(input_ids=rows, labels=labels, position_ids=places if packed else None))
    return found


def curve(text: str, device: torch.device, steps: int, way: dict[str, Any]) -> torch.Tensor:
    """Return the losses of the steps."""
    narrow = device.type == "cuda"
    dtype = torch.bfloat16 if narrow else torch.float32
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype).to(device)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = PeftModel(base, config, generator=torch.Generator().manual_seed(0)).train()
    if way.get("recompute"):
        model.gradient_checkpointing_enable()
    numbers = Precision(name="bf16" if narrow else "fp32", device=device, fp8=way.get("fp8", False))
    optimizer = optim.build(model, TrainConfig(lr=1e-3))
    general = way.get("general", False)
    here = fuse.forced("off") if general else nullcontext() if narrow else fuse.forced("plain")
    losses = []
    with ExitStack() as stack:
        stack.enter_context(here)
        if not general:
            stack.enter_context(lean(model, fp8=numbers.fp8))
        for batch in batches(text, steps, packed=way.get("packed", False)):
            result = take_step(
                model, [batch], SFT(chunked=True), optimizer, numbers.scaler(), precision=numbers, limit=1.0
            )
            losses.append(result.loss)
    return torch.tensor(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, .gz or not")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    raw = options.text.read_bytes()
    text = (gzip.decompress(raw) if options.text.suffix == ".gz" else raw).decode("utf-8")
    references: dict[bool, torch.Tensor] = {}
    for name, way in WAYS.items():
        points = curve(text, torch.device(options.device), options.steps, way).view(-1, WINDOW).mean(1)
        packed = way.get("packed", False)
        reference = references.setdefault(packed, points)
        apart = float(((points - reference) / reference).abs().max())
        print(f"{name:<20} {points[0]:.4f} -> {points[-1]:.4f}   apart at most {apart:.3%}", flush=True)


if __name__ == "__main__":
    main()
