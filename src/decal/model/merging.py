"""Write adapters into the base weights, take them out again, and take the wrapped layers off the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from decal.errors import DecalError
from decal.files import peft_files, sealed
from decal.layers.adapted import Adapted
from decal.layers.replaced import ReplacedModule
from decal.layers.tokens import TiedTokenRows, TokenRows
from decal.model import saved, targets
from decal.model.inject import unwrap_layer

if TYPE_CHECKING:
    from decal.model.wrapper import PeftModel


def merge(model: PeftModel, names: tuple[str, ...]) -> None:
    """Write the changes of `names` into the base weights, each layer rounded once. Raises AdapterError for NaN."""
    for name in names:
        peft_files.refuse_broken(saved.tensors(model, name), where=f"adapter {name!r}")
    if model.switch.merged:
        raise DecalError(f"adapters {model.switch.merged} are merged already", fix="Call unmerge_adapter() first.")
    model.biases.use(names)
    for layer in _mergeable(model):
        layer.merge(names)
    model.switch.merged = names


def unmerge(model: PeftModel) -> None:
    """Put the base weights back that `merge` kept."""
    for layer in _mergeable(model):
        layer.unmerge()
    model.switch.merged = ()
    model.biases.use(model.switch.active)


def forget_originals(model: PeftModel) -> None:
    """Give up the way back after a merge."""
    for layer in _mergeable(model):
        layer.forget_original()


def unwrap(model: PeftModel, merged: Sequence[str]) -> nn.Module:
    """Return the plain model; modules that `merged` adapters trained whole take the places of the originals."""
    plain = model.get_base_model()
    for name, module in list(targets.modules(plain)):
        if isinstance(module, ReplacedModule):
            copies = [module.modules_to_save[n] for n in merged if n in module.modules_to_save]
            unwrap_layer(plain, name, copies[0] if copies else module.original_module)
        elif isinstance(module, (Adapted, TokenRows, TiedTokenRows)):
            unwrap_layer(plain, name, targets.original(module))
    frozen_before = {id(p) for p in model.frozen_before}
    for p in plain.parameters():
        p.requires_grad_(id(p) not in frozen_before)
    saved.say_untied(plain)
    if merged:
        plain.seal = sealed.UNSEALED  # type: ignore[assignment]  # these are no longer the weights that it was loaded from
    return plain


def _mergeable(model: PeftModel) -> list[Adapted | TokenRows]:
    return [m for m in model.modules() if isinstance(m, (Adapted, TokenRows))]
