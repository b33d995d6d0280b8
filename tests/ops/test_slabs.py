"""A head in codes, slab by slab: against its decoded weight, whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from decal.errors import DataError
from decal.layers.coded import CodedBase, CodedLinear
from decal.layers.int8_linear import Int8Linear
from decal.layers.nf4_linear import NF4Linear
from decal.model import quantized
from decal.ops import select, slabs, workspace
from decal.ops.loss import chunked_cross_entropy

V, D, N = 1000, 192, 23  # slabs of 256 rows do not divide 1000, and 512 rows are 256 blocks of 64 times two
FORMATS = ["nf4", "nf4 single", "fp4", "int8"]


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "ROWS", 300)
    workspace.release()


def head(
    form: str = "nf4", *, width: int = D, block: int = 64, dtype: torch.dtype = torch.float32, mean: float = 0.0
) -> CodedLinear:
    """Return a random head (V, width) in codes."""
    layer: CodedLinear
    if form == "int8":
        layer = Int8Linear(width, V, dtype=dtype)
    else:
        kind = "fp4" if form == "fp4" else "nf4"
        layer = NF4Linear(width, V, dtype=dtype, kind=kind, block=block, double_quant=form != "nf4 single")  # type: ignore[arg-type]  # a known kind
    layer.in_slabs = True
    return quantized.fill(layer, *layer.encode(torch.randn(V, width) * torch.rand(V, 1) + mean, "W"), "W")


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return hidden states that take a gradient, and labels of which some are ignored."""
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    return torch.randn(N, D, dtype=dtype).requires_grad_(), labels


class Largest(TorchDispatchMode):
    """Notes the most elements of a floating tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("kernels", ["reference", "numba", "triton"])
@pytest.mark.parametrize("form", FORMATS)
def test_slabs_are_the_rows_of_the_decoded_weight(form: str, kernels: select.Kind) -> None:
    layer = head(form)
    whole = CodedBase(layer).dense(torch.float32)
    with select.forced(kernels):
        found = [(rows, W.clone()) for rows, W in layer.slabs().parts(whole)]
    assert len(found) >= 4
    assert sum(len(W) for _, W in found) == V
    assert all(torch.equal(W, whole[rows]) for rows, W in found)


@pytest.mark.parametrize(
    ("width", "block", "size"),
    [(256, 64, 256), (192, 64, 256), (100, 64, 4096), (64, 4096, 16384)],  # the smallest sums to whole nested blocks
)
def test_slabs_begin_where_a_nested_block_of_scales_does(width: int, block: int, size: int) -> None:
    layer = head(width=width, block=block)
    assert layer.slabs().rows == size
    assert size * width % (256 * block) == 0
    whole = CodedBase(layer).dense(torch.float32)
    assert torch.equal(torch.cat([W.clone() for _, W in layer.slabs().parts(whole)]), whole)


@pytest.mark.parametrize("form", FORMATS)
def test_loss_and_gradient_are_those_of_the_decoded_head(form: str) -> None:
    layer, (hidden, labels) = head(form), rows()
    other = hidden.detach().clone().requires_grad_()
    loss, count = chunked_cross_entropy(hidden, layer.slabs(), labels, chunk=7)
    logits = F.linear(other, CodedBase(layer).dense(torch.float64))
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert count == int((labels >= 0).sum())
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)  # fp64; a few hundred terms in another order
    (loss / count).backward()
    (expected / count).backward()
    torch.testing.assert_close(hidden.grad, other.grad, rtol=1e-11, atol=1e-14)


def test_a_bias_moves_the_logits_and_takes_its_gradient() -> None:
    layer, (hidden, labels) = head(), rows()
    ours, theirs = (torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss, _ = chunked_cross_entropy(hidden, layer.slabs(), labels, bias=ours)
    W = CodedBase(layer).dense(torch.float64)
    expected = F.cross_entropy(F.linear(hidden.detach(), W, theirs), labels, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-14)


def test_a_bf16_gradient_is_about_as_good_as_over_the_whole_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred slabs' products, each rounded to bf16, are summed in fp32: what all rows share cancels in the end."""
    monkeypatch.setattr(slabs, "ROWS", 10)
    layer = head("nf4 single", dtype=torch.bfloat16, mean=1.0)
    W, (exact, labels) = CodedBase(layer).dense(torch.bfloat16), rows()
    with torch.no_grad():
        exact *= 0.05  # no label stands out yet, and every slab counts
    F.cross_entropy(F.linear(exact, W.double()), labels, reduction="sum").backward()
    assert exact.grad is not None
    errors = []
    for weight in (layer.slabs(), W):
        hidden = exact.detach().bfloat16().requires_grad_()
        chunked_cross_entropy(hidden, weight, labels)[0].backward()
        assert hidden.grad is not None
        errors.append(float((hidden.grad.double() - exact.grad).norm() / exact.grad.norm()))
    # Both round hidden states, logits and dL/dz to 2^-9; a hundred rounded products add half as much here (1.5 times).
    # Summed in bf16 they would add seven times as much.
    assert errors[0] < 2 * errors[1]


def test_no_tensor_is_as_large_as_the_head() -> None:
    layer, (hidden, labels) = head(), rows(torch.float32)
    slab = layer.slabs().rows * D
    with Largest() as largest:
        chunked_cross_entropy(hidden, layer.slabs(), labels, chunk=7)[0].backward()
        layer(hidden.repeat(2, 1)).sum().backward()  # more rows than are multiplied without forming any weight
    assert largest.elements == slab < V * D / 3


@pytest.mark.parametrize("form", FORMATS)
def test_a_forward_pass_and_its_gradient_are_those_of_the_decoded_weight(form: str) -> None:
    layer, (x, _) = head(form, dtype=torch.float64), rows()
    other = x.detach().clone().requires_grad_()
    W, dy = CodedBase(layer).dense(torch.float64), torch.randn(N, V, dtype=torch.float64)
    y, expected = layer(x.view(1, N, D)), F.linear(other, W)
    torch.testing.assert_close(y[0], expected, rtol=1e-12, atol=1e-12)  # fp64, another order of sums
    (y[0] * dy).sum().backward()
    (expected * dy).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    hidden, labels = rows()
    labels[3] = V
    with pytest.raises(DataError, match=f"vocabulary of {V}"):
        chunked_cross_entropy(hidden, head().slabs(), labels)
