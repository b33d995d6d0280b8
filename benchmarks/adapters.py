"""Loading, switching and mixing adapters on a SmolLM2-135M-shaped model on the CPU, decal beside PEFT.

Adapters on q_proj and v_proj, r=16, fp32. Load: a second adapter from its folder beside a first one. Switch:
set_adapter. Mixed decode: one token for a batch of 8 rows with 8 different adapters, against the base alone. Medians.

    python benchmarks/adapters.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from step import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

import decal

ROWS, CONTEXT, REPEATS = 8, 64, 15
TARGETS = ["q_proj", "v_proj"]


def milliseconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of `work`, after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def decode(model: Any, ids: torch.Tensor, names: list[str]) -> tuple[float, float]:
    """Median times of decoding one token after CONTEXT tokens: the base alone and a mixed batch, taken in turn."""
    alone, mixed = [], []
    with torch.no_grad():
        base_cache = model(input_ids=ids, use_cache=True, adapter_names=["__base__"] * ROWS).past_key_values
        mixed_cache = model(input_ids=ids, use_cache=True, adapter_names=names).past_key_values
        for _ in range(2 * REPEATS):
            with model.disable_adapter():
                alone.append(one_token(model, ids, base_cache))
            mixed.append(one_token(model, ids, mixed_cache, adapter_names=names))
    return statistics.median(alone), statistics.median(mixed)


def one_token(model: Any, ids: torch.Tensor, cache: Any, **routing: Any) -> float:
    began = time.perf_counter()
    model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, **routing)
    took = 1000 * (time.perf_counter() - began)
    cache.crop(-1)
    return took


def measure(library: Any, folder: Path) -> dict[str, float]:
    """Load, switch and decode with one library; the adapters are those of `folder`."""
    model = library.PeftModel.from_pretrained(base(), folder / "0", adapter_name="a0")
    loads = iter(range(1, ROWS))
    times = []
    for i in loads:
        began = time.perf_counter()
        model.load_adapter(folder / str(i), adapter_name=f"a{i}")
        times.append(1000 * (time.perf_counter() - began))
    turn = iter(range(10**9))
    switch = milliseconds(lambda: model.set_adapter(f"a{next(turn) % 2}"))
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, CONTEXT))
    alone, mixed = decode(model, ids, [f"a{i}" for i in range(ROWS)])
    return {"load": statistics.median(times), "switch": switch, "base": alone, "mixed": mixed}


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(ROWS):
            config = decal.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False)
            made = decal.get_peft_model(base(), config, generator=torch.Generator().manual_seed(i))
            made.save_pretrained(folder / str(i))
        print(f"{'library':8} {'load ms':>8} {'switch ms':>10} {'base ms':>8} {'mixed ms':>9} {'mixed/base':>11}")
        for label, library in (("peft", peft), ("decal", decal)):
            got = measure(library, folder)
            print(
                f"{label:8} {got['load']:8.1f} {got['switch']:10.2f} {got['base']:8.1f} {got['mixed']:9.1f} "
                f"{got['mixed'] / got['base']:10.2f}x"
            )


if __name__ == "__main__":
    main()
