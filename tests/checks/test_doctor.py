"""The doctor's report: right kernels pass, a wrong or broken one fails, and nothing says who or where."""

from __future__ import annotations

import getpass
import json
import platform
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decal.checks import doctor, kernels
from decal.checks.kernels import Codec
from decal.ops import nf4, select

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["numba", "reference"])
def test_the_kernels_here_are_right(kind: select.Kind) -> None:
    with select.forced(kind):
        found = kernels.check(CPU)
    assert [check.name for check in found] == [
        *("4-bit quantise", "4-bit decode", "4-bit decode plus", "4-bit product", "8-bit AdamW")
    ]
    assert [check.status for check in found] == ["passed", "passed", "passed", "not applicable", "passed"]


def one_code_off(*arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    packed, absmax = nf4.quantize(*arguments, **settings)
    packed[7] ^= 1
    return packed, absmax


def one_value_off(*arguments: Any, **settings: Any) -> Tensor:
    out = nf4.decode(*arguments, **settings)
    out[3, 5] += 1e-3
    return out


def without_the_scale(
    packed: Tensor, scales: Any, A: Tensor, B: Tensor, s: float, out: Tensor, **settings: Any
) -> Tensor:
    return nf4.decode_plus(packed, scales, A, B, 1.0, out, **settings)


def too_large(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.full((len(x), kernels.SIZE[0]), 1e4)


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        (Codec(quantize=one_code_off), "4-bit quantise"),
        (Codec(decode=one_value_off), "4-bit decode"),
        (Codec(decode_plus=without_the_scale), "4-bit decode plus"),
        (Codec(multiply=too_large), "4-bit product"),
    ],
)
def test_a_wrong_kernel_is_named(codec: Codec, name: str) -> None:
    with select.forced("numba"):
        bad = [check for check in kernels.check(CPU, codec) if check.status == "failed"]
    assert [check.name for check in bad] == [name]
    assert "numba on cpu: largest difference" in bad[0].measure
    assert bad[0].fix is not None
    assert bad[0].fix.startswith("Reinstall numba")


def test_8_bit_floats_are_off_by_their_rounding_alone() -> None:
    """What a Hopper card is asked, asked of plain PyTorch."""
    apart, allowed = kernels._floats8(torch.device("cpu"), Codec())
    assert apart is not None
    assert 0 < apart <= allowed

    def crooked(*args: Any, **given: Any) -> Tensor:
        out: Tensor = nf4.decode_plus(*args, **given)
        return out.copy_(out.float().roll(1, 0))

    apart, allowed = kernels._floats8(torch.device("cpu"), Codec(decode_plus=crooked))
    assert apart is not None
    assert apart > allowed


def test_a_kernel_that_does_not_run_is_an_answer_not_a_crash() -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this card")

    bad = next(check for check in kernels.check(CPU, Codec(decode=broken)) if check.status == "failed")
    assert "RuntimeError: no kernel image is available" in bad.measure


def test_the_report_says_neither_who_nor_where() -> None:
    variables = {
        "HF_TOKEN": "hf_secret",
        "WANDB_API_KEY": "also-secret",
        "HF_HOME": f"{Path.home()}/models/{getpass.getuser()}",
        "OMP_NUM_THREADS": "2",
        "PATH": "/not/asked/for",
    }
    report = doctor.examine(variables=variables)
    text = json.dumps({**asdict(report), "kernels": []})
    assert report.environment["HF_HOME"] == "~/models/<user>"
    assert report.environment["HF_TOKEN"] == "(set, not shown)"
    assert report.environment["OMP_NUM_THREADS"] == "2"
    build = platform.release().partition("-")[2] or "no build is told"
    for private in ("secret", str(Path.home()) + "/", "/not/asked/for", socket.gethostname(), build):
        assert private not in text
    assert report.versions["torch"] == torch.__version__
    assert report.machine["memory"].endswith("GiB free")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/users/ada/models", "~/models"),
        ("/data/ada/cache on box7", "/data/<user>/cache on <host>"),
        ("a cascade of adages", "a cascade of adages"),
    ],
)
def test_scrubbing(text: str, clean: str) -> None:
    assert doctor.scrub(text, home="/users/ada", user="ada", host="box7") == clean


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        ("6.8.0-45-generic", "6.8"),
        ("5.15.167.4-somewhere-standard-WSL2", "5.15"),
        ("24.1.0", "24.1"),
        ("11", "11"),
        ("", "of unknown version"),
    ],
)
def test_of_the_kernel_only_major_and_minor_are_told(kernel: str, told: str) -> None:
    assert doctor.release(kernel) == told
