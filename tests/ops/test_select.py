"""Kernels that cannot be compiled on this machine: one line, and the reference's bits."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from decal.ops import nf4, select

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from triton.errors import TritonError  # after it is known that triton is there
from triton.runtime.errors import OutOfResources

from decal.ops import nf4_multiply_triton, nf4_triton

FAILURES = [
    TritonError("no such instruction"),
    OutOfResources(300_000, 232_448, "shared memory"),
    subprocess.CalledProcessError(1, ["gcc"]),
    FileNotFoundError(2, "No such file or directory", "ptxas"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    select._broken.clear()
    yield
    select._broken.clear()


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*given: Any) -> Any:
        raise error

    for name in ("quantize", "dequantize", "dequantize_nested", "decode_plus"):
        monkeypatch.setattr(nf4_triton, name, fail)
    monkeypatch.setattr(nf4_multiply_triton, "multiply", fail)


def everything() -> list[torch.Tensor | None]:
    """Return what each operation of the codec gives."""
    W = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    A, B = torch.ones(4, 128), torch.ones(32, 4)
    packed, absmax = nf4.quantize(W)
    nested = nf4.Nested(*nf4.double_quantize(absmax))
    form = {"block": 64, "kind": "nf4"}
    return [
        packed,
        absmax,
        nf4.decode(packed, absmax, torch.empty(32, 128), **form),  # type: ignore[arg-type]
        nf4.decode(packed, nested, torch.empty(32, 128), **form),  # type: ignore[arg-type]
        nf4.decode_plus(packed, nested, A, B, 0.5, torch.empty(32, 128), **form),  # type: ignore[arg-type]
        nf4.multiply(torch.ones(1, 128), packed, nested, 32, **form),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_the_reference_runs_in_their_place(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with select.forced("reference"):
        expected = everything()
    broken(monkeypatch, error)
    with select.forced("triton"), caplog.at_level(logging.WARNING, "decal"):
        for _ in range(2):
            for got, wanted in zip(everything(), expected, strict=True):
                assert (got is None and wanted is None) or torch.equal(got, wanted)  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    assert [text.split()[2] for text in said] == ["quantize", "dequantize", "decode_plus", "multiply"]
    assert said[0].startswith(
        "the kernel quantize could not be compiled and runs in plain PyTorch, with equal results but slower ("
    )
    assert all("\n" not in text for text in said)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("illegal memory access"), ValueError("x")]
)
def test_other_errors_are_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, error)
    with select.forced("triton"), pytest.raises(type(error)):
        everything()
