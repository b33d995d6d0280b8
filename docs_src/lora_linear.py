"""LoRA in fifteen lines. The frozen weight gets no gradient; only the two thin factors do."""

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """x (W0 + s A B), in the layout in which inputs stand on the left: W0 is (d_in, d_out)."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.W0 = nn.Parameter(torch.randn(d_in, d_out), requires_grad=False)
        self.A = nn.Parameter(torch.randn(d_in, rank) * 0.02)
        self.B = nn.Parameter(torch.zeros(rank, d_out))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W0 + (x @ self.A @ self.B) * self.scale


layer = LoRALinear(512, 512, rank=8, alpha=16)
layer(torch.randn(4, 512)).sum().backward()
print(layer.A.grad.shape if layer.A.grad is not None else None)  # (512, 8)
print(layer.W0.grad)  # None: no gradient is stored for the frozen weight
