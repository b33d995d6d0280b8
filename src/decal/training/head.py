"""Whether a model's loss is plain cross entropy over a plain linear head, found by trying it on the loaded model.

Some models cap their logits (Gemma-2), scale them (Granite, Cohere) or add terms to their loss; an adapted head is no
plain weight. In a small or untrained model a cap changes nothing yet, so the test is made with the hidden states
enlarged until the largest logit is LOUD.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from decal.errors import ConfigError
from decal.layers.coded import CodedBase, CodedLinear
from decal.layers.dense import WideLinear
from decal.layers.int8_linear import Int8Linear
from decal.layers.nf4_linear import NF4Linear
from decal.model.evaluating import evaluating
from decal.ops import workspace
from decal.ops.loss import chunked_cross_entropy
from decal.ops.slabs import Slabs

PLAIN = (nn.Linear, WideLinear, NF4Linear, Int8Linear)  # exactly: a subclass may compute something else
Head = nn.Linear | CodedLinear
LOUD = 100.0  # Gemma-2 caps logits at 30, so a hundredfold test cannot miss it
TOKENS = 16
SAME = 1e-5  # two sums over the very same logits: their order alone
# Loud: the same product in the same dtype, summed in another order; in 16-bit that may round logits of size LOUD the
# other way (2^-9·100 = 0.2 each, on a loss near 100).
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}
TOLERANCE_16 = 1e-2


def parts(model: nn.Module) -> tuple[nn.Module, Head]:
    """Return the transformer body and the head of a causal language model, adapted or not."""
    inner = _inner(model)
    return inner.base_model, inner.get_output_embeddings()


def weight_of(linear: Head) -> Tensor | Slabs:
    """Return a head's weight as the loss takes it."""
    return linear.slabs() if isinstance(linear, CodedLinear) else linear.weight


def dense(linear: Head) -> Tensor:
    """Return a head's whole weight (V, D) in fp32."""
    return CodedBase(linear).dense(torch.float32) if isinstance(linear, CodedLinear) else linear.weight.float()


def refuse_coded(model: nn.Module, reason: str) -> None:
    """Raise ConfigError for an output head in codes where `reason` keeps the loss from going through it in slabs."""
    get: Any = getattr(_inner(model), "get_output_embeddings", None)
    head = None if get is None else get()
    if isinstance(head, CodedLinear) and head.in_slabs:
        raise ConfigError(
            "quantize.head needs the loss that goes through the head in slabs, which is not this model's",
            got=reason,
            fix="Leave quantize.head out: the head stays as it is stored.",
        )


def _inner(model: nn.Module) -> Any:
    """Return the transformers model, adapted or not."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


# Settings of models that do something to their logits or their loss, with the values under which they do nothing.
TOUCHED: dict[str, tuple[object, ...]] = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "lm_head_multiplier": (None, 1.0),
    "output_router_logits": (None, False),
}


def why_not_by_form(model: nn.Module) -> str | None:
    """Return why the chunked loss is not the model's, as far as its modules and settings tell; None if they do not.

    For a plan, which has no values to try it on. `why_not_chunked` tries it.
    """
    inner = _inner(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model") or inner.base_model is inner:
        return "the model is not a body with a head on it"
    _, linear = parts(model)
    if type(linear) not in PLAIN:
        return f"its head is a {type(linear).__name__}, not a plain linear layer"
    config = inner.config.get_text_config()
    touched = [name for name, plain in TOUCHED.items() if getattr(config, name, None) not in plain]
    return f"its settings have {touched[0]}" if touched else None


def why_not_chunked(model: nn.Module) -> str | None:
    """Return None if the chunked loss over the head's weight is the model's loss, else the reason why it is not."""
    inner = _inner(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model") or inner.base_model is inner:
        return "the model is not a body with a head on it"
    body, linear = parts(model)
    if type(linear) not in PLAIN:
        return f"its head is no plain linear layer but of the class {type(linear).__name__}"
    try:
        with evaluating(model):
            return _compare(model, body, linear)
    finally:
        workspace.release()  # a 16-bit head widened for its own product left a buffer of its size


def _compare(model: nn.Module, body: nn.Module, linear: Head) -> str | None:
    ids = (torch.arange(TOKENS, device=linear.weight.device) * 7919 % linear.out_features)[None]
    plain = body(input_ids=ids, use_cache=False)
    if not hasattr(plain, "last_hidden_state"):
        return f"its body returns a {type(plain).__name__} without last_hidden_state"
    with _louder(body, 1.0) as seen:
        own = model(input_ids=ids, labels=ids, use_cache=False)
    hidden: Tensor = plain.last_hidden_state
    if len(seen) != 1 or not torch.allclose(seen[0], hidden, rtol=1e-3, atol=1e-3):
        return "it feeds its body more than token ids"
    of_logits = cross_entropy(own.logits[0, :-1].float(), ids[0, 1:])
    if not torch.allclose(own.loss.float(), of_logits, rtol=SAME, atol=SAME):
        return f"its loss is not the cross entropy of its logits ({own.loss.item():.5f}, not {of_logits.item():.5f})"
    with _louder(body, LOUD / max(float(linear(hidden).abs().amax()), 1e-6)) as seen:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    of_logits = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    total, count = chunked_cross_entropy(seen[0][0, :-1], weight_of(linear), ids[0, 1:], bias=linear.bias)
    tolerance = TOLERANCE.get(hidden.dtype, TOLERANCE_16)
    if torch.allclose(of_logits, (total / count).float(), rtol=tolerance, atol=tolerance):
        return None
    return (
        f"its logits are not its head's output (loss {of_logits.item():.4f}, not {total.item() / count:.4f}, when loud)"
    )


@contextmanager
def _louder(body: nn.Module, factor: float) -> Iterator[list[Tensor]]:
    """Multiply what the body hands to the head in the block; yields the list of what it handed on."""
    seen: list[Tensor] = []

    def enlarge(module: nn.Module, inputs: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        seen.append(output.last_hidden_state)
        return output

    hook = body.register_forward_hook(enlarge)
    try:
        yield seen
    finally:
        hook.remove()
