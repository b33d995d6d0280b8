"""The decoder layer of the Llama family as one function (ops/block.py), with the layer's own modules for its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from decal.errors import RunError
from decal.layers import adapted
from decal.layers.adapted import AdaptedLinear
from decal.layers.coded import CodedBase, CodedLinear
from decal.layers.dense import DenseBase
from decal.layers.lean import ACTIVATIONS, NORMS, activation_of
from decal.layers.lora import LinearLoRA
from decal.layers.seams import Base
from decal.layers.shelf import Shelf
from decal.ops import fuse, segments, select, workspace
from decal.ops.block import Block, Memory, Norm, layer
from decal.ops.dropout import Drop
from decal.ops.fp8 import ALIGNED, Group8, rounded_, rounded_sum_
from decal.ops.products import Factors, Group, Product

# The families of transformers whose decoder layers compute what ops/block.py does, with RoPE over whole heads.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3", "Phi3")
GEMMA_NORMS = {"GemmaRMSNorm", "Gemma3RMSNorm"}
# The linear layers that share an input.
LINEARS = (
    (attrgetter("self_attn.q_proj"), attrgetter("self_attn.k_proj"), attrgetter("self_attn.v_proj")),
    (attrgetter("self_attn.o_proj"),),
    (attrgetter("mlp.gate_proj"), attrgetter("mlp.up_proj")),
    (attrgetter("mlp.down_proj"),),
)
JOINED = (
    (attrgetter("self_attn.qkv_proj"),),
    (attrgetter("self_attn.o_proj"),),
    (attrgetter("mlp.gate_up_proj"),),
    (attrgetter("mlp.down_proj"),),
)
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
        self.whole = False  # whether the last call in training was of one function
        self._dense: dict[nn.Module, DenseBase] = {}  # of linear layers that nothing adapts
        self.activation = activation_of(original.mlp)

    @property
    def original(self) -> Any:
        return self._original[0]

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """(B, S, D) -> (B, S, D), with the arguments that transformers gives a decoder layer.

        `segments` (ops/segments.py) may say in the place of a mask where packed samples begin.
        """
        block = self.block(hidden_states, given)
        if self.training and torch.is_grad_enabled():
            self.whole = block is not None
        if block is None:
            if given.pop("segments", None) is not None:
                raise RunError(
                    "a decoder layer cannot tell packed samples apart as it is called here",
                    fix="Use data.packing=false, or attention by sdpa.",
                )
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

    def groups(self) -> list[list[nn.Module]]:
        """Return the linear layers by their inputs: queries, keys and values; attention's output; gate and up; down."""
        form = JOINED if hasattr(self.self_attn, "qkv_proj") else LINEARS
        return [[get(self) for get in group] for group in form]

    def linears(self) -> list[nn.Module]:
        return [linear for group in self.groups() for linear in group]

    def kept_bytes(self, size: int) -> int:
        """Return the bytes that a token costs where the layer keeps all that backward reads, `size` for a number."""
        qkv, (o,), gate_up, _ = ([_outputs(linear) for linear in group] for group in self.groups())
        norms = norms_of(self)
        apart = sum(qkv) if norms.of_heads is not None else 0  # before their heads are normed
        results = 2 * o if norms.after is not None else 0
        # x and the sum after attention; queries, keys, values; attention's output, as wide as the queries; gate and up
        return size * (2 * o + sum(qkv) + self._queries() + sum(gate_up) + apart + results)

    def _queries(self) -> int:
        attention: Any = self.self_attn
        heads: int = attention.config.num_attention_heads
        return heads * int(attention.head_dim)

    def input_bytes(self, size: int) -> int:
        """Return the bytes of a token's input."""
        return size * _outputs(self.groups()[1][0])

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
            or self._unlike(x.dtype) is not None
        ):
            return None
        found = self.products(x.dtype)
        if found is None:
            return None
        found = [
            replace(product, drop=_drop(linear, x.device))
            for product, linear in zip(found, self.linears(), strict=True)
        ]
        groups = self._groups(found, x)
        config = attention.config
        return Block(
            qkv=groups[0],
            o=groups[1],
            gate_up=groups[2],
            down=groups[3],
            before=_pair(norms.before),
            after=None if norms.after is None else _pair(norms.after),
            of_heads=None if norms.of_heads is None else _pair(norms.of_heads),
            heads=(config.num_attention_heads, config.num_key_value_heads),
            width=attention.head_dim,
            activation=self.activation,
            attend=partial(self._attend, mask=given.get("attention_mask"), where=given.get("segments")),
            memory=self.memory,
            shelf=self.shelf,
        )

    def _unlike(self, dtype: torch.dtype) -> str | None:
        attention: Any = self.self_attn
        config = attention.config
        stored = next((n.weight.dtype for n in norms_of(self).every() if n.weight.dtype != dtype), None)
        if stored is not None:
            return f"its weights are stored in {_name(stored)}, and it computes in {_name(dtype)}"
        if config._attn_implementation not in INTERFACES:
            return f"its attention is {config._attn_implementation}, not sdpa"
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self._modules.values())
        if attention.attention_dropout > 0 or drops:
            return "it drops some of what it computes (a dropout in the model's config)"
        if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
            return "it turns a part of each head"
        return None

    def why_general(self, dtype: torch.dtype) -> str | None:
        """Return why the layer never runs as one function where it computes in `dtype`; None if it may."""
        if (unlike := self._unlike(dtype)) is not None or self.products(dtype) is not None:
            return unlike
        return "it needs at most one adapter, of plain LoRA, on frozen weights and biases that decal can decode"

    def products(self, dtype: torch.dtype) -> list[Product] | None:
        """Return the frozen weights; None if the one function cannot use one of them, or its adapters."""
        products = [_product(linear, self._base(linear), dtype) for linear in self.linears()]
        found = [product for product in products if product is not None]
        return found if len(found) == len(products) else None

    def _base(self, linear: nn.Module) -> CodedBase | DenseBase | None:
        base: Base | None = None
        if isinstance(linear, AdaptedLinear):
            base = linear.base
        elif isinstance(linear, CodedLinear):
            base = CodedBase(linear)
        elif isinstance(linear, nn.Linear) and not linear.weight.requires_grad:
            base = self._dense.setdefault(linear, DenseBase(linear))  # it knows its largest weights
        return base if type(base) in (CodedBase, DenseBase) else None  # type: ignore[return-value]  # just asked

    def why_not_fp8(self, dtype: torch.dtype) -> str | None:
        """Return why the layer's products cannot be computed in 8-bit floats; None if they can."""
        if (unlike := self._unlike(dtype)) is not None:
            return unlike
        found = self.products(dtype)
        if found is None or any(_drop(linear, torch.device("cpu")) is not None for linear in self.linears()):
            return "it needs one plain LoRA adapter on frozen weights, without dropout, DoRA or trained biases"
        uneven = [p for p in found if p.inputs % ALIGNED or p.outputs % ALIGNED]
        return f"its widths must be multiples of {ALIGNED}" if uneven else None

    def _groups(self, found: list[Product], x: Tensor) -> list[Group]:
        rows = x.numel() // x.shape[-1]
        merged = [
            product.drop is None and _merges(linear, rows, x)
            for product, linear in zip(found, self.linears(), strict=True)
        ]
        groups, first = [], 0
        for linears in self.groups():
            part = slice(first, first + len(linears))
            products = tuple(found[part])
            # Queries, keys and values are narrow; in 16 bits gate and up would need the largest buffer, for nothing.
            stacked = first == 0
            group = Group8(products, True, True) if self.fp8 else Group(products, all(merged[part]), stacked)
            groups.append(group)
            first = part.stop
        return groups

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Any, where: segments.Segments | None) -> Tensor:
        module: Any = self.self_attn
        if where is not None:
            return segments.attend(q, k, v, where, module.scaling)
        interface: Any = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        out: Tensor = interface(module, q, k, v, mask, dropout=0.0, scaling=module.scaling)[0]
        return out


