"""Between a model's adapter and its file: which tensors under which names, and what the file's configuration says."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from decal import locate
from decal.errors import AdapterError, Unsupported
from decal.files import peft_files, sealed
from decal.layers.adapted import Adapted
from decal.layers.dense import Conv1DBase
from decal.layers.embedding import TiedLoRA
from decal.layers.lora import ResidualLoRA
from decal.layers.replaced import ReplacedModule
from decal.layers.tokens import TokenRows
from decal.model import inject, sealing, targets
from decal.spec import LoraConfig

if TYPE_CHECKING:
    from decal.model.wrapper import PeftModel

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
MAGNITUDE = "lora_magnitude_vector"


class Fetched(NamedTuple):
    """An adapter as its folder holds it."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    seal: sealed.Seal


class LoadResult(NamedTuple):
    """What loading left over; both empty, because decal refuses an adapter that does not fit exactly."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return adapter `name`'s tensors under the keys of its file (without the file's prefix)."""
    state: dict[str, Tensor] = {}
    for layer_name, layer in model._carriers[name].items():
        if isinstance(layer, Adapted):
            parts = layer.adapters[name].saved()
        elif isinstance(layer, ReplacedModule):
            parts = dict(layer.modules_to_save[name].state_dict(keep_vars=True))
        else:
            parts = {TOKEN_ROWS: layer.rows_of(name)}
        state.update({f"{layer_name}.{part}": tensor for part, tensor in parts.items()})
    names = {p: n for n, p in model.get_base_model().named_parameters(remove_duplicate=False)}
    state.update({names[p]: value for p, value in model.biases.values(name).items()})
    return state


def config(model: PeftModel, name: str) -> LoraConfig:
    """Return the configuration that describes the saved tensors to any reader of PEFT's format."""
    spec = model.peft_config[name]
    adapted = [layer for layer in model._carriers[name].values() if isinstance(layer, Adapted)]
    transposed = any(isinstance(layer.base, Conv1DBase) for layer in adapted)  # PEFT sets it where it meets a Conv1D
    changes: dict[str, object] = {"inference_mode": True, "fan_in_fan_out": transposed or spec.fan_in_fan_out}
    if spec.target_modules in (None, targets.ALL_LINEAR, targets.ATTENTION):  # said in full, for other readers
        changes["target_modules"] = _by_name(model, name)
    if spec.init_lora_weights in ("pissa", "olora"):  # saved as plain LoRA of rank 2r with the same scale
        factor = math.sqrt(2) if spec.use_rslora else 2
        changes.update(
            init_lora_weights=True,
            r=2 * spec.r,
            lora_alpha=factor * spec.lora_alpha,
            rank_pattern={key: 2 * rank for key, rank in spec.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in spec.alpha_pattern.items()},
        )
    heads = targets.HEADS.get(spec.task_type, ()) if spec.task_type else ()
    if heads:
        changes["modules_to_save"] = list(dict.fromkeys((*(spec.modules_to_save or ()), *heads)))
    return spec.model_copy(update=changes)


def _by_name(model: PeftModel, name: str) -> list[str]:
    """The adapted layers by their last names where these name nothing else, else in full."""
    full = [n for n, layer in model._carriers[name].items() if isinstance(layer, Adapted)]
    ends = sorted({n.rpartition(".")[2] for n in full})
    all_names = [n for n, _ in targets.modules(model.get_base_model())]
    reached = [n for n in all_names if n.rpartition(".")[2] in ends]
    return ends if sorted(reached) == sorted(full) else sorted(full)


def for_loading(config: LoraConfig, *, is_trainable: bool) -> LoraConfig:
    """Return a file's configuration as the model applies it: trained factors need no special start."""
    init = config.init_lora_weights
    if init in ("pissa", "olora"):
        raise AdapterError(
            f"the adapter was saved with init_lora_weights={init!r}: it fits only a base that was changed with it",
            fix="Save it as plain LoRA (PEFT: path_initial_model_for_weight_conversion); decal always does.",
        )
    return config.model_copy(update={"inference_mode": not is_trainable})


