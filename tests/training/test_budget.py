"""How a budget of memory is read and spent; what is said where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from decal import LoraConfig, get_peft_model
from decal.errors import ConfigError, RunError
from decal.layers.block import LeanBlock
from decal.model.lean import general_note, lean
from decal.ops import fuse
from decal.spec import RunConfig
from decal.training import budget
from decal.training.budget import GIB, SETTLED, WARM, Budget, Plan, fill, parse
from decal.training.precision import Precision
from tests import models

CPU = torch.device("cpu")


def test_sizes() -> None:
    assert parse("8GiB") == 8 * 2**30
    assert parse(" 7.5 GB ") == 7_500_000_000
    assert parse("512mib") == 2**29
    assert parse("free") is None


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


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "phi3"])
def test_what_a_layer_keeps_is_what_it_says(kind: str) -> None:
    model = get_peft_model(models.make(kind, torch.float32), LoraConfig(r=4, target_modules="all-linear")).train()
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
    # Attention's own sums come on top (a number a head).
    assert per_layer == pytest.approx(block.kept_bytes(4) - block.input_bytes(4), rel=0.1)
    assert block.kept_bytes(2) == block.kept_bytes(4) / 2


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
        tensors: list[torch.Tensor] = []
        for value in () if state is None else vars(state).values():
            tensors += value if isinstance(value, tuple) else [value]
        for t in filter(torch.is_tensor, tensors):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(seen.values())


def test_a_budget_without_a_card_is_said(tmp_path: Path) -> None:
    config = RunConfig(model="m", data={"path": "d"}, train={"memory": "8GiB"})
    said: list[str] = []
    numbers = Precision(name="fp32", device=CPU)
    with budget.spent(models.make("llama"), config, numbers, tokens=1, say=said.append) as spend:
        assert spend is None
    assert said == ["train.memory bounds a CUDA card's memory; here it changes nothing"]
    assert not budget.wants_embedding_on_host(models.make("llama"), config, CPU)


class Card:
    """A pretended card of 80 GiB whose use follows the layers' modes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fixed: float) -> None:
        self.fixed, self.layers, self.fraction = fixed, list[LeanBlock](), 1.0
        self.wasted, self.others = 0.0, 0.6  # others: the context, and other processes
        for name, answer in {
            "mem_get_info": lambda device: (80 * GIB - int(self.others * GIB + self.used() + self.wasted), 80 * GIB),
            "memory_reserved": lambda device: int(self.used() + self.wasted),
            "max_memory_reserved": lambda device: int(self.used()),
            "max_memory_allocated": lambda device: int(self.used()),
            "reset_peak_memory_stats": lambda device: None,
            "empty_cache": lambda: None,
            "set_per_process_memory_fraction": self.bound,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def bound(self, fraction: float, device: int | None) -> None:
        assert device is None  # torch takes no "cuda" without its number here
        self.fraction = fraction

    def used(self) -> float:
        kept = {"keep": 1.0, "recompute": 0.1, "offload": 0.0}
        return (self.fixed + sum(kept[layer.memory] for layer in self.layers)) * GIB


@pytest.fixture
def swapped() -> Iterator[nn.Module]:
    model = get_peft_model(models.make("llama", torch.float32), LoraConfig(r=4, target_modules="all-linear")).train()
    with fuse.forced("plain"), lean(model):
        yield model


def spend(model: nn.Module, card: Card, limit: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Budget, list[str]]:
    said: list[str] = []
    numbers = Precision(name="bf16", device=torch.device("cuda"))
    spent = Budget(model, int(limit * GIB), tokens=1, numbers=numbers, say=said.append)
    monkeypatch.setattr(spent, "_kept", lambda: GIB)
    monkeypatch.setattr(spent, "_input", lambda: GIB // 10)
    card.layers = spent.layers
    return spent, said


@pytest.mark.parametrize(
    ("limit", "modes"),
    [(9.0, ["keep", "keep"]), (7.7, ["recompute", "keep"]), (6.7, ["offload", "recompute"]), (6.5, ["offload"] * 2)],
)
def test_the_plan_is_made_after_two_steps(
    limit: float, modes: list[str], swapped: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(monkeypatch, fixed=5.8)
    spent, said = spend(swapped, card, limit, monkeypatch)
    assert card.fraction == pytest.approx((limit - 0.6) / 80)
    forgotten: list[int] = []
    for step in range(WARM + SETTLED):
        spent.stepped(lambda: forgotten.append(spent.steps))
        assert [layer.memory for layer in spent.layers] == (["offload"] * 2 if step < WARM - 1 else modes)
    assert forgotten == [WARM]
    assert len(said) == 1
    assert f"for a budget of {limit:.2f} GiB" in said[0]


def test_a_plan_that_took_more_is_corrected(swapped: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, fixed=5.8)
    spent, said = spend(swapped, card, 9.0, monkeypatch)
    for _ in range(WARM):
        spent.stepped(lambda: None)
    card.wasted = 0.8 * GIB
    for _ in range(SETTLED):
        spent.stepped(lambda: None)
    assert [layer.memory for layer in spent.layers] == ["recompute", "keep"]
    assert len(said) == 2


def test_a_step_out_of_memory_runs_again_with_less_and_says_when_nothing_is_left(
    swapped: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(monkeypatch, fixed=5.8)
    spent, said = spend(swapped, card, 9.0, monkeypatch)
    for _ in range(WARM):
        spent.stepped(lambda: None)
    tried: list[int] = []

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        tried.append(spent.plan.keep)
        if len(tried) < 3 or len(tried) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(())

    backward = spent.guarded(run, lambda: None)
    numbers = Precision(name="fp32", device=torch.device("cpu"))
    arguments: Any = (swapped, [], None, numbers.scaler())
    assert backward(*arguments, precision=numbers) == 0
    assert tried == [2, 1, 0]
    assert "a step ran out of memory and is run again with less kept" in said
    with pytest.raises(RunError, match="the budget cannot be met"):
        backward(*arguments, precision=numbers)


def out_of_memory_while(condition: Callable[[], bool]) -> Callable[..., torch.Tensor]:
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        if condition():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(())

    return run


def test_free_is_what_the_card_has_free(swapped: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, fixed=5.8)
    assert budget.limit_of("free", torch.device("cuda")) == pytest.approx(80 * GIB, abs=2)
    card.others = 60.0  # another process
    assert budget.limit_of("free", torch.device("cuda")) == pytest.approx(20.6 * GIB, abs=2)
    assert budget.limit_of("8GiB", torch.device("cuda")) == 8 * GIB


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only"}])
def test_layers_that_do_not_run_as_one_function_have_no_budget(settings: dict[str, Any]) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", **settings)
    model = get_peft_model(models.make("llama-biased", torch.bfloat16), lora).train()
    config = RunConfig(model="m", data={"path": "d"}, train={"memory": "8GiB"})
    numbers, said = Precision(name="bf16", device=torch.device("cuda")), list[str]()
    with fuse.forced("plain"), lean(model), budget.spent(model, config, numbers, tokens=1, say=said.append) as spend:
        assert spend is None
        note = general_note(model, torch.bfloat16)
    assert said[0].startswith("train.memory changes nothing")
    assert note is not None
    assert note.endswith(
        "it needs at most one adapter, of plain LoRA, on frozen weights and biases that decal can decode"
    )


def test_what_ran_out_of_memory_is_not_kept_again(swapped: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, fixed=5.8)
    spent, _ = spend(swapped, card, 9.0, monkeypatch)
    for _ in range(WARM):
        spent.stepped(lambda: None)
    numbers = Precision(name="fp32", device=CPU)
    run = spent.guarded(out_of_memory_while(lambda: spent.plan.keep > 1), lambda: None)
    arguments: Any = (swapped, [], None, numbers.scaler())
    run(*arguments, precision=numbers)
    for _ in range(SETTLED):
        spent.stepped(lambda: None)
    assert spent.plan.keep == 1


def test_a_budget_beyond_what_the_card_has_free_is_what_it_has(
    swapped: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(monkeypatch, fixed=5.8)
    card.others = 60.0  # another process
    spent, said = spend(swapped, card, 200.0, monkeypatch)
    assert spent.limit == pytest.approx(20.6 * GIB, abs=2)  # and the context, as it is taken to be
    assert said == ["20.60 GiB of the card's memory are free, less than train.memory: they are the budget"]


def test_a_context_is_measured(swapped: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, fixed=5.8)
    card.others = 1.1
    spent, _ = spend(swapped, card, 9.0, monkeypatch)
    assert spent.context() == pytest.approx(1.1 * GIB, abs=2)
    assert card.fraction == pytest.approx((9.0 - 1.1) / 80)


def test_halved_micro_batches_are_planned_anew(swapped: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, fixed=5.8)
    spent, said = spend(swapped, card, 6.5, monkeypatch)
    for _ in range(WARM + SETTLED):
        spent.stepped(lambda: None)
    spent.tokens = 101
    spent.halved()
    card.fixed = 2.9  # half as many tokens at a time
    for _ in range(WARM):
        spent.stepped(lambda: None)
    assert spent.tokens == 51
    assert [layer.memory for layer in spent.layers] == ["keep", "keep"]
    assert len(said) == 2
