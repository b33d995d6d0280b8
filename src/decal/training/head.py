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

from decal.layers.dense import WideLinear
from decal.ops.loss import chunked_cross_entropy

PLAIN = (nn.Linear, WideLinear)  # exactly these: a subclass or a wrapper may compute something else
LOUD = 100.0  # Gemma-2 caps logits at 30, so a hundredfold test cannot miss it
TOKENS = 16
# Both sides do the same product in the same dtype; what differs is the order of summation, and in 16-bit one rounding
# of logits of size LOUD (2^-9·100 = 0.2 on a loss near 100).
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
TOLERANCE_16 = 1e-2


def parts(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Return the transformer body and the head of a causal language model, adapted or not."""
    inner = _inner(model)
    return inner.base_model, inner.get_output_embeddings()


def _inner(model: nn.Module) -> Any:
    """Return the transformers model, adapted or not."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def why_not_chunked(model: nn.Module) -> str | None:
    """Return None if the chunked loss over the head's weight is the model's loss, else the reason why it is not."""
    inner = _inner(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model") or inner.base_model is inner:
        return "the model is not a body with a head on it"
    body, linear = parts(model)
    if type(linear) not in PLAIN:
        return f"its head is a {type(linear).__name__}, not a plain linear layer"
    was = model.training
    model.eval()
    try:
        return _compare(model, body, linear)
    finally:
        model.train(was)


@torch.no_grad()
def _compare(model: nn.Module, body: nn.Module, linear: nn.Linear) -> str | None:
    device = linear.weight.device
    ids = (torch.arange(TOKENS, device=device) * 7919 % linear.weight.shape[0])[None]
    plain = body(input_ids=ids, use_cache=False)
    if not hasattr(plain, "last_hidden_state"):
        return f"its body returns a {type(plain).__name__} without last_hidden_state"
    with _louder(body, linear) as seen:
        own: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    if len(seen) != 1 or not torch.allclose(seen[0][0], plain.last_hidden_state, rtol=1e-3, atol=1e-3):
        return "the model feeds its body more than token ids"
    labels = nn.functional.pad(ids[0, 1:], (0, 1), value=-100)
    total, count = chunked_cross_entropy(seen[0][1][0], linear.weight, labels, bias=linear.bias)
    tolerance = TOLERANCE.get(seen[0][1].dtype, TOLERANCE_16)
    if torch.allclose(own.double(), (total / count).double(), rtol=tolerance, atol=tolerance):
        return None
    values = f"{own.item():.4f} against {total.item() / count:.4f} on a test row"
    return f"it is not plain cross entropy over its head ({values})"


@contextmanager
def _louder(body: nn.Module, linear: nn.Linear) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Enlarge what the body hands to the head in the block; yields the list of (as it was, as handed on)."""
    seen: list[tuple[Tensor, Tensor]] = []

    def enlarge(module: nn.Module, inputs: object, output: Any) -> Any:
        hidden = output.last_hidden_state
        largest = float(linear(hidden).abs().amax())
        output.last_hidden_state = hidden * (LOUD / max(largest, 1e-6))
        seen.append((hidden, output.last_hidden_state))
        return output

    hook = body.register_forward_hook(enlarge)
    try:
        yield seen
    finally:
        hook.remove()