def fetch(
    model_id: str | os.PathLike[str], model: nn.Module, *, revision: str | None, subfolder: str | None
) -> Fetched:
    """Return a saved adapter; raise AdapterError if it is for another base, or is not what was sealed."""
    folder = locate.folder(
        model_id, kind="adapter", revision=revision, patterns=patterns(subfolder), subfolder=subfolder
    )
    seal = sealed.read(folder)
    config, given = peft_files.read(folder)
    refuse_other_shape(model, config, given, where=str(model_id))
    sealing.check_base(seal, model, where=str(model_id))
    return Fetched(config, given, seal)


def patterns(subfolder: str | None) -> list[str]:
    """What to download of a hub repository: nothing but the adapter."""
    return [f"{subfolder}/{p}" if subfolder else p for p in (*peft_files.PATTERNS, sealed.SEAL)]


def fill(model: PeftModel, name: str, read: Fetched, *, where: str) -> None:
    """Put a file's tensors into adapter `name`. Raises AdapterError unless they and the sealed scale fit exactly."""
    sealing.check_scale(read.seal, model, name, where=where)
    given = _named_as_ours(read.tensors)
    given = _without_tables(model, given, where=where)
    expected = tensors(model, name)
    given = _without_tied_copies(model, name, given)
    peft_files.match(expected, given, where=where)
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise AdapterError(
                f"{key} of {where} has another shape",
                got=f"{tuple(tensor.shape)}, where the model needs {tuple(expected[key].shape)}",
                fix="The adapter is for another base model, or its configuration (r, rank_pattern) was edited.",
            )
    sealing.check_tensors(read.seal, read.tensors, where=where)  # after what can be said in more detail
    biases = _bias_values(model, name, given)
    for layer_name, layer in model._carriers[name].items():
        own = {k.removeprefix(f"{layer_name}."): t for k, t in given.items() if k.startswith(f"{layer_name}.")}
        if isinstance(layer, Adapted):
            _fill_adapted(layer, name, own)
        elif isinstance(layer, ReplacedModule):
            layer.modules_to_save[name].load_state_dict(own)
        elif isinstance(layer, TokenRows):
            with torch.no_grad():
                layer.rows_of(name).copy_(own[TOKEN_ROWS])
    if biases:
        model.biases.load(name, biases)
    model.seals[name] = read.seal


def _fill_adapted(layer: Adapted, name: str, own: dict[str, Tensor]) -> None:
    adapter = layer.adapters[name]
    if isinstance(adapter, ResidualLoRA):
        raise AdapterError(
            "a PiSSA or OLoRA adapter in training cannot take a file's tensors", fix="Load it under a new name."
        )
    for part, parameter in adapter.saved().items():
        value = own[part].to(parameter.dtype)
        if parameter.device.type == "meta":
            _materialize(layer, name, part, value.to(layer.base.device))
        else:
            with torch.no_grad():
                parameter.copy_(value)


def _materialize(layer: Adapted, name: str, part: str, value: Tensor) -> None:
    """Put a real parameter where one was made on the meta device; the file's own memory is used as it is."""
    kind = part.removesuffix(".weight")
    home = getattr(layer, kind)
    if isinstance(home, nn.ParameterDict):
        home[name] = nn.Parameter(value)
    else:
        home[name].weight = nn.Parameter(value)


