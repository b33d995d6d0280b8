"""Store a model's linear layers in 4 bits, as transformers and bitsandbytes read them, and measure the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decal import rundir
from decal.errors import ConfigError, DecalError, RunError
from decal.layers.coded import CodedLinear
from decal.layers.coded_experts import CodedExperts
from decal.layers.int8_linear import Int8Linear
from decal.layers.nf4_linear import NF4Linear
from decal.model import quantized, quantizer
from decal.model.load import load_model, load_tokenizer, meta_model
from decal.ops import nf4
from decal.report import quantization
from decal.spec import QuantConfig

REPORT, PICTURE = "quantization.json", "quantization.svg"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What coding did to some weights: their number, squared norms of W - decoded and of W, and the rest as below."""

    weights: int
    squared: float
    total: float
    worst_block: float
    levels: tuple[float, ...]

    def __add__(self, other: Loss) -> Loss:
        """Return what coding did to both."""
        weights = self.weights + other.weights
        shares = zip(self.levels, other.levels, strict=True)
        return Loss(
            weights=weights,
            squared=self.squared + other.squared,
            total=self.total + other.total,
            worst_block=max(self.worst_block, other.worst_block),
            levels=tuple((a * self.weights + b * other.weights) / weights for a, b in shares),
        )


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What coding did to one weight, or to all experts of one parameter.

    Errors are Frobenius norms of W - decoded, relative to those of W.
    """

    name: str
    weights: int
    error: float
    worst_block: float  # the largest relative error of one block
    levels: tuple[float, ...]  # share of each of the 16 codes, from the lowest level to the highest; () for int8
    gain: float  # squared error that one more byte removes if the layer stays at 8 bits, over all layers' mean


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was written (path None: nothing) and measured. Bits are per weight of the coded layers."""

    path: Path | None
    format: str
    bits: float
    bits_single: float  # with fp32 scales
    bits_double: float  # with doubly quantised scales
    coded: int  # weights
    wide: tuple[str, ...]  # linear layers and experts that stayed as they were
    bytes: int
    layers: tuple[LayerError, ...]

    @property
    def error(self) -> float:
        """Relative Frobenius error over all coded weights, each layer by its size."""
        total = sum(layer.weights for layer in self.layers)
        return math.sqrt(sum(layer.error**2 * layer.weights for layer in self.layers) / total)


def quantize(model: str, out: Path | None, settings: QuantConfig, *, report: bool = False) -> Quantized:
    """Read `model` tensor by tensor, write it to the folder `out` (None: only measure), and return the measurements.

    With `report` a table (JSON) and a picture (SVG) lie beside the model. Raises RunError if `out` is in use, and
    DecalError for what has no common file layout.
    """
    if out is not None and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise RunError("the output folder is not empty", got=out, fix="Choose another.")
    if out is not None and settings.format == "int8":
        raise ConfigError(
            "int8 by rows has no common file layout", fix="Use nf4 or fp4, or train with --quantize int8."
        )
    if out is not None and not settings.has_files:
        raise ConfigError(
            "the common file layout has one 4-bit format for a model",
            got=f"format {settings.format}, head {settings.head}",
            fix="Give the head the format of the layers, or train with quantize.head.",
        )
    if out is not None:
        quantized.refuse_experts(quantizer.planned_experts(meta_model(model), settings))
    found: dict[str, Loss] = {}

    def observe(name: str, W: Tensor, layer: CodedLinear) -> None:
        loss = loss_of(W, layer)
        found[name] = found[name] + loss if name in found else loss

    loaded: Any = load_model(model, device="cpu", dtype="auto", quantize=settings, observe=observe)
    if not found:
        raise DecalError("nothing was quantised", got=model, fix="Give a checkpoint in 16 or 32 bits.")
    wide = [name for name, module in loaded.named_modules() if type(module) in quantized.LINEAR]
    wide += [name for name, parameter in loaded.named_parameters() if parameter.dim() == 3]
    result = Quantized(
        path=out,
        format=settings.format,
        bits=quantized.bits_per_weight(loaded),
        bits_single=_bits(loaded, settings, double_quant=False),
        bits_double=_bits(loaded, settings, double_quant=True),
        coded=sum(loss.weights for loss in found.values()),
        wide=tuple(wide),
        bytes=sum(p.numel() * p.element_size() for p in loaded.parameters()),
        layers=_with_gain(found),
    )
    if out is not None:
        tokenizer = load_tokenizer(model)
        with rundir.new_folder(out) as new:
            quantized.write(loaded, new)
            tokenizer.save_pretrained(new)
            if report:
                rundir.write_json(new / REPORT, quantization.facts(result))
                rundir.write_bytes(new / PICTURE, quantization.picture(result).encode())
    return result


def loss_of(W: Tensor, layer: CodedLinear) -> Loss:
    """Return what coding did to W (out, in)."""
    wide = W.detach().float().contiguous()
    off = wide - layer.decode(torch.empty_like(wide))
    block = layer.block if isinstance(layer, NF4Linear) else layer.in_features
    full = wide.numel() // block * block
    blocks, lost = wide.flatten()[:full].view(-1, block), off.flatten()[:full].view(-1, block)
    norms = blocks.norm(dim=1)
    return Loss(
        weights=wide.numel(),
        squared=float(off.double().square().sum()),
        total=float(wide.double().square().sum()),
        worst_block=float((lost.norm(dim=1) / norms)[norms > 0].max()) if bool((norms > 0).any()) else 0.0,
        levels=_levels(layer),
    )


def _levels(layer: CodedLinear) -> tuple[float, ...]:
    if not isinstance(layer, NF4Linear):
        return ()
    codes = layer.weight.detach()
    counts = torch.bincount(torch.cat((codes >> 4, codes & 15)).int(), minlength=16).double()
    return tuple((counts / counts.sum())[list(nf4.ORDER[layer.kind])].tolist())


def _with_gain(found: dict[str, Loss]) -> tuple[LayerError, ...]:
    """An 8-bit copy takes about as many more bytes for each weight of any layer: compare squared error per weight."""
    mean = sum(loss.squared for loss in found.values()) / sum(loss.weights for loss in found.values())
    return tuple(
        LayerError(
            name=name,
            weights=loss.weights,
            error=(loss.squared / loss.total) ** 0.5 if loss.total else 0.0,
            worst_block=loss.worst_block,
            levels=loss.levels,
            gain=loss.squared / loss.weights / mean if mean else 0.0,
        )
        for name, loss in found.items()
    )


def _bits(model: Any, settings: QuantConfig, *, double_quant: bool) -> float:
    if settings.format == "int8":
        return quantized.bits_per_weight(model)
    sizes: list[tuple[int, int]] = []  # of each linear layer, and of each expert
    eight = [m for m in model.modules() if isinstance(m, Int8Linear)]
    for module in model.modules():
        if isinstance(module, NF4Linear):
            sizes.append((module.out_features, module.in_features))
        elif isinstance(module, CodedExperts):
            sizes += module.count * [(module.one.out_features, module.one.in_features)]
    bits = [
        nf4.bits_per_weight(shape, block=settings.block, double_quant=double_quant) * shape[0] * shape[1]
        for shape in sizes
    ]
    bits += [8 * (m.weight.numel() + m.scales.numel()) for m in eight]  # a head of its own format
    return sum(bits) / (sum(a * b for a, b in sizes) + sum(m.weights for m in eight))
