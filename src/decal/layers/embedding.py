"""LoRA on an embedding: the table seen as a frozen weight (out = D, in = V) whose input is one-hot.

PEFT's layout: `lora_embedding_A` (r, V) starts at zero, `lora_embedding_B` (D, r) is N(0, 1); no dropout. The same
change acts on a tied output head, where the table is the weight (V, D): there A_head = Bᵀ and B_head = Aᵀ.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from decal.layers.adapted import Adapted
from decal.layers.dense import DenseBase
from decal.layers.dora import Lengths
from decal.layers.lora import LoRA, drawn_on
from decal.layers.routing import Switch
from decal.layers.seams import Base
from decal.spec import LoraConfig


class EmbeddingBase(DenseBase):
    """A view of an nn.Embedding (V, D) as a weight (D, V)."""

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.layer.weight
        return weight.T

    @property
    def bias(self) -> None:
        return None

    @property
    def padding_idx(self) -> int | None:
        """The token whose row learns nothing."""
        index: int | None = self.layer.padding_idx
        return index


class EmbeddingLoRA(LoRA):
    """The change s·(B·A)ᵀ of a table (V, D)."""

    def __init__(self, base: Base, config: LoraConfig, *, rank: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__(base, config, rank=rank, alpha=alpha, dtype=dtype)
        A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device="meta"))
        B = nn.Parameter(torch.empty(base.out_features, rank, dtype=dtype, device="meta"))
        self._homes: dict[str, tuple[MutableMapping[str, nn.Parameter] | nn.ParameterDict, str]] = {}
        self.set_factors(A, B)

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Hold real tensors as the factors, until they are housed in the layer."""
        factors = {"lora_embedding_A": nn.Parameter(A), "lora_embedding_B": nn.Parameter(B)}
        for kind in factors:
            self._homes[kind] = (factors, kind)

    def housed(self, kind: str, container: nn.ParameterDict, name: str) -> None:
        self._homes[kind] = (container, name)

    def _held(self, kind: str) -> nn.Parameter:
        container, name = self._homes[kind]
        return container[name]

    @property
    def A(self) -> Tensor:
        return self._held("lora_embedding_A")

    @property
    def B(self) -> Tensor:
        return self._held("lora_embedding_B")

    def slots(self) -> dict[str, nn.Module | nn.Parameter]:
        return {kind: self._held(kind) for kind in self._homes}

    def init(self, base: Base, config: LoraConfig, generator: Generator | None) -> None:
        """A zero and B normal (the choice of LoRA's authors for embeddings); `False` makes both normal."""
        where = drawn_on(base, generator)
        A = torch.zeros(self.A.shape, dtype=self.A.dtype, device=where)
        B = torch.empty(self.B.shape, dtype=self.B.dtype, device=where).normal_(generator=generator)
        if config.init_lora_weights is False:
            A.normal_(generator=generator)
        self.set_factors(A.to(base.device), B.to(base.device))

    def rows(self, ids: Tensor, e: Tensor, base: EmbeddingBase) -> Tensor:
        """Return what is added to the embedded tokens: ids (...), e (..., D) -> (..., D)."""
        return F.linear(F.embedding(ids, self.A.T, base.padding_idx), self.B) * self.scale

    def saved(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.A, "lora_embedding_B": self.B}


class EmbeddingDoRA(Lengths, EmbeddingLoRA):
    """LoRA's factors and a learnt length per embedding dimension, (D,), as PEFT has it."""

    def rows(self, ids: Tensor, e: Tensor, base: EmbeddingBase) -> Tensor:
        gain = self.gain(base)
        return (gain - 1) * e.to(self.A.dtype) + gain * super().rows(ids, e, base)


class TiedLoRA(LoRA):
    """The embedding's change seen from the tied output head: the same parameters, transposed.

    Its own is the dropout of the head's input (PEFT has none on the embedding's side, and it on the head's).
    """

    owns_weight = False

    def __init__(self, owner: EmbeddingLoRA, dropout: float) -> None:
        self.owner = owner
        self.rank, self.alpha, self.scale = owner.rank, owner.alpha, owner.scale
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    @property
    def A(self) -> Tensor:
        return self.owner.B.T

    @property
    def B(self) -> Tensor:
        return self.owner.A.T

    def slots(self) -> dict[str, nn.Module | nn.Parameter]:
        return {"lora_dropout": self.dropout}

    def parameters(self) -> list[Tensor]:
        return self.owner.parameters()

    def saved(self) -> dict[str, Tensor]:
        return {}


class AdaptedEmbedding(Adapted):
    """A frozen nn.Embedding with any number of adapters."""

    def __init__(self, layer: nn.Module, switch: Switch) -> None:
        super().__init__(layer, EmbeddingBase(layer), switch)

    @property
    def num_embeddings(self) -> int:
        return self.base.in_features

    @property
    def embedding_dim(self) -> int:
        return self.base.out_features

    @property
    def padding_idx(self) -> int | None:
        index: int | None = self.base_layer.padding_idx  # type: ignore[assignment]  # torch types it as a submodule
        return index

    def forward(self, ids: Tensor) -> Tensor:
        """(..., T) -> (..., T, D)."""
        e: Tensor = self.base_layer(ids)
        routing = None if self.switch.disabled or self.switch.merged else self.switch.routing
        used = self.switch.on(self.adapters) if routing is None else routing.adapters
        names = [name for name in used if name in self.adapters]
        factor = getattr(self.base_layer, "embed_scale", None)  # Gemma multiplies its embeddings
        bare = e if factor is None else e / factor.to(e.dtype)
        change: Tensor | None = None
        for name in names:
            adapter = self.adapters[name]
            assert isinstance(adapter, EmbeddingLoRA)
            assert isinstance(self.base, EmbeddingBase)
            part = adapter.rows(ids, bare, self.base)
            if routing is not None:
                part = part * routing.scales(name, e).view(*ids.shape, 1)
            change = part if change is None else change + part
        if change is None:
            return e
        if factor is not None:
            change = change * factor.to(change.dtype)
        return (e + change).to(e.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.adapters[adapter].delta_weight(self.base).T
