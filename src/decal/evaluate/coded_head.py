"""What storing an output head in codes does to the logits, measured on a few tokens beside the head as it was.

The head's own rows are read from the checkpoint again, a slab at a time, and forgotten.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decal import locate
from decal.evaluate.closeness import mean_kl
from decal.files.checkpoint import Checkpoint
from decal.layers.coded import CodedLinear
from decal.layers.nf4_linear import NF4Linear
from decal.model.evaluating import evaluating
from decal.model.targets import output_head
from decal.ops import workspace

TOKENS = 64  # two sets of logits over 128,256 words take 63 MiB


@dataclass(frozen=True, kw_only=True)
class Change:
    """How far logits over the coded head lie from those over the head as it was, on `tokens` tokens."""

    tokens: int
    mean: float  # of the differences' magnitudes
    largest: float
    kl: float  # mean over tokens, nats: the head as it was against the coded one
    same_top1: float


@dataclass(frozen=True, kw_only=True)
class HeadInCodes:
    """An output head in codes; `change` is None where the checkpoint does not hold it wide, under its name."""

    stored_in: str
    change: Change | None

    def facts(self) -> dict[str, Any]:
        """Return it as the manifest holds it."""
        return {**asdict(self), "says": str(self)}

    def __str__(self) -> str:
        """Return one line for the user."""
        begins, found = f"the output head is stored in {self.stored_in}, which changes the logits", self.change
        if found is None:
            return f"{begins}; by how much is not measured: the checkpoint holds no such weight in 16 or 32 bits"
        return (
            f"{begins}: over {found.tokens} tokens of the data by {found.mean:.3g} on average, {found.largest:.3g} at "
            f"most, KL {found.kl:.3g} nats, the same likeliest token for {found.same_top1:.1%}"
        )


def change(model: nn.Module, name: str, revision: str | None, ids: list[int]) -> HeadInCodes | None:
    """Return what the codes of the model's output head change on the first tokens of `ids`; None for a head as it was.

    `name` and `revision` are the model's own, where its weights are. Both products are in fp32; adapters are as they
    are, dropout is off.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    plain: Any = model if unwrap is None else unwrap()
    head = output_head(plain)
    if not isinstance(head, CodedLinear):
        return None
    stored_in = head.kind if isinstance(head, NF4Linear) else "int8"
    checkpoint = Checkpoint(locate.folder(name, kind="model", revision=revision))
    key = next(f"{path}.weight" for path, module in plain.named_modules() if module is head)
    if key not in checkpoint.file_of or checkpoint.shape(key) != (head.out_features, head.in_features):
        return HeadInCodes(stored_in=stored_in, change=None)
    with evaluating(model):
        tokens = torch.tensor([ids[:TOKENS]], device=head.weight.device)
        hidden = plain.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0].float()
        before, after = _logits(hidden, head, checkpoint, key)
    workspace.release()
    off = (after - before).abs()
    return HeadInCodes(
        stored_in=stored_in,
        change=Change(
            tokens=len(hidden),
            mean=float(off.mean()),
            largest=float(off.amax()),
            kl=mean_kl(before, after),
            same_top1=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        ),
    )


def _logits(hidden: Tensor, head: CodedLinear, checkpoint: Checkpoint, key: str) -> tuple[Tensor, Tensor]:
    """Return the logits (tokens, V) over the head in the file and over its codes, on the CPU."""
    bias = torch.zeros(head.out_features) if head.bias is None else head.bias.float().cpu()
    before, after = torch.empty(2, len(hidden), head.out_features)
    for rows, W in head.slabs().parts(hidden):
        wide = checkpoint.rows(key, rows.start, rows.stop).to(hidden)
        before[:, rows], after[:, rows] = hidden @ wide.T, hidden @ W.T
    return before + bias, after + bias
