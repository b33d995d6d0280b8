"""One batch, several adapters: every row equals the same row alone, in forward, backward and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decal.api import get_peft_model
from decal.errors import AdapterError, DecalError, Unsupported
from decal.layers.routing import Routing, Segment, rows_of
from decal.model.generate import generate
from decal.model.wrapper import PeftModel
from decal.spec import LoraConfig
from tests import models, oracle

LINEAR = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain, other ranks and targets": (
        {"r": 4, "target_modules": LINEAR},
        {"r": 2, "lora_alpha": 32, "target_modules": ["v_proj", "up_proj"], "use_rslora": True},
    ),
    "plain and DoRA": ({"target_modules": LINEAR}, {"r": 3, "target_modules": LINEAR, "use_dora": True}),
    "plain and PiSSA": ({"target_modules": LINEAR}, {"target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "embedding and head": ({"target_modules": ["embed_tokens", "v_proj"]}, {"target_modules": ["lm_head"]}),
    "embedding with DoRA": (
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": ["embed_tokens"]},
    ),
    "own heads": (
        {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
        {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
}
NAMES = ["default", "__base__", "b", "default", "b"]


def two_adapters(kind: str, first: dict[str, Any], second: dict[str, Any]) -> PeftModel:
    """Return a model with the random adapters "default" and "b"."""
    model = get_peft_model(models.make(kind), LoraConfig(**first))
    model.add_adapter("b", LoraConfig(**second))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save")) and "start" not in name:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    return model.eval()


def alone(model: PeftModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of one row under one adapter."""
    if name == "__base__":
        with model.disable_adapter():
            return oracle.logits(model, ids)
    model.set_adapter(name)
    return oracle.logits(model, ids)


@pytest.mark.parametrize(("first", "second"), KINDS.values(), ids=KINDS)
def test_each_row_equals_the_row_alone(first: dict[str, Any], second: dict[str, Any]) -> None:
    model = two_adapters("llama", first, second)
    ids = models.tokens(rows=5)
    mixed = oracle.logits(model, ids, adapter_names=NAMES)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[i : i + 1], alone(model, name, ids[i : i + 1]), **oracle.FP64)


def test_an_update_between_two_batches_is_seen() -> None:
    """In inference the stacked factors are kept between calls: they must follow every way of changing them."""
    model = two_adapters("llama", *KINDS["plain and PiSSA"])
    ids = models.tokens(rows=5)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for factor in (1.0, 3.0, 0.5):
                for name in ("default", "b"):
                    layer.adapters[name].B.mul_(factor)
                mixed = oracle.logits(model, ids, adapter_names=NAMES)
                for i, name in enumerate(NAMES):
                    torch.testing.assert_close(mixed[i : i + 1], alone(model, name, ids[i : i + 1]), **oracle.FP64)
    model.delete_adapter("b")
    model.add_adapter("b", LoraConfig(target_modules=LINEAR, init_lora_weights=False))
    with torch.no_grad():
        mixed = oracle.logits(model, ids, adapter_names=NAMES)
        torch.testing.assert_close(mixed[2:3], alone(model, "b", ids[2:3]), **oracle.FP64)


def test_the_same_batch_in_peft() -> None:
    options = {"r": 4, "target_modules": LINEAR}
    ours, theirs = oracle.pair("llama", **options)
    ids, names = models.tokens(), ["__base__", "default", "default"]
    expected = oracle.logits(theirs, ids, adapter_names=names)
    torch.testing.assert_close(oracle.logits(ours, ids, adapter_names=names), expected, **oracle.FP64)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": False},
        {"num_return_sequences": 1},
    ],
)
@pytest.mark.parametrize("case", ["plain, other ranks and targets", "own heads"])
def test_generation_of_a_mixed_batch(options: dict[str, Any], case: str) -> None:
    model = two_adapters("llama", *KINDS[case])
    ids = models.tokens(rows=5, length=6)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, **options}
    mixed = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, **settings)
    copies = options.get("num_return_sequences", 1)
    for i, name in enumerate(NAMES):
        row = {"input_ids": ids[i : i + 1], "attention_mask": torch.ones_like(ids[i : i + 1]), **settings}
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**row)
        else:
            model.set_adapter(name)
            expected = model.generate(**row)
        assert torch.equal(mixed[i * copies : (i + 1) * copies], expected), name


def test_sampled_returns_of_one_prompt_use_its_adapter() -> None:
    """Sampling among the one best token (top_k=1): all four returns of a prompt are its own adapter's best."""
    model = two_adapters("llama", *KINDS["own heads"])
    ids = models.tokens(rows=1, length=6).repeat(2, 1)
    best = {name: int(alone(model, name, ids[:1])[0, -1].argmax()) for name in ("b", "__base__")}
    assert best["b"] != best["__base__"]
    settings = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 1, "top_k": 1, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, adapter_names=["b", "__base__"], **settings)
    assert out[:, -1].tolist() == [best["b"]] * 4 + [best["__base__"]] * 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("second", [KINDS["plain, other ranks and targets"][1], KINDS["plain and DoRA"][1]])
