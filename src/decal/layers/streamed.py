"""A linear layer that holds no weight: it is read from its file, or summed with a change, whenever it is needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from decal.layers.coded import CodedLinear


class StreamedLinear(CodedLinear):
    """Like a linear layer of W = source(), (out, in) in any float dtype; with `form`, of W as that format holds it.

    `form` makes an empty layer of a coded format. So a model larger than memory can be run once, one weight at a time.
    """

    source: Callable[[], Tensor]
    form: Callable[[], CodedLinear] | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        source: Callable[[], Tensor],
        form: Callable[[], CodedLinear] | None = None,
        bias: nn.Parameter | None = None,
        name: str = "a weight",
    ) -> None:
        super().__init__(in_features, out_features, dtype=dtype, bias=bias)
        self.source, self.form, self.name = source, form, name
        for name in ("weight", "scales"):  # so that the layer has a device; nothing that a checkpoint holds
            self.register_buffer(name, torch.empty(0, dtype=torch.uint8, device="cpu"), persistent=False)

    def coded(self) -> CodedLinear | None:
        """Return W in the coded format, None for a layer without one."""
        if self.form is None:
            return None
        layer = self.form()
        codes, scales = layer.encode(self.source(), self.name)
        layer.weight, layer.scales = nn.Parameter(codes, requires_grad=False), nn.Parameter(scales, requires_grad=False)
        return layer

    def decode(self, out: Tensor, first: int = 0) -> Tensor:
        layer = self.coded()
        return out.copy_(self.source()[first : first + len(out)]) if layer is None else layer.decode(out, first)
