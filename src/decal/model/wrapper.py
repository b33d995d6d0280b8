"""PeftModel: a transformers model with named adapters, under PEFT's names and with PEFT's meaning."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from decal import rundir
from decal.errors import AdapterError, DecalError, Unsupported
from decal.files import hub, peft_files, sealed
from decal.layers.adapted import Adapted
from decal.layers.coded import uncounted
from decal.layers.routing import Routing, Switch, rows_of
from decal.model import foreign, generate, merging, quantized, recompute, saved, sealing
from decal.model.adapters import Adapters
from decal.model.biases import TrainedBiases
from decal.model.inject import Injection, Wrapper, check_choice, check_known, check_new, unwrap_empty
from decal.spec import LoraConfig


class PeftModel(nn.Module):
    """A model whose frozen weights carry named, switchable changes. People make one with `decal.get_peft_model`."""

    peft_type = "LORA"

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        quantized.adopt(model)
        if isinstance(model, PeftModel) or any(isinstance(m, Adapted) for m in model.modules()):
            raise DecalError(
                "the model already has adapters", fix="Use model.add_adapter(name, config), or unload first."
            )
        self.base_model = Adapters(model)
        self.frozen_before = [p for p in model.parameters() if not p.requires_grad]
        self.switch = Switch()
        self.biases = TrainedBiases()
        self.peft_config: dict[str, LoraConfig] = {}
        self.notes: list[str] = []
        self.seals: dict[str, sealed.Seal] = {}  # of adapters that were read
        self._carriers: dict[str, dict[str, Wrapper]] = {}
        init = not low_cpu_mem_usage
        self._add(adapter_name, peft_config, generator=generator, fp32=autocast_adapter_dtype, init=init)
        model.requires_grad_(False)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    # Adding and choosing adapters.

    def _add(
        self,
        name: str,
        config: LoraConfig,
        *,
        generator: Generator | None = None,
        fp32: bool = True,
        init: bool = True,
        strict: bool = True,
    ) -> None:
        self._refuse_merged()
        check_new(name, config, taken=self.peft_config)
        model = self.get_base_model()
        source = config.base_model_name_or_path or getattr(model, "name_or_path", None) or None
        injection = Injection(
            model=model,
            config=config,
            name=name,
            switch=self.switch,
            generator=generator,
            fp32_adapters=fp32,
            init=init,
            strict=strict,
        )
        self._carriers[name] = injection.run()
        self.notes += injection.notes
        self.biases.add(model, config, name)
        self.peft_config[name] = config.model_copy(update={"base_model_name_or_path": source}, deep=True)
        for parameter in self._trainable(name):
            parameter.requires_grad_(False)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        generator: Generator | None = None,
    ) -> None:
        """Add a new, untrained adapter; it is not made the active one."""
        init = not low_cpu_mem_usage
        self._add(adapter_name, peft_config, generator=generator, fp32=autocast_adapter_dtype, init=init)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter (or several, whose changes are summed) the active one; only active adapters train."""
        names = check_choice(adapter_name, self.peft_config)
        self._refuse_merged()
        self.biases.use(names)
        for name in self.switch.active:
            for parameter in self._trainable(name):
                parameter.requires_grad_(False)
        self.switch.active = names
        for name in names:
            for parameter in self._trainable(name):
                parameter.requires_grad_(not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, the first remaining one becomes active."""
        check_known(adapter_name, self.peft_config)
        self._refuse_merged()
        if len(self.peft_config) == 1:
            raise AdapterError(f"{adapter_name!r} is the only adapter", fix="Use unload() to get the plain model back.")
        was = self.switch.active
        self.biases.remove(adapter_name)
        for layer in self._carriers.pop(adapter_name).values():
            layer.remove(adapter_name)
        unwrap_empty(self.get_base_model())
        del self.peft_config[adapter_name]
        self.seals.pop(adapter_name, None)
        remaining = [name for name in was if name != adapter_name] or [next(iter(self.peft_config))]
        self.switch.active = tuple(name for name in was if name != adapter_name)
        self.set_adapter(remaining)

    def _refuse_merged(self) -> None:
        if self.switch.merged:
            raise DecalError(f"adapters {self.switch.merged} are merged", fix="Call unmerge_adapter() first.")

    def _trainable(self, name: str) -> list[nn.Parameter]:
        own = [p for layer in self._carriers[name].values() for p in layer.trainable(name)]
        return own + self.biases.trainable(name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Use the base alone inside the block."""
        self._refuse_merged()
        with self.switch.off(), self.biases.parked():
            yield

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switch.active)

    @property
    def active_adapter(self) -> str:
        """The active adapter; the first where several are active."""
        return self.switch.active[0]

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config[self.active_adapter]

    def add_weighted_adapter(self, *args: object, **kwargs: object) -> None:
        """PEFT's method, which decal has not: its `linear` is not the sum, and rsLoRA and DoRA come out wrong."""
        raise Unsupported(
            "decal does not combine adapters into a new one",
            got="add_weighted_adapter",
            fix="set_adapter([a, b]) applies the exact sum of their changes.",
        )

    # Running.

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model; with `adapter_names` each row of the batch uses its own adapter ("__base__" for none)."""
        if kwargs.get("fused_lm_head"):  # TRL's trainers: they multiply by the head's weight themselves
            foreign.refuse_fused_head(self.get_base_model())
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        with self.routed(Routing.by_row(adapter_names, rows=rows_of(args, kwargs))):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate; with `adapter_names` each prompt uses its own adapter, and so do its beams and returns."""
        model = self.get_base_model()
        if adapter_names is None:
            return model.generate(*args, **kwargs)  # type: ignore[operator]  # transformers' method
        routing = Routing.by_row(adapter_names, rows=rows_of(args, kwargs))
        with self.routed(routing.expand(generate.rows_per_prompt(model, kwargs))):
            return model.generate(*args, **kwargs)  # type: ignore[operator]  # transformers' method

    @contextmanager
    def routed(self, routing: Routing) -> Iterator[None]:
        """Use `routing` inside the block. Raises AdapterError for names that are not loaded."""
        for name in routing.adapters:
            check_known(name, self.peft_config)
            if self.biases.has(name):
                raise Unsupported(
                    f"adapter {name!r} has trained biases, which cannot be routed within a batch",
                    fix="Use it alone: set_adapter(name), without adapter_names.",
                )
        self._refuse_merged()
        with self.switch.routed(routing), self.biases.parked():
            yield

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in backward (non-reentrant), with the adapters and routing that were in force at forward."""
        given = activation_checkpointing_kwargs or {}
        recompute.enable(self.get_base_model(), self.switch, given, every_n_layers=every_n_layers, offload=offload)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **others: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **others)

    def enable_input_require_grads(self) -> None:
        """Let the embedding's output need a gradient, without which checkpointed layers would train nothing."""
        self.get_base_model().enable_input_require_grads()  # type: ignore[operator]  # transformers' method

    # Merging.

    @torch.no_grad()
    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write the changes of the active (or the named) adapters into the base weights, each rounded once.

        The base weights are kept, so that `unmerge_adapter` restores their very bits. `safe_merge` is PEFT's word for
        the check for NaN that decal always makes.
        """
        names = tuple(adapter_names or self.switch.active)
        for name in names:
            check_known(name, self.peft_config)
        merging.merge(self, names)

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit."""
        merging.unmerge(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge and return the plain transformers model; this PeftModel must not be used afterwards."""
        if not self.switch.merged:
            self.merge_adapter(adapter_names, safe_merge=safe_merge)
        merging.forget_originals(self)
        return merging.unwrap(self, self.switch.merged)

    def unload(self) -> nn.Module:
        """Return the plain model without any adapter; this PeftModel must not be used afterwards."""
        if self.switch.merged:
            self.unmerge_adapter()
        self.biases.use(())
        return merging.unwrap(self, ())

    # Files.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write each adapter in PEFT's format: "default" into the folder itself, others into a subfolder each."""
        if not safe_serialization:
            raise Unsupported("decal never writes pickles", fix="Leave safe_serialization at True.")
        saved.refuse_foreign_state(self, state_dict)
        if not is_main_process:
            return
        for name in saved.selected(selected_adapters, self.peft_config):
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            config = saved.config(self, name)
            with rundir.together(folder, (sealed.SEAL, *reversed(peft_files.PATTERNS))) as new:
                digest = peft_files.write(new, config, saved.tensors(self, name))
                sealed.write(new, sealing.seal_of(self, name, config, tensors=digest))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload adapter",
    ) -> str:
        """Upload the adapters (only the small files) to the hub and return the address of the commit."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(Path(folder), repo_id, private=private, token=token, message=commit_message)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device_map: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
    ) -> PeftModel:
        """Return `model` with a saved adapter on it. Missing, extra, misshapen or NaN tensors raise AdapterError.

        `device_map` and dtypes are PEFT's and change nothing: an adapter lies where its base's weights lie.
        """
        read = saved.fetch(model_id, model, revision=revision, subfolder=subfolder)
        config = saved.for_loading(config or read.config, is_trainable=is_trainable)
        fp32 = autocast_adapter_dtype
        wrapped = PeftModel(model, config, adapter_name, autocast_adapter_dtype=fp32, low_cpu_mem_usage=True)
        try:
            saved.fill(wrapped, adapter_name, read, where=str(model_id))
        except AdapterError:
            wrapped.unload()
            raise
        wrapped.set_adapter(adapter_name, inference_mode=not is_trainable)
        return wrapped if is_trainable else wrapped.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> saved.LoadResult:
        """Load a saved adapter beside the others (or into one of the same name); it does not become active."""
        read = saved.fetch(model_id, self.get_base_model(), revision=revision, subfolder=subfolder)
        config = saved.for_loading(read.config, is_trainable=is_trainable)
        fresh = adapter_name not in self.peft_config
        if fresh:
            self._add(adapter_name, config, fp32=autocast_adapter_dtype, init=False, strict=False)
        else:
            saved.refuse_other_change(self.peft_config[adapter_name], config, where=str(model_id))
        try:
            saved.fill(self, adapter_name, read, where=str(model_id))
        except AdapterError:
            if fresh:
                self.delete_adapter(adapter_name)
            raise
        for parameter in self._trainable(adapter_name):
            parameter.requires_grad_(is_trainable)
        return saved.LoadResult([], [])

    # Counting and delegation.

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (trainable, all) parameters; a weight shared by two layers counts once, codes as weights."""
        parameters = list(self.parameters())
        total = sum(p.numel() for p in parameters) + uncounted(self)
        return sum(p.numel() for p in parameters if p.requires_grad), total

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line of trainable and all parameters."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        line = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        print(line)  # noqa: T201  # printing is what this method of PEFT's is for

    def get_base_model(self) -> nn.Module:
        """Return the transformers model; its adapted layers stay in it until `unload`."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property  # type: ignore[misc]  # to answer with another class is what this property is for
    def __class__(self) -> type:
        """Where PEFT is loaded, `isinstance(model, peft.PeftModel)` holds, too.

        transformers' Trainer and TRL ask this, and nothing finer, to save and to resume adapters alone.
        """
        peft = sys.modules.get("peft")
        foreign: type | None = getattr(peft, "PeftModel", None)
        return type(self) if foreign is None else foreign