def test_gradients_of_packed_segments_equal_solo_runs(second: dict[str, Any], checkpointing: bool) -> None:
    """Two adapters in one packed row, a third part of the base alone: each adapter's gradient equals its solo run.

    Documents of one row attend to each other here, so the oracle is the same packed row with one adapter's factors
    kept as numbers: the sum rule of gradients. Each adapter's gradient must not depend on how the row is split up.
    """
    model = two_adapters("llama", KINDS["plain, other ranks and targets"][0], second)
    ids = models.tokens(rows=2, length=12)
    segments = (
        Segment(row=0, adapter="default", start=0, stop=5),
        Segment(row=0, adapter="b", start=5, stop=9),
        Segment(row=1, adapter="b"),
    )
    for name in model.peft_config:
        for p in model._trainable(name):
            p.requires_grad_(True)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with model.routed(Routing(2, segments)):
        out = oracle.logits(model, ids)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    (out * weights).sum().backward()  # outside the block: what was in force at forward must hold at recompute
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any(".default." in n for n in got)
    assert any(".b." in n for n in got)

    reference = two_adapters("llama", KINDS["plain, other ranks and targets"][0], second)
    expected = _by_hooks(reference, ids, segments, weights)
    oracle.assert_same({"logits": out.detach(), **got}, expected, **oracle.FP64)


def _by_hooks(
    model: PeftModel, ids: torch.Tensor, segments: tuple[Segment, ...], weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The same, written out: each adapted layer's output is the base's plus mask ∘ (x ΔWᵀ) for each adapter."""
    masks = {name: torch.zeros(*ids.shape, 1, dtype=torch.float64) for name in model.peft_config}
    for s in segments:
        masks[s.adapter][s.row, s.start : s.stop] = 1

    def forward(layer: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> torch.Tensor:
            x = args[0]
            y: torch.Tensor = layer.base_layer(x)
            for name, adapter in layer.adapters.items():
                y = y + masks[name] * adapter.delta(x, layer.base.matmul(x), layer.base)
            return y

        return hook

    model.requires_grad_(False)
    for name in model.peft_config:
        for p in model._trainable(name):
            p.requires_grad_(True)
    for module in model.modules():
        if hasattr(module, "adapters"):
            module.register_forward_hook(forward(module))
    out = oracle.logits(model, ids)
    (out * weights).sum().backward()
    return {"logits": out.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def test_a_segments_weight_scales_the_change() -> None:
    model = two_adapters("llama", *KINDS["plain, other ranks and targets"])
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    x = torch.randn(2, 4, 32, dtype=torch.float64)
    both = (Segment(row=0, adapter="default", weight=0.25), Segment(row=0, adapter="b", weight=-2.0))
    with model.routed(Routing(2, both)):
        got = layer(x)
    W = layer.weight
    change = 0.25 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("b")
    torch.testing.assert_close(got[0], x[0] @ (W + change).T, **oracle.FP64)
    torch.testing.assert_close(got[1], x[1] @ W.T, **oracle.FP64)


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (["default", "nobody", "b"], AdapterError, "no adapter is named 'nobody'"),
        (["default", "defualt", "b"], AdapterError, "nearest is 'default'"),
        (["default", "b"], DecalError, "2 rows|names: 2, rows: 3"),
        ("default", AdapterError, "must be a list of names"),
        ([], AdapterError, r"must be a list of names.*got: \[\]"),
        (["default", None, "b"], AdapterError, "must be a list of names"),
    ],
)
def test_bad_names_raise_and_leave_the_model_usable(names: Any, error: type[Exception], text: str) -> None:
    model = two_adapters("llama", *KINDS["plain, other ranks and targets"])
    ids = models.tokens()
    before = oracle.logits(model, ids)
    with pytest.raises(error, match=text):
        oracle.logits(model, ids, adapter_names=names)
    assert torch.equal(oracle.logits(model, ids), before)


def test_names_are_counted_against_the_rows_of_the_batch() -> None:
    ids = models.tokens(rows=3)
    for args, kwargs in (((ids,), {}), ((), {"input_ids": ids}), ((), {"inputs": ids, "inputs_embeds": None})):
        rows = rows_of(args, kwargs)
        assert Routing.by_row(["default", "__base__", "b"], rows=rows).rows == 3
        with pytest.raises(AdapterError, match=r"one name for each row.*names: 2, rows: 3"):
            Routing.by_row(["default", "b"], rows=rows)
    assert rows_of((), {"labels": ids}) is None


@pytest.mark.parametrize("names", [["default"], ["default"] * 3, "de"])
def test_generation_from_prompts_counts_its_names_first(names: Any) -> None:
    model = two_adapters("llama", *KINDS["plain, other ranks and targets"])
    with pytest.raises(AdapterError, match="adapter_names must"):
        generate(model, None, ["one", "two"], adapter_names=names)


def test_what_cannot_be_routed_is_refused_by_name() -> None:
    rows = two_adapters("llama", {"target_modules": LINEAR, "trainable_token_indices": [4]}, KINDS["own heads"][1])
    ids = models.tokens()
    with pytest.raises(Unsupported, match="trainable_token_indices"):
        oracle.logits(rows, ids, adapter_names=["default", "b", "b"])
    whole = two_adapters("llama", *KINDS["own heads"])
    part = Routing(3, (Segment(row=0, adapter="b", start=2, stop=5),))
    with whole.routed(part), pytest.raises(Unsupported, match="modules_to_save"):
        oracle.logits(whole, ids)
    positions = two_adapters("gpt2", {"target_modules": ["wpe", "c_attn"]}, {"target_modules": ["c_attn"]})
    with pytest.raises(DecalError, match="does not cover"):
        oracle.logits(positions, ids, adapter_names=["default", "b", "b"])


def test_segments_fit_one_length_only() -> None:
    """A head that sees only the last tokens cannot know which they were: it must not guess."""
    model = two_adapters("llama", *KINDS["embedding and head"])
    split = Routing(3, (Segment(row=0, adapter="b", start=0, stop=2), Segment(row=0, adapter="default", start=2)))
    with model.routed(split), pytest.raises(DecalError, match="segment"):
        oracle.logits(model, models.tokens(), logits_to_keep=4)
    model.merge_adapter()
    with pytest.raises(DecalError, match="merged"), model.routed(split):
        pass
