"""Several adapters in one batch: every token gets the change of its own adapters, in two products for all of them.

The factors of all adapters are stacked; a mask of scales (tokens, sum of ranks) keeps each token to its own columns:
delta = ((x A_catᵀ) ∘ mask) B_catᵀ. Mixed ranks, several adapters on one token and weights cost nothing extra.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def delta(x_NI: Tensor, A_RI: Tensor, B_OR: Tensor, mask_NR: Tensor) -> Tensor:
    """Return the change (N, out) of tokens (N, in) for stacked factors and each token's scale per stacked row."""
    return F.linear(F.linear(x_NI, A_RI) * mask_NR, B_OR)
