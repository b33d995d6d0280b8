"""Which layers an adapter's configuration names: what matched, what did not, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from decal.errors import TargetError, nearest
from decal.layers.adapted import Adapted
from decal.layers.catalog import base_of
from decal.layers.coded_experts import CodedExperts
from decal.layers.replaced import ReplacedModule
from decal.layers.tokens import TiedTokenRows, TokenRows
from decal.model.default_targets import DEFAULT_TARGETS
from decal.spec import LoraConfig, TaskType

Number = TypeVar("Number", int, float)
ALL_LINEAR, ATTENTION = "all-linear", "attention"
HEADS = {TaskType.SEQ_CLS: ("classifier", "score")}  # what PEFT saves whole for a task


@dataclass(frozen=True, kw_only=True)
class Target:
    """One layer to adapt, with the rank and alpha that the patterns give it."""

    name: str
    rank: int
    alpha: float


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What a configuration means for one model."""

    targets: tuple[Target, ...]
    replaced: tuple[str, ...]  # modules_to_save, by full name
    notes: tuple[str, ...] = ()


def original(module: nn.Module) -> nn.Module:
    """Return the module as it was before any adapter."""
    if isinstance(module, (Adapted, TiedTokenRows)):
        return module.base_layer
    if isinstance(module, ReplacedModule):
        return module.original_module
    if isinstance(module, TokenRows):
        return module.token_adapter.base_layer
    return module


def modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's modules by name as if no adapter were there: nothing inside a wrapped layer.

    Coded experts stand for a parameter, so that they are no module here.
    """
    for name, child in model.named_children():
        if isinstance(child, CodedExperts):
            continue
        full = f"{prefix}{name}"
        yield full, child
        if original(child) is child:
            yield from modules(child, f"{full}.")


def adaptable(module: nn.Module) -> bool:
    """Whether decal knows how to adapt this layer (as it was before any adapter)."""
    layer = original(module)
    return base_of(layer) is not None or isinstance(layer, nn.Embedding)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the model's output head, as it was before any adapter."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get else None
    return original(head) if isinstance(head, nn.Module) else None


def resolve(model: nn.Module, config: LoraConfig, *, strict: bool = True, fresh: bool = True) -> Resolved:
    """Return the layers that `config` names in `model`.

    Raises TargetError if nothing matches, if something matched cannot be adapted, or (strict) if one pattern of
    several matches nothing; the nearest name is offered. `fresh` asks the same of what PEFT passes over in silence
    and a saved adapter may therefore hold: exclude_modules, layers_to_transform, rank_pattern and alpha_pattern.
    """
    found = dict(modules(model))
    notes: list[str] = []
    targets = config.target_modules
    if targets is None and not config.target_parameters:
        targets, note = _default(model)
        notes.append(note)
    if config.target_parameters:
        raise TargetError(
            "decal does not adapt bare parameters (target_parameters) yet",
            got=config.target_parameters,
            fix="Adapt the linear layers, for example target_modules='all-linear'; or use PEFT for this adapter.",
        )
    if strict and fresh:
        _refuse_unused_names(found, config)
    replaced = _replaced(found, config, strict=strict)
    names = [] if targets is None else _matching(model, found, targets, config, strict=strict)
    names = [name for name in names if not any(name == r or name.startswith(f"{r}.") for r in replaced)]
    if targets is not None and not names:
        raise TargetError(
            "target_modules matched no layer that can be adapted",
            got=repr(targets),
            fix=f"This model has {', '.join(_suffixes(found))}. Run: decal targets MODEL.",
        )
    for name in names:
        _refuse_unknown(name, found[name])
    if strict and fresh:
        _refuse_unused_patterns(names, config)
    if targets == ALL_LINEAR and (experts := _expert_parameters(model)):
        notes.append(
            f"'all-linear' does not reach {', '.join(experts)}: these hold several experts in one tensor, which "
            "decal does not adapt yet"
        )
    chosen = tuple(
        Target(
            name=name,
            rank=_by_pattern(config.rank_pattern, name, config.r),
            alpha=_by_pattern(config.alpha_pattern, name, config.lora_alpha),
        )
        for name in names
    )
    return Resolved(targets=chosen, replaced=replaced, notes=tuple(notes))


def _expert_parameters(model: nn.Module) -> list[str]:
    """The last two names of all weights that hold a matrix for each expert, each once."""
    names = [n for n, p in model.named_parameters() if p.dim() == 3 and "lora_" not in n]
    names += [n for n, m in model.named_modules() if isinstance(m, CodedExperts)]
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def _default(model: nn.Module) -> tuple[list[str], str]:
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if kind not in DEFAULT_TARGETS:
        raise TargetError(
            "target_modules is not set, and there is no default for this architecture",
            got=kind or type(model).__name__,
            fix="Set target_modules='all-linear'.",
        )
    names = list(DEFAULT_TARGETS[kind])
    return names, (
        f"target_modules is not set: adapting {', '.join(names)}, PEFT's choice for {kind}; "
        "target_modules='all-linear' usually learns more"
    )


def _matching(
    model: nn.Module, found: dict[str, nn.Module], targets: list[str] | str, config: LoraConfig, *, strict: bool
) -> list[str]:
    if targets == ALL_LINEAR:
        heads = {id(output_head(model))}
        names = [n for n, m in found.items() if base_of(original(m)) is not None and id(original(m)) not in heads]
        skip = HEADS.get(config.task_type, ()) if config.task_type else ()
        names = [n for n in names if n.rpartition(".")[2] not in skip]
    elif targets == ATTENTION:
        names = [n for n, m in found.items() if base_of(original(m)) is not None and _in_attention(found, n)]
    elif isinstance(targets, str):
        names = [n for n in found if re.fullmatch(targets, n)]
    else:
        names = [n for n in found if any(_is_suffix(t, n) for t in targets)]
        if strict:
            for t in targets:
                if not any(_is_suffix(t, n) for n in names):
                    raise TargetError(
                        f"target {t!r} matched no layer{nearest(t, _suffixes(found))}",
                        fix=f"This model has {', '.join(_suffixes(found))}. Run: decal targets MODEL.",
                    )
    names = [n for n in names if not _excluded(n, config.exclude_modules)]
    if config.layers_to_transform is not None:
        names = [n for n in names if _in_layers(n, config)]
    return names


def _is_suffix(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _excluded(name: str, exclude: list[str] | str | None) -> bool:
    if exclude is None:
        return False
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return any(_is_suffix(e, name) for e in exclude)


def _in_layers(name: str, config: LoraConfig) -> bool:
    """Whether the layer number in `name` is chosen; the number follows one of layers_pattern (default: any name)."""
    wanted = config.layers_to_transform
    number = _layer_number(name, config.layers_pattern)
    return number == wanted if isinstance(wanted, int) else number in (wanted or [])


def _layer_number(name: str, layers_pattern: list[str] | str | None) -> int | None:
    patterns = layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:.*\.)?{pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(1))
    return None


def _refuse_unused_names(found: dict[str, nn.Module], config: LoraConfig) -> None:
    """Raise TargetError for an exclude_modules that matches no module, and for a layer number that none has."""
    exclude = config.exclude_modules or []
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        whole = isinstance(exclude, str)
        if not any(_excluded(n, entry if whole else [entry]) for n in found):
            near = nearest(entry, dict.fromkeys((*_suffixes(found), *found)))
            said = ", taken as a regular expression for whole names," if whole else ""
            raise TargetError(
                f"exclude_modules {entry!r}{said} matched no module, so it would leave nothing out{near}",
                fix=f"Use a list of names, exclude_modules=[{entry!r}], or begin the pattern with '.*'."
                if whole and any(_is_suffix(entry, n) for n in found)
                else f"This model has {', '.join(_suffixes(found))}. Run: decal targets MODEL.",
            )
    wanted = config.layers_to_transform
    there = sorted({number for n in found if (number := _layer_number(n, config.layers_pattern)) is not None})
    missing = [] if wanted is None else [n for n in ([wanted] if isinstance(wanted, int) else wanted) if n not in there]
    if missing:
        near = ", ".join(dict.fromkeys(m.group(1) for n in found if (m := re.match(r"(?:.*\.)?([^.]*)\.\d+\.", n))))
        raise TargetError(
            f"layers_to_transform names {_listed(missing)}, and this model has no layer of that number",
            got=None if config.layers_pattern is None else f"layers_pattern={config.layers_pattern!r}",
            fix=f"There are layers {_listed(there)}."
            if there
            else f"Layers are numbered under {near or 'no name'} here.",
        )


def _refuse_unused_patterns(names: list[str], config: LoraConfig) -> None:
    """Raise TargetError for a key of rank_pattern or alpha_pattern that matches none of the adapted layers."""
    ends = list(dict.fromkeys(n.rpartition(".")[2] for n in names))
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            try:
                re.compile(key)
            except re.error as error:
                raise TargetError(f"{field} {key!r} is no pattern ({error})", fix="Give a name, or mend it.") from None
            if not any(_by_pattern({key: 1}, n, 0) for n in names):
                raise TargetError(
                    f"{field} {key!r} matched no adapted layer{nearest(key, (*ends, *names))}",
                    fix=f"Adapted are {', '.join(ends)}; a key is the end of a layer's name, or a pattern for it.",
                )


def _listed(numbers: list[int]) -> str:
    """Numbers for a person: a range where none is left out."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(str(number) for number in numbers)


