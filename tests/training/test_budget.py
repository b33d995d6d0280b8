"""How a budget of memory is read and spent; what is said where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from decal import LoraConfig, get_peft_model
from decal.errors import ConfigError
from decal.layers.block import LeanBlock
from decal.model.lean import lean
from decal.ops import fuse
from decal.spec import RunConfig
from decal.training import budget
from decal.training.budget import Plan, fill, parse
from tests import models


def test_sizes() -> None:
    assert parse("8GiB") == 8 * 2**30
    assert parse(" 7.5 GB ") == 7_500_000_000
    assert parse("512mib") == 2**29


@pytest.mark.parametrize("text", ["8", "GiB", "0GiB", "-1GiB", "8G", "8 GiB please"])
def test_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="a size with its unit"):
        parse(text)


@pytest.mark.parametrize(
    ("room", "plan"),
    [
        (-5.0, Plan(0, 0)),
        (0.9, Plan(0, 0)),
        (3.5, Plan(0, 3)),
        (10.0, Plan(1, 0)),
        (25.0, Plan(2, 2)),  # 5 are left for inputs, but there are but 2 layers
        (1000.0, Plan(4, 0)),
    ],
)
def test_room_is_spent_on_whole_layers_first(room: float, plan: Plan) -> None:
    assert fill(room, layers=4, kept=10.0, given=1.0) == plan


def test_the_last_layers_keep() -> None:
    assert Plan(keep=2, inputs=1).modes(5) == ["offload", "offload", "recompute", "keep", "keep"]


def test_what_a_layer_keeps_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear")).train()
    ids = models.tokens(2, 32)
    with fuse.forced("plain"), lean(model):
        block = next(m for m in model.modules() if isinstance(m, LeanBlock))
        found = []
        for memory in ("keep", "recompute"):
            for each in model.modules():
                if isinstance(each, LeanBlock):
                    each.memory = memory  # type: ignore[assignment]
            out = model(input_ids=ids, use_cache=False).logits
            found.append(_kept(out))
            del out
        per_layer = (found[0] - found[1]) / 2 / ids.numel()
    # fp32 where `kept_bytes` counts 16 bits; attention's own sums come on top (a number a head).
    assert per_layer == pytest.approx(2 * (block.kept_bytes() - block.input_bytes()), rel=0.1)


def _kept(out: torch.Tensor) -> int:
    """Return the bytes of the tensors that the graph of decoder layers holds."""
    seen: dict[int, int] = {}
    todo, nodes = [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        todo += [n for n, _ in node.next_functions]
        state = getattr(node, "state", None)
        tensors = [] if state is None else list(vars(state).values())
        for t in filter(torch.is_tensor, tensors):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(seen.values())


def test_a_budget_without_a_card_is_said(tmp_path: Path) -> None:
    config = RunConfig(model="m", data={"path": "d"}, train={"memory": "8GiB"})
    said: list[str] = []
    with budget.spent(models.make("llama"), config, torch.device("cpu"), said.append) as spend:
        assert spend is None
    assert said == ["train.memory bounds a CUDA card's memory; here it changes nothing"]
    assert not budget.wants_embedding_on_host(models.make("llama"), config, torch.device("cpu"))