def block_of(module: nn.Module, shelf: Shelf) -> LeanBlock | None:
    """Return the one-function form of a decoder layer of a known class, else None."""
    kind: Any = type(module)
    family = kind.__name__.removesuffix("DecoderLayer")
    if family not in FAMILIES or not kind.__module__.startswith("transformers.models."):
        return None
    parts: Any = module
    norms = norms_of(parts).every()
    known = type(parts.self_attn).__name__ == f"{family}Attention" and type(parts.mlp).__name__ == f"{family}MLP"
    known = known and all(type(n).__name__ in NORMS | GEMMA_NORMS and not n.weight.requires_grad for n in norms)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (module, parts.self_attn, parts.mlp, *norms))
    plain = activation_of(parts.mlp) in ACTIVATIONS
    return LeanBlock(module, shelf) if known and plain and not hooked else None


@dataclass(frozen=True)
class Norms:
    """A decoder layer's norms, in pairs: of attention and the MLP, before and after them, and of queries and keys."""

    before: tuple[Any, Any]
    after: tuple[Any, Any] | None
    of_heads: tuple[Any, Any] | None

    def every(self) -> list[Any]:
        return [norm for pair in (self.before, self.after, self.of_heads) if pair is not None for norm in pair]


def norms_of(layer: Any) -> Norms:
    """Return a decoder layer's norms."""
    attention = layer.self_attn
    of_heads = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    if not hasattr(layer, "pre_feedforward_layernorm"):
        return Norms(before=(first, second), after=None, of_heads=of_heads)
    before = (first, layer.pre_feedforward_layernorm)
    return Norms(before=before, after=(second, layer.post_feedforward_layernorm), of_heads=of_heads)


