"""Whether a saved adapter, loaded into the same base, is the adapter that was saved."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from decal.checks.result import Check, failed, not_applicable, passed
from decal.checks.untouched import without_dropout
from decal.data import pack
from decal.data.mask import Sample
from decal.errors import DecalError
from decal.model.wrapper import PeftModel
from decal.training.job import Job

NAME = "round trip"
COPY = "decal_check"  # the name under which the saved adapter comes back
STD = 0.02  # of what is put into factors that are still zero
# Of the adapter's own effect on the logits. Saved and loaded are the same fp32 numbers; PiSSA and OLoRA come back as
# plain LoRA of twice the rank, the same sum in another order; 16-bit products round the outputs.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}


@torch.no_grad()
def check(job: Job, samples: Sequence[Sample]) -> Check:
    """Save the adapter, load it beside itself, and compare the logits. To be called inside `untouched`."""
    model = job.model
    if not isinstance(model, PeftModel):
        return not_applicable(NAME, "all weights are trained: there is no adapter")
    _stir(model)
    batch = pack.collate([[sample] for sample in samples], pad_id=job.data.pad_id)
    name = model.active_adapter
    with without_dropout(model), tempfile.TemporaryDirectory() as folder:
        own = _logits(job, batch.input_ids)
        with model.disable_adapter():
            effect = float((own - _logits(job, batch.input_ids)).abs().max())
        try:
            model.save_pretrained(folder, selected_adapters=[name])
            model.load_adapter(Path(folder) if name == "default" else Path(folder) / name, COPY, is_trainable=True)
        except DecalError as error:
            return failed(NAME, f"the adapter cannot be saved and loaded: {error.what}", fix=error.fix)
        try:
            model.set_adapter(COPY)
            difference = float((own - _logits(job, batch.input_ids)).abs().max())
        finally:
            model.set_adapter(name)
            model.delete_adapter(COPY)
    share = difference / max(effect, 1e-30)
    if share <= TOLERANCE[job.numbers.name]:
        return passed(
            NAME, f"saved and loaded, logits differ by {difference:.1e}; the adapter moves them by {effect:.1e}"
        )
    return failed(
        NAME,
        f"saved and loaded, it is another adapter: logits differ by {difference:.1e}, its whole effect is {effect:.1e}",
        fix="Do not train with these lora settings: what is saved would not be what was learnt. Please report it.",
    )


def _stir(model: PeftModel) -> None:
    """Move every trained tensor: a fresh adapter changes nothing, so nothing of it would be missed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            size = STD if not parameter.any() else 0.1 * float(parameter.square().mean().sqrt())
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter.device))


def _logits(job: Job, ids: Tensor) -> Tensor:
    with job.numbers.autocast():
        logits: Tensor = job.model(input_ids=ids.to(job.numbers.device), use_cache=False).logits
    return logits.float()
