"""Training on a CUDA card: the precisions, the optimizers, resumption. Run with -m gpu."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from decal.ops.loss import chunked_cross_entropy
from decal.recipes.finetune import Finetuned, finetune
from decal.rundir import RunDir
from decal.training.adamw8bit import AdamW8bit
from decal.training.interrupt import Interrupted
from decal.training.paged import RESERVE, Paged, free_bytes
from tests.training.tiny_run import config, make_files

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def losses(done: Finetuned) -> list[float]:
    return [e["loss"] for e in RunDir(done.run).events() if e["kind"] == "step"]


def test_bf16_chunks_equal_fp64_within_their_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 256, generator=g).bfloat16(), (torch.randn(1000, 256, generator=g) / 5).bfloat16()
    labels = torch.randint(0, 1000, (300,), generator=g)
    labels[::3] = -100
    ours, exact = hidden.cuda().requires_grad_(), hidden.double().requires_grad_()
    loss, count = chunked_cross_entropy(ours, weight.cuda(), labels, chunk=64)
    (loss / count).backward()
    expected = F.cross_entropy(exact @ weight.double().T, labels)
    expected.backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert loss.dtype == torch.float32
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-3)  # bf16 logits near 3, rounded by 2^-9
    assert float((ours.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()) < 8e-3  # dz and dh rounded to bf16


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32"},
        {"precision": "auto"},
        {"precision": "fp16"},
        {"gradient_checkpointing": True},
        {"method": "full", "lr": 3e-3},
        {"method": "full", "lr": 3e-3, "optimizer": "paged_adamw8bit"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_way_to_train_follows_the_cpu(folder: Path, settings: dict[str, Any]) -> None:
    name = "-".join(map(str, settings.values()))
    settings = {"lr": 3e-2, "warmup": 0, **settings}
    no_dropout = {"lora": config(folder).lora.model_copy(update={"lora_dropout": 0.0})}  # masks differ by device
    runs = [
        finetune(
            config(folder, output=f"{name}-{device}", **{**settings, **more, "device": device}).model_copy(
                update=no_dropout
            )
        )
        for device, more in (("cpu", {"precision": "fp32"}), ("cuda", {}))
    ]
    assert RunDir(runs[1].run).manifest()["device_type"] == "cuda"
    cpu, cuda = (losses(run) for run in runs)
    assert cuda[0] == pytest.approx(cpu[0], rel=2e-2)  # the same data and weights, in 16-bit numbers
    assert cuda[-1] == pytest.approx(cpu[-1], rel=5e-2)
    assert cuda[-1] < 0.95 * cuda[0]


def test_resume_restores_the_cards_generator(folder: Path) -> None:
    whole = finetune(config(folder, output="whole", device="cuda"))
    with pytest.raises(Interrupted):
        finetune(
            config(folder, output="cut", device="cuda"),
            on_event=lambda e: os.kill(os.getpid(), signal.SIGINT) if e["kind"] == "step" and e["step"] == 5 else None,
        )
    torch.rand(9, device="cuda")
    cut = finetune(config(folder, output="cut", device="cuda"), resume=True)
    # Not bit for bit: atomic sums in the backward pass of the embedding. A wrong dropout mask is far outside this.
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-3)
    tensors: list[dict[str, Tensor]] = [load_file(run.result / "adapter_model.safetensors") for run in (cut, whole)]
    for name, expected in tensors[1].items():
        torch.testing.assert_close(tensors[0][name], expected, rtol=5e-2, atol=5e-3)


class Stepped:
    """Eight weights of 4 Mi elements and five steps of an optimizer on them, the states where `free` has them go."""

    def __init__(self, kind: str, free: int | None) -> None:
        card = torch.device("cuda", torch.cuda.current_device())
        g = torch.Generator(card).manual_seed(0)
        self.weights = [nn.Parameter(torch.randn(1024, 4096, generator=g, device=card)) for _ in range(8)]
        inner: torch.optim.Optimizer = (
            AdamW8bit(self.weights) if kind == "adamw8bit" else torch.optim.AdamW(self.weights, fused=True)
        )
        self.optimizer = inner if free is None else Paged(inner, device=card, free=lambda: free)
        for step in range(5):
            if step == 2:  # a paged one has found its place
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            for weight in self.weights:
                weight.grad = torch.randn(1024, 4096, generator=g, device=card)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.peak = torch.cuda.max_memory_allocated() - before
        self.states = [value for w in self.weights for value in self.optimizer.state[w].values() if value.ndim]
        self.size = sum(value.nbytes for value in self.states)
        self.held = before  # with the states, where they are on the card


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_paged_states_change_no_bit_and_leave_the_card(kind: str) -> None:
    empty = torch.cuda.memory_allocated()
    plain = Stepped(kind, None)
    expected, held, peak, size = [w.detach().cpu() for w in plain.weights], plain.held - empty, plain.peak, plain.size
    del plain
    for free, place in ((0, "cpu"), (1 << 40, "cuda")):
        empty = torch.cuda.memory_allocated()
        paged = Stepped(kind, free)
        assert all(torch.equal(w.detach().cpu(), e) for w, e in zip(paged.weights, expected, strict=True))
        assert {value.device.type for value in paged.states} == {place}
        if place == "cpu":
            assert all(value.is_pinned() for value in paged.states)
            # All states less, two of the eight pieces more at most: one under way, one not yet given back.
            assert (paged.held - empty) + paged.peak <= held + peak - size + 2 * size // 8
        del paged


def test_a_card_that_runs_short_and_has_room_again() -> None:
    card = torch.device("cuda", torch.cuda.current_device())
    weight = nn.Parameter(torch.randn(1024, 4096, device=card))
    said: list[str] = []
    optimizer = Paged(AdamW8bit([weight]), device=card, free=lambda: free_bytes(card), say=said.append)

    def step() -> str:
        (weight**2).sum().backward()
        optimizer.step()
        return optimizer.state[weight]["exp_avg"].device.type

    assert [step(), step()] == ["cpu", "cuda"]  # they begin on the host
    torch.cuda.empty_cache()
    hog = torch.empty(free_bytes(card) - RESERVE // 2, dtype=torch.uint8, device=card)
    assert step() == "cpu"
    del hog
    assert step() == "cuda"  # the allocator still holds the block, and it counts as free
    assert len(said) == 2


def test_a_paged_run_resumes(folder: Path) -> None:
    settings: dict[str, Any] = {"device": "cuda", "method": "full", "lr": 3e-3}
    whole = finetune(config(folder, output="paged-whole", optimizer="adamw8bit", **settings))
    with pytest.raises(Interrupted):
        finetune(
            config(folder, output="paged-cut", optimizer="adamw8bit", **settings),
            on_event=lambda e: os.kill(os.getpid(), signal.SIGINT) if e["kind"] == "step" and e["step"] == 5 else None,
        )
    cut = finetune(config(folder, output="paged-cut", optimizer="paged_adamw8bit", **settings), resume=True)
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-2)  # atomic sums, and codes that they tip over
