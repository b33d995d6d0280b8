"""The decoder layer of the Llama family as one function (ops/block.py), with the layer's own modules for its parts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decal.errors import RunError
from decal.layers import adapted
from decal.layers.adapted import AdaptedLinear
from decal.layers.coded import CodedBase, CodedLinear
from decal.layers.dense import DenseBase
from decal.layers.lean import MLPS, NORMS, LeanRMSNorm
from decal.layers.lora import LinearLoRA
from decal.layers.seams import Base
from decal.layers.shelf import Shelf
from decal.ops import fuse, select
from decal.ops.block import Block, Memory, layer
from decal.ops.dropout import Drop
from decal.ops.fp8 import ALIGNED, Group8
from decal.ops.products import Group, Product

# Classes of transformers whose forward pass is ops/block.py's, with RoPE over whole heads.
LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))
INTERFACES = {"sdpa", "flex_attention"}  # transformers' names of attentions whose mask says all there is to say


class LeanBlock(nn.Module):
    """A decoder layer in one function, where its parts allow; else the layer as transformers has it.

    It stands on the very modules of the original, so that names, parameters and files do not change.
    """

    def __init__(self, original: Any, shelf: Shelf) -> None:
        super().__init__()
        self._original: tuple[Any] = (original,)  # in a tuple: not a part of this module
        self._modules = original._modules
        self.shelf = shelf
        offloads = getattr(original, "offloads_checkpoint", False)
        self.memory: Memory = ("offload" if offloads else "recompute") if original.gradient_checkpointing else "keep"
        self.fp8 = False
        self.masked = True  # whether the last call brought a mask: without one attention is causal
        self.activation = str(original.mlp.config.hidden_act)

    @property
    def original(self) -> Any:
        return self._original[0]

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """(B, S, D) -> (B, S, D), with the arguments that transformers gives a decoder layer."""
        self.masked = given.get("attention_mask") is not None
        block = self.block(hidden_states, given)
        if block is None:
            if self.fp8 and self.training and torch.is_grad_enabled():
                raise RunError(
                    "a decoder layer cannot train in fp8 as it is called here",
                    got=f"attention by {self.self_attn.config._attn_implementation}",  # type: ignore[union-attr]
                    fix="Use train.precision=auto, or attention by sdpa.",
                )
            self.original.training = self.training
            out: Tensor = self.original(hidden_states, **given)
            return out
        cos, sin = given["position_embeddings"]
        factors = [part for linear in self.linears() for part in _factors(linear)]
        return layer(block, hidden_states, cos, sin, factors)

    def linears(self) -> list[nn.Module]:
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        return [getattr(attention, name) for name in LINEARS[:4]] + [getattr(mlp, name) for name in LINEARS[4:]]

    def kept_bytes(self) -> int:
        """Return the bytes that a token costs where the layer keeps all that backward reads, in 16 bits."""
        q, k, v, o, gate, up, _ = (_outputs(linear) for linear in self.linears())
        before = q + k + v if len(norms_of(self)) > 2 else 0
        return 2 * (
            2 * o + 2 * q + k + v + gate + up + before
        )  # x, the sum after attention, q, attention's output, ...

    def input_bytes(self) -> int:
        """Return the bytes of a token's input, in 16 bits."""
        return 2 * _outputs(self.linears()[3])

    def block(self, x: Tensor, given: dict[str, Any]) -> Block | None:
        """Return the frozen parts, or None where this call asks for more than the one function does."""
        attention: Any = self.self_attn
        norms = norms_of(self)
        rotation = given.get("position_embeddings")
        if (
            not (torch.is_grad_enabled() and self.training and fuse.on(x.device))
            or given.get("past_key_values") is not None
            or rotation is None
            or rotation[0].shape[-1] != attention.head_dim
            or rotation[0].dtype != x.dtype
            or x.dtype != _computed(x)
            or any(norm.weight.dtype != x.dtype for norm in norms)
            or attention.config._attn_implementation not in INTERFACES
            or attention.attention_dropout > 0
        ):
            return None
        found = self.products(x.dtype)
        if found is None:
            return None
        found = [
            replace(product, drop=_drop(linear, x.device))
            for product, linear in zip(found, self.linears(), strict=True)
        ]
        groups = [Group8(tuple(found[part]), True) for part in GROUPS] if self.fp8 else self._groups(found, x)
        return Block(
            qkv=groups[0],
            o=groups[1],
            gate_up=groups[2],
            down=groups[3],
            norms=(norms[0].weight, norms[1].weight),
            eps=(_eps(norms[0]), _eps(norms[1])),
            head_norms=None if len(norms) == 2 else (norms[2].weight, norms[3].weight, _eps(norms[2])),
            heads=(found[0].outputs // attention.head_dim, found[1].outputs // attention.head_dim),
            width=attention.head_dim,
            activation=self.activation,
            attend=partial(self._attend, mask=given.get("attention_mask")),
            memory=self.memory,
            shelf=self.shelf,
        )

    def products(self, dtype: torch.dtype) -> list[Product] | None:
        """Return the frozen weights; None if the one function cannot use one of them, or its adapters."""
        products = [_product(linear, dtype) for linear in self.linears()]
        found = [product for product in products if product is not None]
        return found if len(found) == len(products) else None

    def why_not_fp8(self, dtype: torch.dtype) -> str | None:
        """Return why the layer's products cannot be computed in 8-bit floats; None if they can."""
        found = self.products(dtype)
        if found is None or any(_drop(linear, torch.device("cpu")) is not None for linear in self.linears()):
            return "it needs one plain LoRA adapter on frozen weights, without dropout and without DoRA"
        uneven = [p for p in found if p.inputs % ALIGNED or p.outputs % ALIGNED]
        return f"its widths must be multiples of {ALIGNED}" if uneven else None

    def _groups(self, found: list[Product], x: Tensor) -> list[Group]:
        rows = x.numel() // x.shape[-1]
        merged = [
            product.drop is None and _merges(linear, rows, x)
            for product, linear in zip(found, self.linears(), strict=True)
        ]
        return [Group(tuple(found[part]), all(merged[part])) for part in GROUPS]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Any) -> Tensor:
        module: Any = self.self_attn
        interface: Any = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        out: Tensor = interface(module, q, k, v, mask, dropout=0.0, scaling=module.scaling)[0]
        return out


