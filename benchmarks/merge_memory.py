"""Peak memory of `decal merge` on a Llama-3.1-8B shape with random bf16 weights, at two depths: it does not grow.

The checkpoint (files of 2 GiB), an adapter (r=16, all linear layers) and the merged model are written to a folder of
--where (up to 34 GB at 32 layers) and removed. Each merge runs in a process of its own; its peak is VmHWM, which counts
the pages of files that were mapped, too. With --quantize nf4 the adapter counts as trained on codes.

    python benchmarks/merge_memory.py --layers 8 32
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GIB = 2**30


def make(folder: Path, layers: int, quantize: str | None) -> None:
    """Write a random model and adapter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from decal import LoraConfig, get_peft_model, load_model
    from decal.bundled import MODEL_DIR
    from decal.files import checkpoint, sealed
    from decal.spec import QuantConfig

    base = folder / "base"
    shutil.copytree(MODEL_DIR, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*.md"))
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in LlamaForCausalLM(config).state_dict().items()}
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with checkpoint.Writer(base) as writer:
        for key, shape in shapes.items():
            repeats = -(-shape.numel() // noise.numel())
            writer.add(
                {
                    key: torch.ones(shape).bfloat16()
                    if len(shape) == 1
                    else noise.repeat(repeats)[: shape.numel()].view(shape)
                }
            )
    model = get_peft_model(
        load_model(base, device="cpu", stream=True), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(folder / "adapter")
    settings = None if quantize is None else QuantConfig.model_validate({"format": quantize})
    sealed.write(folder / "adapter", sealed.Seal(quantize=settings, base_fingerprint=checkpoint.fingerprint(base)))


def one(folder: Path, into: str) -> None:
    """Merge in this process and print its peak."""
    import decal.recipes.merge as recipe

    imported = status("VmRSS")
    began = time.perf_counter()
    merged = recipe.merge(str(folder / "adapter"), folder / "merged", dtype="bf16", into=into, force=True)
    print(
        json.dumps(
            {
                "peak": status("VmHWM"),
                "imported": imported,
                "seconds": time.perf_counter() - began,
                "tokens": merged.agreement.tokens,
                "kl": merged.agreement.kl,
                "survived": merged.rounding.survived,
            }
        )
    )


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--quantize", choices=("nf4",))
    parser.add_argument("--into", default="auto")
    parser.add_argument("--one", type=Path, help="merge what lies in this folder, in this process")
    args = parser.parse_args()
    if args.one:
        one(args.one, args.into)
        return
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.where) as name:
            folder = Path(name)
            make(folder, layers, args.quantize)
            shard = max(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
            size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
            command = [sys.executable, __file__, "--one", str(folder), "--into", args.into]
            said = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            print(
                f"{layers} layers, {size / GIB:.1f} GiB in bf16, files of up to {shard / GIB:.2f} GiB: "
                f"peak {said['peak'] / GIB:.2f} GiB (3 files + 1 GiB: {3 * shard / GIB + 1:.2f}), "
                f"{said['imported'] / GIB:.2f} after imports, {said['seconds']:.0f} s, "
                f"proof on {said['tokens']} tokens: KL {said['kl']:.2g}, {said['survived']:.1%} survived",
                flush=True,
            )


if __name__ == "__main__":
    main()
