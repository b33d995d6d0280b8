"""The 4-bit codec's Triton kernels against its PyTorch reference: in Triton's interpreter, and on a card (-m gpu)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decal.ops import nf4

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton is made for Linux alone")

from decal.ops import nf4_multiply_triton, nf4_triton  # noqa: E402  # after it is known that triton is there

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter cuts fp32 to bf16 instead of rounding it, and multiplies bf16 tiles as integers.
EXACT = DTYPES if CUDA else DTYPES[:2]
KINDS = ["nf4", "fp4"]
SIZES = [(1, 64), (64, 64), (65, 64), (1001, 32), (4096 + 70, 4096), (9000, 128)]
gpu_sizes = pytest.mark.parametrize(
    ("n", "block"), [(4096 * 4096, 64), (1 << 22 | 31, 64), (3_000_001, 4096), (14_336 * 512 + 2, 32)]
)
gpu = pytest.mark.gpu
needs_card = pytest.mark.skipif(not CUDA, reason="needs a CUDA card")


def _sample(n: int, dtype: torch.dtype) -> Tensor:
    """Values (n,) with a block of zeros, a tail of zeros, and both ends of the range in it."""
    x = torch.randn(n, device=DEVICE) ** 3
    x[128:192] = 0
    x[n // 64 * 64 :] = 0 if n % 128 > 64 else 0.25
    return x.to(dtype)


def _same_codec(n: int, block: int, dtype: torch.dtype, kind: str) -> None:
    x = _sample(n, dtype)
    packed, absmax = nf4_triton.quantize(x, block, kind)
    expected_packed, expected_absmax = nf4.reference_quantize(x, block, kind)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)
    nested = nf4.Nested(*nf4.double_quantize(absmax))
    for out_dtype in EXACT:
        out, expected = torch.full((2, n), torch.nan, dtype=out_dtype, device=DEVICE)
        nf4_triton.dequantize(packed, absmax, out, block, kind)
        nf4.reference_dequantize(packed, absmax, expected, block, kind)
        assert torch.equal(out, expected)
        out.fill_(torch.nan)
        nf4_triton.dequantize_nested(packed, nested, out, block, kind)
        nf4.reference_dequantize(packed, nf4.single(nested), expected, block, kind)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "block"), SIZES)
def test_codes_scales_and_values_equal_the_reference(n: int, block: int, kind: str, dtype: torch.dtype) -> None:
    _same_codec(n, block, dtype, kind)


@gpu
@needs_card
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@gpu_sizes
def test_large_tensors_equal_the_reference(n: int, block: int, kind: str, dtype: torch.dtype) -> None:
    _same_codec(n, block, dtype, kind)


@gpu
@needs_card
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "block"), SIZES)
def test_small_tensors_equal_the_reference_on_a_card(n: int, block: int, kind: str) -> None:
    for dtype in DTYPES:
        _same_codec(n, block, dtype, kind)


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # of numpy, in which the interpreter computes
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("at", [3, 130])
def test_inf_and_nan_show_in_their_block_alone(bad: float, at: int) -> None:
    x = torch.randn(140, device=DEVICE)
    x[at] = bad
    finite = nf4_triton.quantize(x, 64, "nf4")[1].isfinite().tolist()
    assert finite == [block != at // 64 for block in range(3)]


def _weight(out: int, inputs: int, block: int, kind: str, *, double: bool) -> tuple[Tensor, nf4.Scales, Tensor]:
    """Return codes, scales and the decoded weight (out, inputs) fp32."""
    packed, absmax = nf4.reference_quantize(torch.randn(out * inputs, device=DEVICE), block, kind)
    scales = nf4.Nested(*nf4.double_quantize(absmax)) if double else absmax
    W = torch.empty(out, inputs, device=DEVICE)
    nf4.reference_dequantize(packed, nf4.single(scales), W.view(-1), block, kind)
    return packed, scales, W


def _merge_is_close(
    out: int, inputs: int, rank: int, dtype: torch.dtype, *, block: int = 64, double: bool = True
) -> None:
    packed, scales, W = _weight(out, inputs, block, "nf4", double=double)
    A, B = torch.randn(rank, inputs, device=DEVICE), torch.randn(out, rank, device=DEVICE)
    got = torch.full((out, inputs), torch.nan, dtype=dtype, device=DEVICE)
    nf4_triton.decode_plus(packed, scales, A, B, 0.3, got, block, "nf4")
    change = 0.3 * (B.double() @ A.double())
    exact = W.double() + change
    # Half a unit in the last place of the rounding, and of the change: fp32 sums, or tf32 factors before 16 bits.
    rounding, factor = (torch.finfo(dtype).eps / 2, 1e-6 if dtype == torch.float32 else 1e-3)
    allowed = rounding * exact.norm() + factor * change.norm()
    if CUDA or dtype != torch.bfloat16:
        assert (got.double() - exact).norm() <= allowed
    nf4_triton.decode_plus(packed, scales, A, torch.zeros_like(B), 0.3, got, block, "nf4")
    if dtype in EXACT:
        assert torch.equal(got, W.to(dtype))


@pytest.mark.parametrize(("out", "inputs"), [(70, 192), (40, 96)])  # in the second blocks reach over rows
def test_a_sum_in_fp64(out: int, inputs: int) -> None:
    packed, scales, W = _weight(out, inputs, 64, "nf4", double=True)
    A, B = torch.randn(4, inputs, device=DEVICE), torch.randn(out, 4, device=DEVICE)
    got = torch.full((out, inputs), torch.nan, dtype=torch.float64, device=DEVICE)
    nf4_triton.decode_plus(packed, scales, A, B, 0.3, got, 64, "nf4")
    exact = W.double() + 0.3 * (B.double() @ A.double())
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)  # the kernel sums in fp32


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize(("out", "inputs"), [(70, 192), (256, 64), (40, 96)])  # with edges, without, blocks over rows
def test_rows_or_columns_are_multiplied_and_turned_over(out: int, inputs: int, turn: bool) -> None:
    packed, scales, W = _weight(out, inputs, 64, "nf4", double=True)
    A, B = torch.randn(4, inputs, device=DEVICE), torch.randn(out, 4, device=DEVICE)
    by = torch.rand((1, inputs) if turn else (out, 1), device=DEVICE)
    got = torch.full((inputs, out) if turn else (out, inputs), torch.nan, device=DEVICE)
    nf4_triton.decode_plus(packed, scales, A, B, 0.3, got.t() if turn else got, 64, "nf4", by)
    exact = (W.double() + 0.3 * (B.double() @ A.double())) * by.double()
    torch.testing.assert_close(got.t() if turn else got, exact.float(), rtol=1e-5, atol=1e-6)  # fp32, in another order


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "inputs", "rank"), [(3, 64, 1), (70, 192, 16), (40, 96, 70)])
def test_weight_and_change_are_summed_before_rounding(out: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    _merge_is_close(out, inputs, rank, dtype, block=32 if inputs == 96 else 64, double=rank != 16)


@gpu
@needs_card
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "inputs"), [(14336, 4096), (1000, 576), (257, 4096), (64, 8192)])
@pytest.mark.parametrize("rank", [1, 16, 17, 64, 130])
def test_large_weight_and_change(out: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    _merge_is_close(out, inputs, rank, dtype)
    _merge_is_close(out, inputs, rank, dtype, double=False)


def test_a_block_across_rows_is_merged_too() -> None:
    _merge_is_close(7, 90, 4, torch.float32, block=64)


def _product_is_close(
    rows: int, out: int, inputs: int, dtype: torch.dtype, *, block: int = 64, kind: str = "nf4", double: bool = True
) -> None:
    packed, scales, W = _weight(out, inputs, block, kind, double=double)
    x = torch.randn(rows, inputs, device=DEVICE).to(dtype)
    assert nf4_multiply_triton.can_multiply(x, block)
    got = nf4_multiply_triton.multiply(x, packed, scales, out, block, kind)
    assert got.shape == (rows, out)
    assert got.dtype == dtype
    exact = x.double() @ (W if rows == 1 else W.to(dtype)).double().T  # one row: W is not rounded
    eps = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 2e-6
    assert (got.double() - exact).norm() <= eps * exact.norm()
    assert torch.equal(got, nf4_multiply_triton.multiply(x, packed, scales, out, block, kind))  # sums in a fixed order


@pytest.mark.parametrize("dtype", DTYPES if CUDA else [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("double", [False, True])
def test_products_without_the_weight(rows: int, double: bool, dtype: torch.dtype) -> None:
    _product_is_close(rows, 70, 192, dtype, double=double)


@gpu
@needs_card
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "inputs"), [(14336, 4096), (1000, 576), (257, 4096), (4096, 14336), (37, 1088)])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 32])
def test_large_products_without_the_weight(rows: int, out: int, inputs: int, dtype: torch.dtype) -> None:
    _product_is_close(rows, out, inputs, dtype)
    _product_is_close(rows, out, inputs, dtype, kind="fp4", block=32, double=False)


def test_codes_that_start_between_words() -> None:
    packed, scales, W = _weight(8, 64, 64, "nf4", double=False)
    moved = torch.cat([packed[:1], packed])[1:]
    x = torch.randn(1, 64, device=DEVICE)
    assert torch.equal(
        nf4_multiply_triton.multiply(x, moved, scales, 8, 64, "nf4"),
        nf4_multiply_triton.multiply(x, packed, scales, 8, 64, "nf4"),
    )
    out = torch.empty_like(W)
    nf4_triton.dequantize(moved, nf4.single(scales), out.view(-1), 64, "nf4")
    assert torch.equal(out, W)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((33, 64), torch.float32), ((64,), torch.float32), ((2, 65), torch.float32), ((2, 64), torch.float64)],
)
def test_other_products_are_left_to_a_decode(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert not nf4_multiply_triton.can_multiply(torch.zeros(shape, dtype=dtype), 64)
