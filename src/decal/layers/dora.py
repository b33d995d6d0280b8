"""DoRA: a low-rank change of direction and a learnt length per output feature (Liu et al. 2024, eq. 5).

W' = m · (W + s·B·A) / ||W + s·B·A||, row by row of (out, in). With g = m / ||W + s·B·A||, the change of the weight is
(g - 1)·W + g·s·B·A. The norm is a constant of the step: it gets no gradient (section 4.3 of the paper).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from decal.layers.lora import LinearLoRA, LoRA
from decal.layers.seams import Base
from decal.ops import lora
from decal.spec import LoraConfig


class Magnitude(nn.Module):
    """The learnt length of each row: a module with `weight` (out,), because PEFT's files name it so."""

    def __init__(self, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, dtype=dtype, device="meta"))


class Lengths(LoRA):
    """What DoRA adds to a kind of low-rank factors: a magnitude m (out,) and the gain g that it sets."""

    reads_output = True

    def __init__(self, base: Base, config: LoraConfig, *, rank: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__(base, config, rank=rank, alpha=alpha, dtype=dtype)
        self.magnitude = Magnitude(base.out_features, dtype)

    def slots(self) -> dict[str, nn.Module | nn.Parameter]:
        return {**super().slots(), "lora_magnitude_vector": self.magnitude}

    def init(self, base: Base, config: LoraConfig, generator: Generator | None) -> None:
        super().init(base, config, generator)
        self.magnitude.weight = nn.Parameter(self._norm(base))

    def _norm(self, base: Base) -> Tensor:
        """||W + s·B·A|| per row (out,), without gradient. In fp32 at least: it sets the gain of the whole row."""
        dtype = torch.float64 if self.A.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            return lora.row_norm(base.dense_plus(self.A, self.B, self.scale, dtype)).to(self.A.dtype)

    def gain(self, base: Base) -> Tensor:
        """g = m / ||W + s·B·A||, (out,)."""
        return self.magnitude.weight / self._norm(base)

    def factors(self) -> None:
        return None  # the change reads the base's output too

    def delta(self, x: Tensor, y: Tensor | None, base: Base) -> Tensor:
        assert y is not None
        if self.draws_dropout:  # as PEFT: in training the base's term, too, is of the dropped input
            x = self.dropout(x)
            y = base.matmul(x)
        gain = self.gain(base)
        low_rank = lora.delta(x.to(self.A.dtype), self.A, self.B, self.scale)
        return (gain - 1) * y.to(self.A.dtype) + gain * low_rank

    def delta_weight(self, base: Base) -> Tensor:
        gain = self.gain(base)[:, None]
        low_rank = super().delta_weight(base)
        return (gain - 1) * base.dense(low_rank.dtype) + gain * low_rank

    def saved(self) -> dict[str, Tensor]:
        return {**super().saved(), "lora_magnitude_vector": self.magnitude.weight}


class DoRA(Lengths, LinearLoRA):
    """DoRA on a linear layer."""
