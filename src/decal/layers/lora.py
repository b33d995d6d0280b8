"""LoRA, s·B·A: on a linear layer, and its PiSSA/OLoRA start, s·(B·A - B0·A0), on an untouched base."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from decal.layers.seams import Base
from decal.ops import dropout, lora, select
from decal.ops.dropout import Drop
from decal.spec import LoraConfig


def drawn_on(base: Base, generator: Generator | None) -> torch.device:
    """Where random factors are drawn: the generator's device, so that one seed means one start on any device."""
    return base.device if generator is None else generator.device


class LoRA:
    """The change s·B·A with A (r, in) and B (out, r); where the factors live is the subclass's."""

    dropout: nn.Module = nn.Identity()
    redraws = False  # True: dropout's mask is drawn again in backward; else torch keeps it, and draws it as PEFT does
    reads_output = False
    owns_weight = True  # False: another layer with the same weight merges this change

    def __init__(self, base: Base, config: LoraConfig, *, rank: int, alpha: float, dtype: torch.dtype) -> None:
        self.rank = rank
        self.alpha = alpha
        self.scale = lora.scale(alpha, rank, rank_stabilized=config.use_rslora)

    @property
    def A(self) -> Tensor:
        raise NotImplementedError

    @property
    def B(self) -> Tensor:
        raise NotImplementedError

    def slots(self) -> dict[str, nn.Module | nn.Parameter]:
        """Return the parts to register, under PEFT's names."""
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        """Return what A and B are made of."""
        return [
            p for part in self.slots().values() for p in (part.parameters() if isinstance(part, nn.Module) else [part])
        ]

    def housed(self, kind: str, container: nn.ParameterDict, name: str) -> None:
        """Learn where the parameter of slot `kind` is registered (sharding may put another in its place)."""

    def init(self, base: Base, config: LoraConfig, generator: Generator | None) -> None:
        """Make real factors on the base's device, in the place of those made on the meta device."""
        raise NotImplementedError

    @property
    def draws_dropout(self) -> bool:
        """Whether this forward pass drops inputs."""
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training

    def drop(self, device: torch.device) -> Drop:
        """Return what this forward pass drops; another each time."""
        assert isinstance(self.dropout, nn.Dropout), "asked where it draws dropout only"
        return dropout.drawn(self.dropout.p, device)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.draws_dropout else (self.A, self.B, self.scale)

    def widened(self, x: Tensor) -> Tensor:
        """Return x in the factors' dtype, unless autocast on a card narrows it again: a copy that would be kept."""
        narrowed = select.habits(x.device) == "cuda" and torch.is_autocast_enabled(x.device.type)
        return x if narrowed else x.to(self.A.dtype)

    def delta(self, x: Tensor, y: Tensor | None, base: Base) -> Tensor:
        x = self.widened(x)
        if self.redraws and self.draws_dropout:
            return dropout.beside(x, self.A, self.B, self.scale, self.drop(x.device))
        return lora.delta(self.dropout(x), self.A, self.B, self.scale)

    def delta_weight(self, base: Base) -> Tensor:
        return lora.delta_weight(self.A, self.B, self.scale)

    def saved(self) -> dict[str, Tensor]:
        """Return the tensors of the adapter file, as plain LoRA that any reader of the format applies."""
        raise NotImplementedError


class LinearLoRA(LoRA):
    """Factors of a linear layer: `lora_A` and `lora_B` are linears without bias."""

    def __init__(self, base: Base, config: LoraConfig, *, rank: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__(base, config, rank=rank, alpha=alpha, dtype=dtype)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device="meta", dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device="meta", dtype=dtype)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()

    @property
    def A(self) -> Tensor:
        return self.lora_A.weight

    @property
    def B(self) -> Tensor:
        return self.lora_B.weight

    def slots(self) -> dict[str, nn.Module | nn.Parameter]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_dropout": self.dropout}

    def parameters(self) -> list[Tensor]:
        return [self.lora_A.weight, self.lora_B.weight]  # asked for at every layer and token of a mixed batch

    def init(self, base: Base, config: LoraConfig, generator: Generator | None) -> None:
        """B is zero, so that the model starts as the base; A as configured."""
        where = drawn_on(base, generator)
        A = torch.empty(self.A.shape, dtype=self.A.dtype, device=where)
        B = torch.zeros(self.B.shape, dtype=self.B.dtype, device=where)
        if config.init_lora_weights == "gaussian":
            lora.gaussian_(A, generator)
        else:
            lora.kaiming_(A, generator)
        if config.init_lora_weights is False:  # PEFT's word for "not a no-op": both factors random, for tests
            lora.kaiming_(B, generator)
        self.set_factors(A.to(base.device), B.to(base.device))

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Put real tensors in the place of the factors made on the meta device."""
        self.lora_A.weight = nn.Parameter(A)
        self.lora_B.weight = nn.Parameter(B)

    def saved(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}


class ResidualLoRA(LinearLoRA):
    """PiSSA and OLoRA: starts from the base's own principal factors A0, B0 and learns s·(B·A - B0·A0).

    The base is not changed (PEFT subtracts s·B0·A0 from it), so the adapter fits the plain base at any time; it is
    saved as plain LoRA of rank 2r: A' = [A; A0], B' = [B, -B0].
    """

    def __init__(self, base: Base, config: LoraConfig, *, rank: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__(base, config, rank=rank, alpha=alpha, dtype=dtype)
        self.start_A = nn.Linear(base.in_features, rank, bias=False, device="meta", dtype=dtype)
        self.start_B = nn.Linear(rank, base.out_features, bias=False, device="meta", dtype=dtype)

    def slots(self) -> dict[str, nn.Module | nn.Parameter]:
        return {**super().slots(), "lora_start_A": self.start_A, "lora_start_B": self.start_B}

    def parameters(self) -> list[Tensor]:
        return [*super().parameters(), self.start_A.weight, self.start_B.weight]

    def init(self, base: Base, config: LoraConfig, generator: Generator | None) -> None:
        W = base.dense(torch.float64 if base.dtype == torch.float64 else torch.float32)
        if config.init_lora_weights == "pissa":
            A0, B0 = lora.pissa(W, self.rank, self.scale)
        else:
            A0, B0 = lora.olora(W, self.rank)
        A0, B0 = A0.to(self.A.dtype), B0.to(self.B.dtype)
        self.start_A.weight = nn.Parameter(A0, requires_grad=False)
        self.start_B.weight = nn.Parameter(B0, requires_grad=False)
        self.set_factors(A0.clone(), B0.clone())

    def _stacked(self) -> tuple[Tensor, Tensor]:
        return torch.cat((self.A, self.start_A.weight)), torch.cat((self.B, -self.start_B.weight), dim=1)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.draws_dropout else (*self._stacked(), self.scale)

    def delta(self, x: Tensor, y: Tensor | None, base: Base) -> Tensor:
        x = self.dropout(self.widened(x))
        start = lora.delta(x, self.start_A.weight, self.start_B.weight, self.scale)
        return lora.delta(x, self.A, self.B, self.scale) - start

    def delta_weight(self, base: Base) -> Tensor:
        return lora.delta_weight(*self._stacked(), self.scale)

    def saved(self) -> dict[str, Tensor]:
        A, B = self._stacked()
        return {"lora_A.weight": A, "lora_B.weight": B}
