"""What lies side by side in memory is seen as one tensor, and nothing else is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from decal.training.stretches import side_by_side, stretches


def rows() -> list[Tensor]:
    return list(torch.arange(24.0).view(12, 2).split_with_sizes([3, 4, 5]))


def test_neighbours_are_one_view_that_writes_into_each() -> None:
    tensors = rows()
    (one,) = stretches(tensors)
    assert torch.equal(one, torch.arange(24.0))
    one.zero_()
    assert not any(x.any() for x in tensors)


def test_a_gap_or_another_order_ends_a_view() -> None:
    first, second, third = rows()
    assert [x.tolist() for x in stretches([first, third])] == [first.flatten().tolist(), third.flatten().tolist()]
    found = stretches([second, third, first])
    assert [x.numel() for x in found] == [18, 6]
    assert torch.equal(torch.cat(found), torch.cat([second, third, first]).flatten())
    assert [x.numel() for x in stretches([first, first])] == [6, 6]


def test_numbers_are_one_view_too() -> None:
    assert [x.shape for x in stretches(list(torch.zeros(5).unbind()))] == [(5,)]
    assert [x.shape for x in stretches([torch.zeros(()), torch.zeros(())])] == [(1,), (1,)]


def test_two_storages_that_touch_are_two() -> None:
    memory = np.arange(8, dtype=np.float32)
    left, right = torch.from_numpy(memory[:4]), torch.from_numpy(memory[4:])
    assert left.data_ptr() + left.nbytes == right.data_ptr()
    assert [x.tolist() for x in stretches([left, right])] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_what_is_alone_is_put_side_by_side_and_what_shares_stays() -> None:
    shared, other, _ = rows()
    tensors = [torch.ones(2, 2), shared, torch.full((3, 2), 7.0), other, torch.tensor([[5.0, 6.0]])]
    found = side_by_side(tensors)
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(found, tensors, strict=True))
    assert found[1] is shared
    assert found[3] is other
    assert [x.numel() for x in stretches([found[0], found[2], found[4]])] == [12]


def test_one_that_is_alone_is_not_copied() -> None:
    tensors = [torch.ones(3), *torch.zeros(4).unbind()]
    assert all(a is b for a, b in zip(side_by_side(tensors), tensors, strict=True))