def _named_as_ours(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT has written DoRA's magnitude with and without `.weight`."""
    return {(k.removesuffix(".weight") if k.endswith(f"{MAGNITUDE}.weight") else k): t for k, t in given.items()}


def _without_tables(model: PeftModel, given: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Drop copies of the base's embeddings that PEFT adds to a file, after checking that they are the base's."""
    base = model.get_base_model()
    kept: dict[str, Tensor] = {}
    for key, tensor in given.items():
        layer_name, _, end = key.rpartition(".base_layer.")
        layer = base.get_submodule(layer_name) if end == "weight" else None
        if not isinstance(layer, Adapted):
            kept[key] = tensor
        elif tensor.shape != layer.weight.shape or not torch.equal(tensor.to(layer.weight), layer.weight):
            raise AdapterError(
                f"{where} brings its own table for {layer_name!r}, which is not this base's",
                got=tuple(tensor.shape),
                fix="Load the base that it was trained on (with its resized vocabulary).",
            )
    return kept


def _without_tied_copies(model: PeftModel, name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the head's copy of a tied pair's factors, which PEFT saves on both sides."""
    tied = [
        n
        for n, layer in model._carriers[name].items()
        if isinstance(layer, Adapted) and isinstance(layer.adapters[name], TiedLoRA)
    ]
    return {k: t for k, t in given.items() if not any(k.startswith(f"{n}.lora_") for n in tied)}


def _bias_values(model: PeftModel, name: str, given: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    names = {n: p for n, p in model.get_base_model().named_parameters(remove_duplicate=False)}
    own = set(model.biases.trainable(name))
    return {names[k]: t for k, t in given.items() if k in names and names[k] in own}


def refuse_other_shape(model: nn.Module, config: LoraConfig, given: Mapping[str, Tensor], *, where: str) -> None:
    """Raise AdapterError early, with the two sizes, where the file's factors are for layers of other sizes."""
    base = config.base_model_name_or_path
    fix = f"Load it on its own base{f' ({base})' if base else ''}."
    for key, tensor in given.items():
        layer_name, _, end = key.rpartition(".lora_A.")
        if end != "weight":
            continue
        try:
            layer = targets.original(model.get_submodule(layer_name))
        except AttributeError:
            raise AdapterError(
                f"{where} adapts {layer_name!r}, which this model has not",
                got=type(model).__name__,
                fix=fix,
            ) from None
        size = getattr(layer, "in_features", None)
        if isinstance(size, int) and tensor.dim() == 2 and tensor.shape[1] != size:
            raise AdapterError(
                f"{where} is for another base: {layer_name!r} takes {size} features here",
                got=f"{tensor.shape[1]} in the file",
                fix=fix,
            )


def refuse_other_change(held: LoraConfig, read: LoraConfig, *, where: str) -> None:
    """Raise AdapterError where a file's factors would mean another change under the configuration that is held."""
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        mine, other = getattr(held, key), getattr(read, key)
        if mine != other:
            raise AdapterError(
                f"{where} was trained with another {key} than the adapter of this name",
                got=f"{other}, where the model has {mine}",
                fix="Load it under a new name, or delete_adapter first.",
            )


def selected(chosen: Sequence[str] | None, loaded: Iterable[str]) -> list[str]:
    """Return the names of the adapters to save (None: all); raise AdapterError for no name and for unknown ones."""
    names = list(loaded)
    if chosen is None:
        return names
    if isinstance(chosen, str) or not chosen:
        raise AdapterError(
            "selected_adapters must be a list of one or more adapters' names",
            got=repr(chosen),
            fix=f"Loaded are {', '.join(names)}; leave selected_adapters out to save all.",
        )
    for name in chosen:
        inject.check_known(name, names)
    return list(chosen)


def refuse_foreign_state(model: PeftModel, state: Mapping[str, Tensor] | None) -> None:
    """Raise Unsupported for a gathered copy of the state: decal would save its own tensors, not those."""
    if state is None:
        return
    own = dict(model.named_parameters())
    for key, tensor in state.items():
        if key in own and own[key].data_ptr() != tensor.data_ptr():
            raise Unsupported(
                "save_pretrained got a state_dict that is not this model's own (a sharded run?)",
                got=key,
                fix="Train with decal.train, or save from the unsharded model.",
            )


def say_untied(model: nn.Module) -> None:
    """If the head no longer equals the embedding, let the configuration say so: a reload would tie them again."""
    head, get = targets.output_head(model), getattr(model, "get_input_embeddings", None)
    settings = getattr(model, "config", None)
    if head is None or get is None or not getattr(settings, "tie_word_embeddings", False):
        return
    if head.weight is not get().weight:
        assert settings is not None
        settings.tie_word_embeddings = False
