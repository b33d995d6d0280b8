"""How far 8-bit floats turn the gradient: its cosine with that of fp32, by the decoder layers left in 16 bits.

The bundled model with a change of about a tenth of its weights (r=8 on all linear layers), on ten pieces of real text,
2 x 128 tokens each; bf16 otherwise, on a CPU.

    python benchmarks/fp8_cosine.py --text FILE
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from decal.bundled import MODEL_DIR
from decal.layers.block import LeanBlock
from decal.model.lean import lean
from decal.model.wrapper import PeftModel
from decal.ops import fuse
from decal.spec import LoraConfig

PIECES, APART, TOKENS = 10, 5000, 256
LEFT = {"none": [], "the first": [0], "the first two": [0, 1], "the first and the last": [0, -1], "the last": [-1]}


def adapted(dtype: torch.dtype) -> Any:
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).to(dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = PeftModel(base, config, generator=torch.Generator().manual_seed(2)).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.1)
    return model


def gradient(model: nn.Module, ids: Tensor, *, autocast: bool) -> Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def in_8_bits(model: nn.Module, ids: Tensor, left: list[int]) -> Tensor:
    with fuse.forced("plain"), lean(model, fp8=True):
        blocks = [module for module in model.modules() if isinstance(module, LeanBlock)]
        wide = {number % len(blocks) for number in left}
        for number, block in enumerate(blocks):
            block.fp8 = number not in wide
        return gradient(model, ids, autocast=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, .gz or not")
    raw = parser.parse_args().text.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL_DIR)(text)["input_ids"])
    pieces = [ids[at : at + TOKENS].view(2, -1) for at in range(0, PIECES * APART, APART)]
    model, exact = adapted(torch.bfloat16), adapted(torch.float32)
    with fuse.forced("off"):
        expected = [gradient(exact, piece, autocast=False) for piece in pieces]
    for name, left in LEFT.items():
        found = [
            float(torch.cosine_similarity(in_8_bits(model, piece, left), wanted, 0))
            for piece, wanted in zip(pieces, expected, strict=True)
        ]
        print(f"in 16 bits {name}: {sum(found) / len(found):.4f} on average, {min(found):.4f} at least")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
