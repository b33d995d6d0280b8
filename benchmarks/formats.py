"""What storing a model's linear layers in each format does to its perplexity, and how many bits a weight takes.

    python benchmarks/formats.py --model MODEL --text FILE

FILE is plain text (.gz or not), read in windows of 512 tokens that do not overlap; everything is computed in fp32.
"""

from __future__ import annotations

import argparse
import gzip
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from decal import load_model, load_tokenizer
from decal.model import quantized
from decal.spec import QuantConfig

WINDOW, BATCH = 512, 4
FORMATS: dict[str, QuantConfig | None] = {
    "fp32": None,
    "int8, by row": QuantConfig(format="int8"),
    "nf4": QuantConfig(format="nf4", double_quant=False),
    "nf4, double": QuantConfig(format="nf4"),
    "fp4": QuantConfig(format="fp4", double_quant=False),
}


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean loss of every token but each window's first."""
    total = 0.0
    for part in windows.split(BATCH):
        logits = model(input_ids=part).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (windows.numel() - len(windows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    args = parser.parse_args()
    opened = gzip.open if args.text.suffix == ".gz" else open
    with opened(args.text, "rt", encoding="utf-8") as file:
        ids = load_tokenizer(args.model)(file.read(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    print(f"{windows.numel():,} tokens")
    for name in args.formats:
        settings = FORMATS[name]
        model = load_model(args.model, dtype="fp32", device="cpu", quantize=settings)
        found = perplexity(model, windows)
        bits = 32.0 if settings is None else quantized.bits_per_weight(model)
        print(f"{name:14} {bits:7.3f} bits   perplexity {found:8.2f}", flush=True)


if __name__ == "__main__":
    main()
