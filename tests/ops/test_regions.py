"""The elementwise regions against autograd, and what runs where they cannot be compiled."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from decal.ops import fuse, regions


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # fp32, in another order


def test_rms_norm_and_its_gradient() -> None:
    x, w, dy, plus = random(5, 8).requires_grad_(), random(8, seed=1), random(5, 8, seed=2), random(5, 8, seed=3)
    expected = F.rms_norm(x, (8,), w, 1e-3)
    (dx,) = torch.autograd.grad(expected, x, dy)
    with torch.no_grad():
        close(regions.rms_norm(x, w, 1e-3), expected)
        total, normed = regions.add_rms_norm(x - plus, plus, w, 1e-3)
        close(total, x)
        close(normed, expected)
        close(regions.rms_norm_backward(dy, x, w, 1e-3), dx)
        close(regions.rms_norm_backward_plus(dy, x, w, 1e-3, plus), dx + plus)


def test_rotation_is_transformers_own() -> None:
    heads, kv, width = 4, 2, 6
    x, angles = random(2, 5, heads + 2 * kv, width).requires_grad_(), random(1, 5, width // 2, seed=1)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    q, k, v = (part.transpose(1, 2) for part in torch.split(x, [heads, kv, kv], 2))
    expected = (*apply_rotary_pos_emb(q, k, cos, sin), v)
    turned = regions.rotate(x.detach(), cos, sin, heads + kv)
    for got, wanted in zip(torch.split(turned, [heads, kv, kv], 2), expected, strict=True):
        close(got.transpose(1, 2), wanted.detach())
    dq, dk, dv = (random(*part.shape, seed=3 + i) for i, part in enumerate(expected))
    (dx,) = torch.autograd.grad(expected, x, (dq, dk, dv))
    close(regions.rotate_backward(dq, dk, dv, cos, sin), dx)


def test_norms_of_heads() -> None:
    heads, kv, width = 4, 2, 6
    x, wq, wk = random(5, heads + 2 * kv, width).requires_grad_(), random(width, seed=1), random(width, seed=2)
    q, k, v = torch.split(x, [heads, kv, kv], 1)
    expected = torch.cat((F.rms_norm(q, (width,), wq, 1e-3), F.rms_norm(k, (width,), wk, 1e-3), v), 1)
    d = random(*x.shape, seed=3)
    (dx,) = torch.autograd.grad(expected, x, d)
    close(regions.norm_heads(x.detach(), wq, wk, 1e-3, heads), expected.detach())
    close(regions.norm_heads_backward(d, x.detach(), wq, wk, 1e-3, heads), dx)


def test_gemmas_norm_is_transformers_own() -> None:
    x, dy, plus = random(5, 8).requires_grad_(), random(5, 8, seed=2), random(5, 8, seed=3)
    norm = Gemma3RMSNorm(8, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(random(8, seed=1))
    w, expected = norm.weight.detach(), norm(x)
    (dx,) = torch.autograd.grad(expected, x, dy)
    with torch.no_grad():
        close(regions.rms_norm(x, w, 1e-3, True), expected)
        close(regions.plus_rms_norm(x, plus, w, 1e-3, True), plus + expected)
        close(regions.add_rms_norm(x - plus, plus, w, 1e-3, True)[1], expected)
        close(regions.rms_norm_backward(dy, x, w, 1e-3, True), dx)
        close(regions.rms_norm_backward_plus(dy, x, w, 1e-3, plus, True), dx + plus)
        for dtype in (torch.bfloat16, torch.float16):
            narrow = x.to(dtype)
            assert torch.equal(regions.rms_norm(narrow, w.to(dtype), 1e-3, True), copy.deepcopy(norm).to(dtype)(narrow))


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_the_gated_product_and_its_gradients(activation: str) -> None:
    gate, up, dy = random(4, 6).requires_grad_(), random(4, 6, seed=1).requires_grad_(), random(4, 6, seed=2)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    expected = torch.autograd.grad(act * up, (gate, up), dy)
    g, u = torch.cat((gate.detach(), up.detach()), 1).chunk(2, 1)  # side by side, as in a layer
    d = dy.clone()
    close(regions.gated(g, u, activation), (act * up).detach())
    for got, wanted in zip(regions.gated_backward(d, g, u, activation), expected, strict=True):
        close(got, wanted)
    regions.gated_backward_(d, g, u, activation)
    close(d, (act * up).detach())
    close(g, expected[0])
    close(u, expected[1])


def test_cross_entropy_leaves_rows_without_a_label_out() -> None:
    z, y = random(4, 7).requires_grad_(), torch.tensor([3, -1, 0, 6])
    expected = F.cross_entropy(z, y, ignore_index=-1, reduction="none")
    (dz,) = torch.autograd.grad(expected.sum(), z)
    written = z.detach().clone()
    close(regions.cross_entropy_(written, y), expected.detach())
    close(written, dz)


def test_a_compiler_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def failing(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise TorchDynamoException("Failed to find C compiler. Please specify via CC environment variable.\nmore")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(fuse, "_broken", set())
    doubled = fuse.region(lambda x: 2 * x)
    with fuse.forced("compiled"), caplog.at_level(logging.WARNING, logger="decal"):
        assert doubled(torch.ones(2)).tolist() == [2, 2]
        assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert len(caplog.records) == 1
    assert "Failed to find C compiler" in caplog.text
    assert "more" not in caplog.text.splitlines()[0].split("(")[-1]


@pytest.mark.slow
def test_compiled_is_the_function_itself() -> None:
    dy, (gate, up) = random(4, 64), random(4, 128, seed=1).chunk(2, 1)
    with fuse.forced("plain"):
        plain = dy.clone(), gate.clone(), up.clone()
        regions.gated_backward_(plain[0], plain[1], plain[2], "silu")
    with fuse.forced("compiled"):
        regions.gated_backward_(dy, gate, up, "silu")
    for got, expected in zip((dy, gate, up), plain, strict=True):
        close(got, expected)
