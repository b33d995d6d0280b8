"""What can be said of a model about to train or training, from its parts: scale, frozen groups, dead ones, modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from decal.layers.adapted import Adapted
from decal.training.movement import group_of

SMALL, LARGE = 0.1, 16.0  # of alpha / r: QLoRA's own is 0.25, LoRA's for GPT-2 8; beyond, the rate means another thing
LARGE_RSLORA = 4.0  # of alpha / sqrt(r): alpha = 2r, a good habit for alpha / r, gives 8 at r = 16 and 16 at r = 64
TO = 2.0  # the scale to go to: alpha = 2r
PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def scale(model: nn.Module) -> str | None:
    """Return what is odd about the scale of the changes that are trained."""
    for layer in (module for module in model.modules() if isinstance(module, Adapted)):
        for name, adapter in layer.adapters.items():
            if not any(p.requires_grad for p in layer.trainable(name)):
                continue
            stabilized = abs(adapter.scale * adapter.rank - adapter.alpha) > 1e-6 * adapter.alpha
            if SMALL <= adapter.scale <= (LARGE_RSLORA if stabilized else LARGE):
                continue
            rule = "lora_alpha / sqrt(r)" if stabilized else "lora_alpha / r"
            change, like = ("lower", "high") if adapter.scale > 1 else ("raise", "low")
            return (
                f"the adapter's scale, {rule}, is {adapter.scale:,.4g} (r={adapter.rank}, "
                f"lora_alpha={adapter.alpha:g}): 1 to 4 is usual, and this trains as at a far too {like} rate; "
                f"{change} lora_alpha to "
                f"{TO * adapter.alpha / adapter.scale:.3g}"
            )
    return None


def frozen(model: nn.Module) -> str | None:
    """Return which parts of an adapter stand frozen beside its trained ones."""
    state: dict[tuple[str, str], list[bool]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = next((i for i, word in enumerate(words[:-1]) if word in PARTS), None)
        if part is not None:
            state.setdefault((words[part + 1], group_of(name)), []).append(parameter.requires_grad)
    alive = {adapter for (adapter, _), flags in state.items() if any(flags)}
    still = {
        f"{flags.count(False)} of {len(flags)} {group}"
        for (adapter, group), flags in state.items()
        if adapter in alive and not all(flags)
    }
    if not still:
        return None
    return (
        f"{', '.join(sorted(still))} are frozen, so they will not learn: set requires_grad on them, or leave them out"
    )


def dead(unmoved: Sequence[str], names: Sequence[str], steps: int, *, patient: bool) -> str | None:
    """Return which parameters never moved; an A beside a B that did not is not counted again."""
    gone = set(unmoved)
    told = [n for n in unmoved if not (".lora_A." in n and n.replace(".lora_A.", ".lora_B.") in gone)]
    told = [n for n in told if patient or "expert" not in n]
    if not told:
        return None
    of, counts = Counter(map(group_of, names)), Counter(map(group_of, told))
    groups = ", ".join(f"{count}/{of[group]} {group}" for group, count in counts.items())
    return (
        f"{groups} never moved in {steps} steps, such as {told[0]}: no gradient reaches them; check "
        "lora.target_modules, and that nothing detaches the layers' inputs"
    )


def wake(model: nn.Module) -> str | None:
    """Give dropout its training mode back where something took it, and say so."""
    asleep = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0 and not m.training]
    if model.training and not asleep:
        return None
    model.train()
    what = f"{len(asleep)} dropout layers were" if asleep else "the model was"
    return f"{what} in evaluation mode while training: set back to training mode; the steps before had no dropout"
