"""Paged states: where they are when, and that it changes no bit. The card's memory is a number that a test sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decal.training.adamw8bit import AdamW8bit
from decal.training.paged import Paged, pieces

CPU = torch.device("cpu")
RESERVE = 1000
SHAPES = [(64, 64), (96, 64), (5,), (70, 64), (200, 64)]
INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "adamw8bit": lambda groups: AdamW8bit(groups, lr=1e-2),
}


class Card:
    """A model, its optimizer, and a card whose free bytes are `free`."""

    def __init__(self, inner: Callable[..., torch.optim.Optimizer], *, paged: bool = True) -> None:
        g = torch.Generator().manual_seed(0)
        self.weights = [nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]
        groups: list[dict[str, Any]] = [
            {"params": self.weights[:3], "weight_decay": 0.1},
            {"params": self.weights[3:], "lr": 3e-2},
        ]
        self.free, self.said, self.steps = 0, list[str](), 0
        self.optimizer: Any = inner(groups)
        if paged:
            self.optimizer = Paged(
                self.optimizer,
                device=CPU,
                free=lambda: self.free,
                reserve=RESERVE,
                piece=64 * 170,
                say=self.said.append,
            )

    @property
    def size(self) -> int:
        return sum(t.nbytes for state in self.optimizer.state.values() for t in state.values() if t.ndim)

    def step(self, free: int, in_backward: int | None = None) -> str:
        """Step along a gradient that depends on the step's number alone; return where the states then are."""
        g = torch.Generator().manual_seed(self.steps)
        self.steps += 1
        self.free = free if in_backward is None else in_backward
        sum((w * torch.randn(w.shape, generator=g)).sum() for w in self.weights).backward()
        self.free = free
        self.optimizer.step()
        self.optimizer.zero_grad()
        return getattr(self.optimizer, "place", "card")


@pytest.fixture(params=sorted(INNER))
def inner(request: pytest.FixtureRequest) -> Callable[..., torch.optim.Optimizer]:
    return INNER[request.param]


def test_out_and_back_equals_never_moved_bit_for_bit(inner: Callable[..., torch.optim.Optimizer]) -> None:
    card, plain = Card(inner), Card(inner, paged=False)
    places = []
    for free in (10**9, 10**9, 10**9, 0, 0, 10**9, 0):
        places.append(card.step(free))
        plain.step(free)
        assert all(torch.equal(a, b) for a, b in zip(card.weights, plain.weights, strict=True))
    assert places == ["new", "card", "card", "host", "host", "card", "host"]
    for a, b in zip(card.weights, plain.weights, strict=True):
        mine, expected = card.optimizer.state[a], plain.optimizer.state[b]
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[slot], expected[slot]) for slot in expected)
    assert ["host memory" in text for text in card.said] == [True, False, True]
    assert "back on the card" in card.said[1]


def test_room_for_the_reserve_keeps_them_and_room_for_both_brings_them() -> None:
    card = Card(INNER["adamw"])
    card.step(0)
    assert card.step(RESERVE + card.size - 1) == "host"
    assert card.step(RESERVE + card.size) == "card"
    assert card.step(RESERVE) == "card"  # what was free for them is now theirs: no going out and in
    assert card.step(RESERVE - 1) == "host"
    assert len(card.said) == 3  # said when they move, not at each step


def test_what_was_free_in_the_backward_pass_counts() -> None:
    card = Card(INNER["adamw"])
    card.step(10**9)
    assert card.step(10**9, in_backward=0) == "host"
    assert card.step(10**9) == "card"  # only the last step's


def test_while_out_the_card_holds_one_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[str, int]] = []
    for name in ("_to_card", "_to_host"):
        plain = getattr(Paged, name)

        def record(self: Paged, value: Tensor, name: str = name, plain: Any = plain) -> Tensor:
            moves.append((name, value.nbytes))
            moved: Tensor = plain(self, value)
            assert moved.data_ptr() != value.data_ptr()
            return moved

        monkeypatch.setattr(Paged, name, record)
    card = Card(INNER["adamw"])
    card.step(0)
    card.step(0)
    moves.clear()
    card.step(0)
    held, most = 0, 0
    for name, size in moves:
        held += size if name == "_to_card" else -size
        most = max(most, held)
    assert held == 0
    assert sum(size for name, size in moves if name == "_to_card") == card.size
    assert most == 2 * 4 * 200 * 64  # both moments of the largest tensor, which is larger than a piece and goes alone


def test_pieces_hold_each_parameter_once_in_order() -> None:
    weights = [nn.Parameter(torch.zeros(n)) for n in (3, 3, 2, 9, 1, 7)]
    assert [[p.numel() for p in piece] for piece in pieces(weights, 8)] == [[3, 3, 2], [9], [1, 7]]


def test_a_paged_state_dict_is_the_inner_ones() -> None:
    paged, plain, other = Card(INNER["adamw8bit"]), Card(INNER["adamw8bit"], paged=False), Card(INNER["adamw8bit"])
    for card in (paged, plain):
        card.step(0)
    for a, b in zip(other.weights, paged.weights, strict=True):
        a.data.copy_(b.data)
    other.optimizer.load_state_dict(paged.optimizer.state_dict())
    other.steps = 1
    for card in (other, plain):
        card.step(0)
    assert all(torch.equal(a, b) for a, b in zip(other.weights, plain.weights, strict=True))
    other.optimizer.param_groups[0]["lr"] = 0.0  # as a schedule does: the groups are still the inner optimizer's
    before = other.weights[0].detach().clone()
    other.optimizer.param_groups[0]["weight_decay"] = 0.0
    other.step(0)
    assert torch.equal(other.weights[0], before)


def test_a_closure_is_called_with_gradients_on() -> None:
    (weight,) = [nn.Parameter(torch.ones(3))]
    for optimizer in (AdamW8bit([weight]), Paged(AdamW8bit([weight]), device=CPU, free=lambda: 0)):

        def closure() -> float:
            loss = (weight**2).sum()
            loss.backward()
            return loss.item()

        assert optimizer.step(closure) == pytest.approx(3.0, rel=0.01)
