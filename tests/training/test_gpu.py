"""Training on a CUDA card: the precisions, fused AdamW, resumption. Run with -m gpu."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from decal.ops.loss import chunked_cross_entropy
from decal.recipes.finetune import Finetuned, finetune
from decal.rundir import RunDir
from decal.training.interrupt import Interrupted
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