def _in_attention(found: dict[str, nn.Module], name: str) -> bool:
    """Whether the layer is a direct part of a module whose class is an attention (a projection of q, k, v or o)."""
    parent = found.get(name.rpartition(".")[0])
    return parent is not None and "attention" in type(parent).__name__.lower()


def _by_pattern(pattern: dict[str, Number], name: str, default: Number) -> Number:
    """Return the value of the first pattern that matches the end of `name`, PEFT's rule."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _replaced(found: dict[str, nn.Module], config: LoraConfig, *, strict: bool) -> tuple[str, ...]:
    wanted = list(config.modules_to_save or [])
    heads = HEADS.get(config.task_type, ()) if config.task_type else ()
    # PEFT's rule for these, unlike targets: the bare end of the name ("norm" is also "input_layernorm").
    names = tuple(n for n in found if n.endswith((*wanted, *heads)))
    for w in wanted:
        if strict and w not in heads and not any(n.endswith(w) for n in names):
            ends = sorted({n.rpartition(".")[2] for n in found})
            raise TargetError(f"modules_to_save {w!r} matched no module{nearest(w, ends)}", fix="Correct the name.")
    return names


def _suffixes(found: dict[str, nn.Module]) -> list[str]:
    """The last names of all layers that can be adapted, each once."""
    return list(dict.fromkeys(n.rpartition(".")[2] for n, m in found.items() if adaptable(m)))


def _refuse_unknown(name: str, module: nn.Module) -> None:
    if adaptable(module):
        return
    layer = original(module)
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    raise TargetError(
        f"{name!r} matched a layer that decal cannot adapt",
        got=kind,
        fix="decal adapts nn.Linear, Conv1D (GPT-2) and nn.Embedding; name layers of these kinds.",
    )
