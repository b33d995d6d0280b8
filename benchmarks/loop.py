"""What decal's training loop costs over a bare forward, backward, clip and step on the same model and batches.

The bundled model, fp32, 4 x 128 tokens, LoRA r=16 on all linear layers. The two alternate; the table gives the best of
all rounds per step. Logging, the watch on progress and one checkpoint at the end are in the loop's time.

    python benchmarks/loop.py --rounds 5
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from decal import LoraConfig, get_peft_model, load_model
from decal.bundled import MODEL_DIR
from decal.data.batch import Batch
from decal.model.lean import lean
from decal.rundir import RunDir
from decal.spec import TrainConfig
from decal.training import loop, optim
from decal.training.logs import Report
from decal.training.losses import SFT
from decal.training.precision import Precision

ROWS, LENGTH, STEPS = 4, 128, 40


class Batches:
    """Random batches without end."""

    steps_per_epoch = STEPS

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        while True:
            ids = torch.randint(3, self.vocabulary, (ROWS, LENGTH), generator=self.generator)
            yield (Batch(input_ids=ids, labels=ids, position_ids=None),)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def bare(model: Any) -> float:
    """Seconds per step of the shortest loop that does the same work."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, loss, batches = (
        optim.build(model, TrainConfig(lr=1e-5)),
        SFT(chunked=True),
        iter(Batches(vocabulary(model))),
    )
    began = time.perf_counter()
    for _ in range(STEPS):
        (batch,) = next(batches)
        total, count = loss(model, batch)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total.item()
    return (time.perf_counter() - began) / STEPS


def looped(model: Any) -> float:
    """Seconds per step of `decal.training.loop.train`."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        run.claim("benchmark: true\n")
        began = time.perf_counter()
        loop.train(
            model,
            Batches(vocabulary(model)),
            SFT(chunked=True),
            TrainConfig(lr=1e-5, steps=STEPS),
            run=run,
            precision=Precision(name="fp32", device=torch.device("cpu")),
            emit=Report(run, [], None),
        )
        return (time.perf_counter() - began) / STEPS


def vocabulary(model: Any) -> int:
    size: int = model.config.vocab_size
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    base = load_model(MODEL_DIR, dtype=torch.float32, device="cpu")
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    with lean(model):
        bare(model)
        rounds = [(bare(model), looped(model)) for _ in range(args.rounds)]
    alone, ours = (1000 * min(column) for column in zip(*rounds, strict=True))
    print(f"bare {alone:.1f} ms/step, loop {ours:.1f} ms/step: {100 * (ours / alone - 1):+.1f}%")


if __name__ == "__main__":
    main()