def block_of(module: nn.Module, shelf: Shelf) -> LeanBlock | None:
    """Return the one-function form of a decoder layer of a known class, else None."""
    kind: Any = type(module)
    if kind.__name__ not in LAYERS or not kind.__module__.startswith("transformers.models."):
        return None
    parts: Any = module
    norms = norms_of(parts)
    known = type(parts.self_attn).__name__ in ATTENTIONS and type(parts.mlp).__name__ in MLPS
    known = known and all(type(n).__name__ in NORMS and not n.weight.requires_grad for n in norms)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (module, parts.self_attn, parts.mlp, *norms))
    plain = getattr(parts.mlp.config, "hidden_act", "") in ("silu", "gelu_pytorch_tanh")
    return LeanBlock(module, shelf) if known and plain and not hooked else None


def norms_of(layer: Any) -> list[Any]:
    """Return a decoder layer's norms: before attention, before the MLP, and of queries and keys where there are any."""
    heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [layer.input_layernorm, layer.post_attention_layernorm, *(norm for norm in heads if norm is not None)]


def _outputs(linear: nn.Module) -> int:
    outputs = linear.out_features
    assert isinstance(outputs, int), "linear layers say how wide they are"
    return outputs


def _computed(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _eps(norm: Any) -> float:
    return norm.eps if isinstance(norm, LeanRMSNorm) else float(norm.variance_epsilon)


def _adapter(linear: AdaptedLinear) -> LinearLoRA | None:
    """Return the only adapter that is on, where it is plain LoRA."""
    switch = linear.switch
    on = switch.on(linear.adapters)
    if switch.routing is not None or len(on) != 1:
        return None
    adapter = linear.adapters[on[0]]
    return adapter if type(adapter) is LinearLoRA else None


def _drop(linear: nn.Module, device: torch.device) -> Drop | None:
    """Return what the layer's adapter drops of its input in this pass."""
    adapter = _adapter(linear) if isinstance(linear, AdaptedLinear) else None
    return adapter.drop(device) if adapter is not None and adapter.draws_dropout else None


def _factors(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    adapter = _adapter(linear) if isinstance(linear, AdaptedLinear) else None
    return (None, None) if adapter is None else (adapter.A, adapter.B)


def _product(linear: nn.Module, dtype: torch.dtype) -> Product | None:
    """Return the frozen weight of a layer, None if the one function cannot use it (or its adapters)."""
    scale, base = 0.0, _base(linear)
    if isinstance(linear, AdaptedLinear):
        adapter = _adapter(linear)
        if adapter is None:
            return None
        scale = adapter.scale
    if base is None or (base.bias is not None and (base.bias.requires_grad or base.bias.dtype != dtype)):
        return None
    inputs, outputs = base.in_features, base.out_features
    if isinstance(base, CodedBase):
        coded = base.layer
        return Product(inputs, outputs, scale, base.bias, None, partial(_decode, coded, scale))
    W = base.weight.detach()
    return Product(inputs, outputs, scale, base.bias, W, partial(_copy, W, scale))


def _base(linear: nn.Module) -> CodedBase | DenseBase | None:
    base: Base | None
    if isinstance(linear, AdaptedLinear):
        base = linear.base
    elif isinstance(linear, CodedLinear):
        base = CodedBase(linear)
    else:
        base = DenseBase(linear) if isinstance(linear, nn.Linear) and not linear.weight.requires_grad else None
    return base if type(base) in (CodedBase, DenseBase) else None  # type: ignore[return-value]  # just asked


def _merges(linear: nn.Module, rows: int, x: Tensor) -> bool:
    if isinstance(linear, AdaptedLinear):
        return linear.may_merge(x)
    least = adapted.MERGE_ROWS.get(select.habits(x.device), adapted.MERGE_ROWS["cuda"])
    return rows >= least and isinstance(linear, CodedLinear)


def _decode(coded: CodedLinear, scale: float, out: Tensor, A: Tensor | None, B: Tensor | None) -> None:
    if A is None or B is None:
        coded.decode(out)
    else:
        coded.decode_plus(A.detach(), B.detach(), scale, out)


def _copy(W: Tensor, scale: float, out: Tensor, A: Tensor | None, B: Tensor | None) -> None:
    out.copy_(W)
    if A is not None and B is not None:
        out.addmm_(B.detach().to(out.dtype), A.detach().to(out.dtype), alpha=scale)
