"""Whether a budget can be met at all: the least that a run needs, and what would fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from decal.errors import ConfigError
from decal.planning import budgeted, memory
from decal.planning.memory import CONTEXT, Known
from decal.planning.shapes import ACTIVATIONS, EDGES
from tests.planning import tiny


@pytest.mark.parametrize(("family", "table"), [("llama", 0.5), ("qwen2", 0.0)])
def test_the_least_is_without_inputs_and_table(tmp_path: Path, family: str, table: float) -> None:
    asked = tiny.wanted(tiny.save_config(tmp_path, family), device="cuda", numbers="bf16")
    found, needed = budgeted.least(asked, Known())
    assert found.wanted.train.gradient_checkpointing
    parts = found.phase("training").parts
    left = sum(parts.values()) - parts[ACTIVATIONS] - int(table * parts[EDGES])
    assert needed == int(memory.on_card(left))
    assert CONTEXT < needed < found.needed


def test_a_budget_below_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    folder = tiny.save_config(tmp_path, "llama")
    asked = tiny.wanted(folder, device="cuda", numbers="bf16", length=4096, micro_batch=16)
    _, needed = budgeted.least(asked, Known())
    budgeted.refuse_too_small(asked, needed)  # it is the least
    with pytest.raises(ConfigError) as raised:
        budgeted.refuse_too_small(asked, int(0.8 * needed))
    text = str(raised.value)
    assert "the budget cannot be met" in text
    assert "a step needs about" in text
    assert "What would fit, the cheapest first: train.micro_batch=" in text
    assert "; or data.max_length=" in text
