"""What is minimised: a function of the model and one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from decal.data.batch import IGNORE, Batch
from decal.model import direct
from decal.ops.loss import chunked_cross_entropy
from decal.training import head

Note = Callable[[str], None]


class Loss(Protocol):
    """A loss as the step sees it: sums and counts, so that accumulated micro-batches weigh what they should.

    `count` is the number of things (tokens, or pairs) that the batch's loss is a sum over. It is known without the
    model, because the step divides by the count of the whole accumulated batch before the first backward pass.
    """

    def count(self, batch: Batch) -> int: ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Return the summed loss of a batch (on any device) and the count it is a sum over."""
        ...


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Next-token cross entropy on the labelled tokens; `chunked` keeps the logits from ever existing whole."""

    chunked: bool

    def count(self, batch: Batch) -> int:
        return batch.loss_tokens

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        body, linear = head.parts(model) if self.chunked else (model, None)
        device = next(model.parameters() if linear is None else linear.parameters()).device
        if linear is None:
            count = batch.loss_tokens
            return model(**_inputs(batch, device), labels=batch.labels.to(device)).loss * count, count
        hidden = hidden_states(body, batch, device)
        return chunked_cross_entropy(
            hidden.flatten(0, 1), head.weight_of(linear), shifted(batch.labels), bias=linear.bias, ignore=IGNORE
        )


def hidden_states(body: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the last hidden states (B, T, D), by the quicker way where there is one (model/direct.py)."""
    if not direct.runs_directly(body, longest(batch)):
        out: Tensor = body(**_inputs(batch, device)).last_hidden_state
        return out
    inputs, places = direct.embedded(body, batch.input_ids).to(device), batch.position_ids
    if places is None or batch.segments is None:
        return direct.run(body, inputs, None, None)
    return direct.run(body, inputs, places.to(device), batch.segments.to(device))


def longest(batch: Batch) -> int:
    """Return the tokens of the longest sample; where rows are no packed ones, of a row."""
    return batch.input_ids.shape[1] if batch.segments is None else batch.segments.longest


def _inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """No attention mask: with it transformers would not tell packed samples apart by their position_ids."""
    inputs = {"input_ids": batch.input_ids.to(device), "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids.to(device)
    return inputs


def shifted(labels: Tensor) -> Tensor:
    """Return (B·T,) labels, each beside the position that predicts it; the last of a row predicts nothing."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()


def sft(model: nn.Module, note: Note) -> SFT:
    """Return the SFT loss for `model`: chunked where that gives the model's own loss, else the model's own."""
    reason = head.why_not_chunked(model)
    if reason is not None:
        head.refuse_coded(model, reason)
        note(f"the loss is the model's own, over full logits, because {reason}: it needs more memory")
    return SFT(chunked=reason is None)


LOSSES: Mapping[str, Callable[[nn.Module, Note], Loss]] = {"sft": sft}
