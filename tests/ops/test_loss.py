"""Chunked cross entropy against F.cross_entropy over whole logits, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from decal.errors import DataError, Unsupported
from decal.ops.loss import chunked_cross_entropy

N, D, V = 37, 24, 101
IGNORE = -100


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden, weight, bias and labels, a third of them ignored."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    weight, bias = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((V, D), (V,)))
    labels = torch.randint(0, V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < 0.33] = IGNORE
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=IGNORE, reduction="sum")


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 25, 1000, None])
def test_loss_and_all_gradients_equal_whole_logits_in_fp64(chunk: int | None, with_bias: bool) -> None:
    hidden, weight, bias, labels = inputs()
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    loss, count = chunked_cross_entropy(ours[0], ours[1], labels, bias=ours[2] if with_bias else None, chunk=chunk)
    expected = oracle(theirs[0], theirs[1], theirs[2] if with_bias else None, labels)
    assert count == int((labels != IGNORE).sum())
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    (loss / count * 3).backward()  # a scale that is not 1: the step divides by its count, GradScaler multiplies
    (expected / count * 3).backward()
    for mine, other in zip(ours[: 2 + with_bias], theirs, strict=False):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_gradients_are_the_numerical_ones() -> None:
    hidden, weight, bias, _ = inputs()
    h, w, b = leaves(hidden[:6, :4].contiguous(), weight[:9, :4].contiguous(), bias[:9])
    y = torch.tensor([0, 8, IGNORE, 3, 3, IGNORE])
    loss: Callable[..., Tensor] = lambda h, w, b: chunked_cross_entropy(h, w, y, bias=b, chunk=3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (h, w, b))


def test_a_frozen_head_gets_no_gradient_and_hidden_the_same_one() -> None:
    hidden, weight, _, labels = inputs()
    h, w = leaves(hidden, weight)
    frozen = hidden.clone().requires_grad_()
    chunked_cross_entropy(h, w, labels)[0].backward()
    chunked_cross_entropy(frozen, weight, labels)[0].backward()
    assert weight.grad is None
    assert h.grad is not None
    assert frozen.grad is not None
    assert torch.equal(h.grad, frozen.grad)


def test_a_head_alone_can_train() -> None:
    hidden, weight, _, labels = inputs()
    (w,), (other,) = leaves(weight), leaves(weight)
    chunked_cross_entropy(hidden, w, labels)[0].backward()
    oracle(hidden, other, None, labels).backward()
    torch.testing.assert_close(w.grad, other.grad, rtol=1e-12, atol=1e-14)


def test_a_tied_weight_gets_both_of_its_gradients() -> None:
    _, weight, _, _ = inputs()
    ids = torch.arange(12)
    grads = []
    for loss in (lambda h, w, y: chunked_cross_entropy(h, w, y, chunk=5)[0], lambda h, w, y: oracle(h, w, None, y)):
        (w,) = leaves(weight)
        loss(F.embedding(ids, w).tanh(), w, ids + 1).backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


def test_fp32_is_as_good_as_torchs_own() -> None:
    hidden, weight, _, labels = inputs()
    (exact,) = leaves(hidden)
    expected = oracle(exact, weight, None, labels)
    expected.backward()
    errors = []
    for loss in (lambda h, w, y: chunked_cross_entropy(h, w, y, chunk=8)[0], lambda h, w, y: oracle(h, w, None, y)):
        (h,) = leaves(hidden.float())
        got = loss(h, weight.float(), labels)
        got.backward()
        assert h.grad is not None
        assert exact.grad is not None
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
        errors.append(float((h.grad.double() - exact.grad).norm() / exact.grad.norm()))
    assert errors[0] < max(2 * errors[1], 1e-6)


def test_a_bf16_head_under_fp32_hidden_computes_in_fp32() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    stored = weight.bfloat16()
    ours, theirs = leaves(hidden), leaves(hidden)
    loss, _ = chunked_cross_entropy(ours[0], stored, labels)
    expected = oracle(theirs[0], stored.float(), None, labels)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # bf16 products would be off by 1e-3
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_products_have_an_fp32_softmax(dtype: torch.dtype, autocast: bool) -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    hidden, weight = hidden.to(dtype).float(), weight.to(dtype).float()  # so that only the products are rounded
    (h,), (exact,) = leaves(hidden if autocast else hidden.to(dtype)), leaves(hidden)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss, count = chunked_cross_entropy(h, weight if autocast else weight.to(dtype), labels, chunk=8)
    assert loss.dtype == torch.float32
    (loss / count).backward()
    expected = oracle(exact, weight, None, labels) / count
    expected.backward()
    assert h.grad is not None
    assert h.grad.dtype == h.dtype
    assert exact.grad is not None
    # bf16 keeps 8 bits: 2^-9 of logits near 15 is 0.03 each, averaged over the rows; dh is rounded twice (4e-3)
    torch.testing.assert_close(loss / count, expected, rtol=4e-3, atol=0)
    assert float((h.grad.float() - exact.grad).norm() / exact.grad.norm()) < 1e-2


def test_labels_outside_the_vocabulary_are_refused() -> None:
    hidden, weight, _, labels = inputs()
    for bad in (V, V + 1000, -1, -101):
        labels[4] = bad
        with pytest.raises(DataError, match=f"vocabulary of {V} .got: {bad}."):
            chunked_cross_entropy(hidden, weight, labels)


def test_a_batch_without_supervised_rows_is_zero_with_zero_gradients() -> None:
    hidden, weight, _, labels = inputs()
    h, w = leaves(hidden, weight)
    loss, count = chunked_cross_entropy(h, w, torch.full_like(labels, IGNORE))
    assert (loss.item(), count) == (0.0, 0)
    loss.backward()
    for leaf in (h, w):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    (h,), (other,) = leaves(hidden * 100), leaves(hidden * 100)
    loss, _ = chunked_cross_entropy(h, weight, labels)
    expected = oracle(other, weight, None, labels)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(h.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_backward_through_the_gradient_raises() -> None:
    hidden, weight, _, labels = inputs()
    (h,) = leaves(hidden)
    loss, _ = chunked_cross_entropy(h, weight, labels)
    with pytest.raises(Unsupported, match="second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_backward_twice_gives_the_gradient_twice() -> None:
    hidden, weight, _, labels = inputs()
    (h,) = leaves(hidden)
    loss, _ = chunked_cross_entropy(h, weight, labels)
    loss.backward(retain_graph=True)
    assert h.grad is not None
    once = h.grad.clone()
    loss.backward()
    assert torch.equal(h.grad, 2 * once)


class Largest(TorchDispatchMode):
    """Notes the most elements any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_ever_larger_than_a_chunk_of_logits() -> None:
    hidden, weight, _, labels = inputs()
    (h,), labels = leaves(hidden.repeat(3, 1)), labels.repeat(3)
    with Largest() as largest:
        loss, count = chunked_cross_entropy(h, weight, labels, chunk=9)
        loss.backward()
    assert largest.elements == max(9 * V, h.numel(), weight.numel())
    assert largest.elements < count * V


def test_only_supervised_rows_are_multiplied() -> None:
    hidden, weight, _, labels = inputs()
    hidden[labels == IGNORE] = float("nan")  # rows that were touched would spoil loss and gradients
    (h,) = leaves(hidden)
    loss, _ = chunked_cross_entropy(h, weight, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


def test_nothing_is_formed_for_gradients_that_nobody_wants() -> None:
    hidden, weight, _, labels = inputs()
    with torch.no_grad(), Largest() as largest:
        h, w = leaves(hidden, weight)
        loss, _ = chunked_cross_entropy(h, w, labels, chunk=1)
    assert not loss.requires_grad
    assert largest.elements <= max(hidden.numel(), weight.numel())
