"""Put one adapter into a model: wrap the layers that it names, and make its tensors or leave room for a file's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Generator, nn

from decal.errors import AdapterError, TargetError, Unsupported, nearest
from decal.layers.adapted import Adapted, AdaptedLinear
from decal.layers.catalog import ADAPTERS, EMBEDDING_ADAPTERS, adapter_kind, base_of
from decal.layers.coded import CodedLinear
from decal.layers.embedding import AdaptedEmbedding, EmbeddingLoRA, TiedLoRA
from decal.layers.lora import LoRA
from decal.layers.replaced import ReplacedModule
from decal.layers.routing import BASE, Switch
from decal.layers.seams import Base
from decal.layers.tokens import TiedTokenRows, TokenRows
from decal.model import targets
from decal.model.targets import Target, original
from decal.spec import LoraConfig, TaskType

Wrapper = Adapted | ReplacedModule | TokenRows
Wrapping = TypeVar("Wrapping", bound=Adapted | ReplacedModule | TokenRows | TiedTokenRows)
TIE = (
    "Set ensure_weight_tying=True to adapt both, or untie them (config.tie_word_embeddings=False and a copy of the "
    "weight)."
)


@dataclass(kw_only=True)
class Injection:
    """One adapter on its way into a model. `run` returns the layers that then carry it, by full name.

    With `init=False` the factors stay on the meta device, to be filled from a file; what PEFT would have passed over
    in its configuration is then passed over, too. Adapters of 16-bit weights are fp32 unless `fp32_adapters` is off.
    Nothing in the model is changed before all targets have been checked.
    """

    model: nn.Module
    config: LoraConfig
    name: str
    switch: Switch
    generator: Generator | None = None
    fp32_adapters: bool = True
    init: bool = True
    strict: bool = True
    notes: tuple[str, ...] = ()
    layers: dict[str, Wrapper] = field(default_factory=dict)

    def run(self) -> dict[str, Wrapper]:
        resolved = targets.resolve(self.model, self.config, strict=self.strict, fresh=self.init)
        self.notes = resolved.notes
        tied = tied_pair(self.model)
        tokens = self._token_targets()
        self._check(resolved, tied, tokens)
        before = dict(targets.modules(self.model))
        try:
            self._inject(resolved, tied, tokens)
        except Exception:
            self._undo(before)
            raise
        return self.layers

    def _inject(
        self, resolved: targets.Resolved, tied: tuple[str, str] | None, tokens: dict[str, tuple[int, ...]]
    ) -> None:
        for target in resolved.targets:
            if tied is None or target.name not in tied:
                self._adapt(target)
        if tied is not None and any(t.name in tied for t in resolved.targets):
            self._adapt_tied(tied, next(t for t in resolved.targets if t.name in tied))
        for name in resolved.replaced:
            self._replace(name, tied)
        for name, indices in tokens.items():
            self._train_rows(name, indices, tied)

    def _undo(self, before: dict[str, nn.Module]) -> None:
        """Leave the model as it was."""
        for name, module in list(targets.modules(self.model)):
            if module is not before[name]:
                unwrap_layer(self.model, name, before[name])
            elif isinstance(module, Wrapper):
                module.remove(self.name)

    # Checks, before anything is changed.

    def _check(
        self, resolved: targets.Resolved, tied: tuple[str, str] | None, tokens: dict[str, tuple[int, ...]]
    ) -> None:
        whole = _all_meta(self.model)
        for target in resolved.targets:
            weight = original(self.model.get_submodule(target.name)).weight
            if weight.device.type == "meta" and not whole:
                raise TargetError(
                    f"{target.name!r} is offloaded (its weight is on the meta device)",
                    fix="Load the model without offloading: a device_map that fits, or a smaller model.",
                )
        self._refuse_coded_head(resolved)
        if tied is not None and not self.config.ensure_weight_tying:
            for kind, names in (
                ("target_modules", [t.name for t in resolved.targets]),
                ("modules_to_save", resolved.replaced),
            ):
                if hit := [name for name in names if name in tied]:
                    raise TargetError(f"{kind} names {hit}, which shares its weight with {_other(tied, hit)}", fix=TIE)
        if self.config.use_dora and self.config.init_lora_weights in ("pissa", "olora"):
            raise Unsupported(
                "use_dora with a PiSSA or OLoRA start has no saved form that other readers apply",
                fix="Use init_lora_weights=True with DoRA.",
            )
        for name in tokens:
            if any(t.name == name for t in resolved.targets) or name in resolved.replaced:
                raise Unsupported(
                    f"{name!r} is both a target and under trainable_token_indices", fix="Choose one of the two."
                )

    def _refuse_coded_head(self, resolved: targets.Resolved) -> None:
        """Raise Unsupported if a head that is decoded slab by slab is to be adapted or trained."""
        head = targets.output_head(self.model)
        if not (isinstance(head, CodedLinear) and head.in_slabs):
            return
        for kind, names in (
            ("target_modules", [t.name for t in resolved.targets]),
            ("modules_to_save", resolved.replaced),
        ):
            if hit := [n for n in names if any(m is head for m in original(self.model.get_submodule(n)).modules())]:
                raise Unsupported(
                    f"{kind} reaches the output head, which is stored in codes and stays frozen",
                    got=", ".join(hit),
                    fix="Leave quantize.head out, or leave the head out of the adapter.",
                )

    # Linear layers and embeddings.

    def _adapt(self, target: Target) -> Adapted:
        layer = self.model.get_submodule(target.name)
        if not isinstance(layer, Adapted):
            base = base_of(layer)
            wrapper = AdaptedEmbedding(layer, self.switch) if base is None else AdaptedLinear(layer, base, self.switch)
            layer = wrap(self.model, target.name, wrapper)
        layer.add(self.name, self._adapter(layer.base, target, embedding=isinstance(layer, AdaptedEmbedding)))
        self.layers[target.name] = layer
        return layer

    def _adapter(self, base: Base, target: Target, *, embedding: bool) -> LoRA:
        table = EMBEDDING_ADAPTERS if embedding else ADAPTERS
        kind = adapter_kind(self.config)
        if kind not in table:
            raise Unsupported(
                f"init_lora_weights={self.config.init_lora_weights!r} does not apply to the embedding {target.name!r}",
                fix="Leave the embedding out of target_modules, or use init_lora_weights=True.",
            )
        dtype = self._dtype(base.dtype)
        adapter = table[kind](base, self.config, rank=target.rank, alpha=target.alpha, dtype=dtype)
        if self.init and base.device.type != "meta":
            adapter.init(base, self.config, self.generator)
        return adapter

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        if stored == torch.float64 or (stored.is_floating_point and stored.itemsize > 1 and not self.fp32_adapters):
            return stored
        return torch.float32

    def _adapt_tied(self, tied: tuple[str, str], asked: Target) -> None:
        """Adapt the embedding and let the head follow: one change, two sides."""
        embedding_name, head_name = tied
        embedding = self._adapt(Target(name=embedding_name, rank=asked.rank, alpha=asked.alpha))
        owner = embedding.adapters[self.name]
        if not isinstance(owner, EmbeddingLoRA) or self.config.use_dora:
            raise Unsupported("DoRA on a tied pair", fix="Use plain LoRA there, or untie the pair.")
        head = self.model.get_submodule(head_name)
        if not isinstance(head, AdaptedLinear):
            base = base_of(head)
            assert base is not None, "a head that shares an embedding's weight is a Linear"
            head = wrap(self.model, head_name, AdaptedLinear(head, base, self.switch))
        head.add(self.name, TiedLoRA(owner, self.config.lora_dropout))
        self.layers[head_name] = head

    # What is not a low-rank change.

    def _replace(self, name: str, tied: tuple[str, str] | None) -> None:
        module = self.model.get_submodule(name)
        if not isinstance(module, ReplacedModule):
            module = wrap(self.model, name, ReplacedModule(module, self.switch))
        module.add(self.name)
        self.layers[name] = module
        if tied is not None and name in tied:
            other_name = _other(tied, [name])
            other = self.model.get_submodule(other_name)
            if not isinstance(other, ReplacedModule):
                other = wrap(self.model, other_name, ReplacedModule(other, self.switch))
            other.add(self.name, tied_to=module.modules_to_save[self.name])
            self.layers[other_name] = other

    def _token_targets(self) -> dict[str, tuple[int, ...]]:
        """Return {embedding's full name: token ids}; a bare list of ids means the input embedding."""
        wanted = self.config.trainable_token_indices
        if wanted is None:
            return {}
        found = dict(targets.modules(self.model))
        if isinstance(wanted, list):
            embedding = original(self.model.get_input_embeddings())  # type: ignore[operator]  # transformers' method
            return {next(n for n, m in found.items() if original(m) is embedding): tuple(wanted)}
        chosen: dict[str, tuple[int, ...]] = {}
        for key, ids in wanted.items():
            names = [
                n
                for n, m in found.items()
                if (n == key or n.endswith(f".{key}")) and isinstance(original(m), nn.Embedding)
            ]
            if not names:
                raise TargetError(f"trainable_token_indices {key!r} matched no embedding", fix="Name the embedding.")
            chosen.update(dict.fromkeys(names, tuple(ids)))
        return chosen

    def _train_rows(self, name: str, indices: tuple[int, ...], tied: tuple[str, str] | None) -> None:
        module = self.model.get_submodule(name)
        table = original(module).weight
        assert isinstance(table, torch.Tensor), "an embedding has a table"
        if not indices or min(indices) < 0 or max(indices) >= table.shape[0]:
            raise AdapterError(
                "trainable_token_indices must be ids of the vocabulary",
                got=indices,
                fix=f"Use 0 to {table.shape[0] - 1}.",
            )
        if not isinstance(module, TokenRows):
            module = wrap(self.model, name, TokenRows(module, self.switch))
        module.add(self.name, indices, self._dtype(table.dtype))
        self.layers[name] = module
        if tied is not None and name == tied[0]:
            head = self.model.get_submodule(tied[1])
            if not isinstance(head, TiedTokenRows):
                wrap(self.model, tied[1], TiedTokenRows(head, module))


def check_new(name: str, config: LoraConfig, *, taken: Iterable[str]) -> None:
    """Raise AdapterError for a name that cannot be an adapter's, Unsupported for a task that decal has not."""
    if name in taken:
        raise AdapterError(f"there is already an adapter {name!r}", fix="Choose another name, or delete_adapter first.")
    if not name or "." in name or name == BASE or hasattr(nn.ModuleDict(), name):  # "keys", "training", ...
        raise AdapterError(
            "an adapter's name must be a word without dots that torch's containers do not use themselves",
            got=repr(name),
            fix="Choose another name.",
        )
    if name != name.strip() or not name.isprintable() or any(separator in name for separator in "/\\"):
        raise AdapterError(
            "an adapter's name is also the name of the folder that it is saved in, so it must be one plain name",
            got=repr(name),
            fix="Leave out slashes, control characters and spaces at its ends, for example "
            f"{re.sub(r'[^0-9A-Za-z_-]+', '-', name).strip('-') or 'second'!r}.",
        )
    if config.task_type not in (None, TaskType.CAUSAL_LM, TaskType.SEQ_CLS):
        raise Unsupported(
            f"decal does not adapt models for {config.task_type}", fix="Use CAUSAL_LM or SEQ_CLS, or PEFT itself."
        )


def check_known(name: str, loaded: Iterable[str]) -> None:
    """Raise AdapterError for a name that no loaded adapter has."""
    if name not in (names := list(loaded)):
        raise AdapterError(f"no adapter is named {name!r}{nearest(name, names)}", fix=f"Loaded are {', '.join(names)}.")


def check_choice(chosen: str | Sequence[str], loaded: Iterable[str]) -> tuple[str, ...]:
    """Return the names of one or several adapters; raise AdapterError for none, for unknown ones and for one twice."""
    names = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    for name in names:
        check_known(name, loaded)
    if not names or len(set(names)) < len(names):
        raise AdapterError(
            "the active adapters must be one or more, each once",
            got=list(names),
            fix="Use disable_adapter() for none; an adapter counts twice with twice the lora_alpha.",
        )
    return names


def unwrap_empty(model: nn.Module) -> None:
    """Put the original layers back where no adapter is left."""
    for name, module in list(targets.modules(model)):
        if _is_empty(module):
            unwrap_layer(model, name, original(module))


def _is_empty(module: nn.Module) -> bool:
    if isinstance(module, Adapted):
        return not module.adapters
    if isinstance(module, ReplacedModule):
        return not len(module.modules_to_save)
    rows = module.rows if isinstance(module, TiedTokenRows) else module
    return isinstance(rows, TokenRows) and not rows.token_adapter.indices


def wrap(model: nn.Module, name: str, wrapper: Wrapping) -> Wrapping:
    """Put `wrapper` in the place of the module `name`; accelerate's hooks move to it. Returns the wrapper."""
    layer = model.get_submodule(name)
    _move_hook(layer, wrapper)
    wrapper.train(layer.training)
    place(model, name, wrapper)
    return wrapper


def unwrap_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` back in the place of the wrapper `name`, accelerate's hooks with it."""
    _move_hook(model.get_submodule(name), layer)
    place(model, name, layer)


def _move_hook(source: nn.Module, to: nn.Module) -> None:
    hook = getattr(source, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(source)
        add_hook_to_module(to, hook)


def place(model: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    """Make `module` the submodule (or parameter) `name` of `model`."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if child in owner._parameters:
        delattr(owner, child)  # torch refuses a module under a parameter's name
    setattr(owner, child, module)


def tied_pair(model: nn.Module) -> tuple[str, str] | None:
    """Return the full names of the input embedding and the output head if they share one weight, else None."""
    found = {id(original(m)): n for n, m in targets.modules(model)}
    get = getattr(model, "get_input_embeddings", None)
    embedding = original(get()) if get else None
    head = targets.output_head(model)
    if head is None or embedding is None or id(embedding) not in found or id(head) not in found:
        return None
    if getattr(head, "weight", None) is not getattr(embedding, "weight", 0):
        return None
    return found[id(embedding)], found[id(head)]


def _other(tied: tuple[str, str], names: list[str]) -> str:
    return tied[1] if names[0] == tied[0] else tied[0]


def _all_meta(model: nn.Module) -> bool:
    return all(p.device.type == "meta" for p in model.parameters())