def _pair(norms: tuple[Any, Any]) -> tuple[Norm, Norm]:
    first, second = (Norm(norm.weight, _eps(norm), type(norm).__name__ in GEMMA_NORMS) for norm in norms)
    return first, second


def _outputs(linear: nn.Module) -> int:
    outputs = linear.out_features
    assert isinstance(outputs, int), "linear layers say how wide they are"
    return outputs


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _computed(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


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


def _product(linear: nn.Module, base: CodedBase | DenseBase | None, dtype: torch.dtype) -> Product | None:
    """Return the frozen weight of a layer, None if the one function cannot use it (or its adapters)."""
    scale = 0.0
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
        return Product(inputs, outputs, scale, base.bias, None, partial(_decode, coded, scale), coded.largest)
    W = base.weight.detach()
    return Product(inputs, outputs, scale, base.bias, W, partial(_copy, W, scale), base.largest)


def _merges(linear: nn.Module, rows: int, x: Tensor) -> bool:
    if isinstance(linear, AdaptedLinear):
        return linear.may_merge(x)
    least = adapted.MERGE_ROWS.get(select.habits(x.device), adapted.MERGE_ROWS["cuda"])
    return rows >= least and isinstance(linear, CodedLinear)


def _decode(coded: CodedLinear, scale: float, out: Tensor, factors: Factors, by: Tensor | None = None) -> None:
    if factors is not None:
        A, B = factors
        coded.decode_plus(A.detach(), B.detach(), scale, out, by)
    elif by is None:
        coded.decode(out)
    else:
        rounded_(out, coded.decode(workspace.buffer(tuple(out.shape), coded.dtype, out.device)), by)


def _copy(W: Tensor, scale: float, out: Tensor, factors: Factors, by: Tensor | None = None) -> None:
    if by is None:
        out.copy_(W)
        if factors is not None:
            A, B = (factor.detach().to(out.dtype) for factor in factors)
            out.addmm_(B, A, alpha=scale)
    elif factors is not None:
        A, B = (factor.detach().bfloat16() for factor in factors)
        change = torch.mm(B, A, out=workspace.buffer(tuple(W.shape), torch.bfloat16, W.device))
        rounded_sum_(out, W, change, scale, by)
    else:
        rounded_(out, W, by)
