"""The 8-bit map and AdamW on its codes, against bitsandbytes' map and the definitions."""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from decal.ops import adam8, dynamic8
from decal.ops.adam8 import Moments

CPU = torch.device("cpu")
signs = pytest.mark.parametrize("signed", [True, False])
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def values(signed: bool) -> Tensor:
    """Return blocks of 256 over all magnitudes of the map, a block of zeros, and one of subnormal numbers."""
    g = torch.Generator().manual_seed(0)
    magnitudes = 10 ** (-9 * torch.rand(64, 256, generator=g))
    signs = torch.randint(0, 2, (64, 256), generator=g) * 2 - 1
    x = magnitudes * signs if signed else magnitudes
    x[3], x[4] = 0, 1e-42
    return x.flatten()


@signs
def test_the_map_is_bitsandbytes(signed: bool) -> None:
    assert torch.equal(dynamic8.table(CPU, signed=signed), bnb.create_dynamic_map(signed=signed))


@signs
def test_the_code_is_the_nearest(signed: bool) -> None:
    x, table = values(signed), dynamic8.table(CPU, signed=signed)
    codes, absmax = dynamic8.nearest(x, signed=signed)
    assert torch.equal(absmax, x.view(-1, 256).abs().amax(1))
    unit = (x.view(-1, 256) * (1 / absmax.clamp_min(1e-38))[:, None]).flatten()
    distance = (unit[:, None].double() - table.double()).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    # The midpoints are fp32: half a unit in the last place of one, 2^-25 relative, is the most that can be lost.
    assert ((chosen - distance.amin(1)) <= 2**-24 * unit.abs().double()).all()


@signs
def test_next_to_every_midpoint_the_code_is_the_one_that_a_search_finds(signed: bool) -> None:
    table = dynamic8.table(CPU, signed=signed)
    middles = (table[:-1] + table[1:]) / 2
    inf = torch.tensor(math.inf)
    near = torch.cat([middles, middles.nextafter(inf), middles.nextafter(-inf), table, torch.ones(3)])
    rows = torch.nn.functional.pad(near.view(-1, 16), (0, 240), value=1.0)  # absmax 1 in each block: nothing is rounded
    assert rows.shape == (64, 256)
    codes, _ = dynamic8.nearest(rows.flatten(), signed=signed)
    assert torch.equal(codes, torch.bucketize(rows.flatten(), middles).to(torch.uint8))


@signs
def test_every_value_of_the_map_survives(signed: bool) -> None:
    table = dynamic8.table(CPU, signed=signed)
    codes, absmax = dynamic8.nearest(table, signed=signed)
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))
    assert torch.equal(dynamic8.dequantize(codes, absmax, signed=signed), table)


def fresh(n: int) -> Moments:
    codes, absmax = torch.zeros(2, n, dtype=torch.uint8), torch.zeros(2, n // 256)
    return Moments(codes[0], absmax[0], codes[1], absmax[1])


def test_the_first_step_is_adamws() -> None:
    """Nothing was coded yet, so the parameters are those of torch's AdamW (its order of fp32 roundings differs)."""
    g = torch.Generator().manual_seed(0)
    p, grad = torch.randn(512, generator=g), torch.randn(512, generator=g)
    moved, _ = adam8.adamw(p, grad, fresh(512), step=1, **SETTINGS)  # type: ignore[arg-type]
    expected = p.clone().requires_grad_()
    expected.grad = grad
    torch.optim.AdamW([expected], **SETTINGS).step()  # type: ignore[arg-type]
    torch.testing.assert_close(moved, expected.detach(), rtol=1e-6, atol=1e-7)


def test_a_gradient_that_stops_does_not_throw_its_parameter_away() -> None:
    """v below the map's smallest value must not become 0 while m lives: the next step would be lr · m / eps."""
    p, moments = torch.zeros(256), fresh(256)
    grad = torch.cat([torch.ones(128), torch.full((128,), 1e-5)])  # v: 1e-10 of the block's largest
    for step in range(1, 6):
        gradient = grad if step < 5 else torch.zeros(256)
        p, moments = adam8.adamw(p, gradient, moments, step=step, **SETTINGS)  # type: ignore[arg-type]
    # AdamW moves at most lr (1 - beta1) / sqrt(1 - beta2) a step (Kingma & Ba 2015, section 2.1).
    assert p.abs().max() <= 5 * SETTINGS["lr"] * 0.1 / math.sqrt(0.001)  # type: ignore[operator]


def test_a_block_of_zeros_stays_where_it_is() -> None:
    p, moments = torch.ones(256), fresh(256)
    for step in (1, 2):
        p, moments = adam8.adamw(p, torch.zeros(256), moments, step=step, **{**SETTINGS, "weight_decay": 0.0})  # type: ignore[arg-type]
    assert torch.equal(p, torch.ones(256))
