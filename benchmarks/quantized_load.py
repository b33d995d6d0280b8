"""What loading quantised costs in memory: a random 1B-parameter checkpoint in bf16 from disk to NF4 on a CPU.

Anonymous resident memory above an interpreter with the same imports: the peak while loading, and what stays.

    python benchmarks/quantized_load.py --folder one-billion
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
GIB = 2**30


def anonymous() -> int:
    """Anonymous resident memory of this process in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no Anonymous line in smaps_rollup")


def make(folder: Path) -> None:
    """Write the checkpoint, if it is not there."""
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cpu"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def measure(folder: Path) -> dict[str, float]:
    """Load in this process and return sizes in GiB and seconds."""
    from decal.layers.coded import CodedLinear
    from decal.model.load import load_model

    before, peaks, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks.append(anonymous())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model = load_model(folder, device="cpu", quantize="nf4")
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    coded = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, CodedLinear))
    return {
        "parameters": coded / 1e9,
        "size": size / GIB,
        "peak": (max(peaks) - before) / GIB,
        "after": (anonymous() - before) / GIB,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.folder)))
        return
    make(args.folder)
    command = [sys.executable, __file__, "--folder", str(args.folder), "--one"]
    got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(f"{got['parameters']:.2f} G weights coded, model {got['size']:.2f} GiB, loaded in {got['seconds']:.1f} s")
    print(f"peak {got['peak']:.2f} GiB ({got['peak'] - got['size']:+.2f} over the model), after {got['after']:.2f} GiB")


if __name__ == "__main__":
    main()
