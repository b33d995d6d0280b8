"""What a run was foretold to take beside what it took, and what its adapter's seal says, as parts of its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decal.report import html
from decal.words import counted

MIB, GIB = 1 << 20, 1 << 30
SHORT = 12  # letters of a digest that are enough to tell it from another
MEANING = "The error is forecast / measured - 1."
Facts = Mapping[str, Any]


def plan(values: Any) -> str:
    """Return the forecast of memory and time with its grade; nothing for what holds none."""
    if not isinstance(values, Mapping):
        return ""
    said, seen, grade = (_mapping(values.get(name)) for name in ("forecast", "measured", "grade"))
    tokens = said.get("step_tokens")
    step = f"a step of {counted(tokens, 'token')}" if isinstance(tokens, int) else "a step"
    lines = [
        ("peak memory", size(said.get("peak")), size(seen.get("peak")), grade.get("peak_error")),
        (step, seconds(said.get("step_seconds")), seconds(seen.get("step_seconds")), grade.get("step_error")),
        (
            "all steps, foretold from one",
            seconds(said.get("seconds_by_one_step")),
            seconds(seen.get("seconds")),
            grade.get("seconds_error"),
        ),
    ]
    rows = [[name, one, other, percent(error)] for name, one, other, error in lines if one or other]
    if not rows:
        return ""
    parts = [[name, size(bytes_)] for name, bytes_ in _mapping(said.get("parts")).items() if bytes_]
    head = f"<h3>Tensors in training, as foretold</h3>{html.table(['part', 'memory'], parts, numbers=(1,))}"
    return (
        html.table(["part", "forecast", "measured", "error"], rows, numbers=(1, 2, 3))
        + html.text(meaning(said, seen), "dim")
        + (head if parts else "")
    )


def meaning(said: Facts, seen: Facts) -> str:
    """Return what the numbers are."""
    words = [MEANING]
    if seen.get("by"):
        words.append(f"Memory measured: {seen['by']}.")
    if seen.get("exact") is False:
        words.append("This system does not let the peak be counted anew, so it may be from before training.")
    if said.get("made_in"):
        words.append(f"The forecast took {seconds(said['made_in'])}.")
    return " ".join(words)


def size(value: Any) -> str:
    """Return bytes in MiB, from one GiB on in GiB; nothing for what is no number."""
    if not _number(value):
        return ""
    if value < MIB / 100:
        return "under 0.01 MiB"
    number, unit = (value / GIB, "GiB") if value >= GIB else (value / MIB, "MiB")
    return f"{number:.2f} {unit}" if number < 10 else f"{_digits(number)} {unit}"


def seconds(value: Any) -> str:
    """Return a time in seconds with three digits; nothing for what is no number."""
    return f"{_digits(value)} s" if _number(value) else ""


def percent(value: Any) -> str:
    """Return an error of 0.05 as `+5.0 %`; nothing for what was not measured."""
    return f"{100 * value:+.1f} %" if _number(value) else ""


def seal(values: Facts) -> dict[str, str]:
    """Return what a seal says in words. Raises KeyError, TypeError or AttributeError for one of another form."""
    lines = {"base": values["base_name"] or "", "base weights": _short(values["base_fingerprint"])}
    if values["base_config"] is not None:
        lines["base config"] = counted(len(values["base_config"]), "setting")
    lines["adapter tensors"] = _short(values["tensors"])
    if values["scale"] is not None:
        lines["scale"] = _scale(values["scale"])
    if (tokens := values["tokens"]) is not None:
        lines["tokenizer"] = f"{counted(tokens['size'], 'token')}, {_short(tokens['vocabulary'])}"
        lines["chat template"] = _short(tokens["template"])
    if (reference := values["reference"]) is not None:
        moved = f"the adapter moves its base by {reference['adapter_kl']:.3g} nats (KL)"
        lines["reference"] = f"{counted(len(reference['answers']), 'prompt')}; {moved}"
    return lines


def _scale(scale: Facts) -> str:
    found = sorted(set(scale["layers"].values()))
    shown = f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"
    return f"{shown} (lora_alpha={scale['lora_alpha']:g}, r={scale['r']}{', rsLoRA' if scale['use_rslora'] else ''})"


def _short(digest: str | None) -> str:
    return (digest or "")[:SHORT]


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _mapping(value: Any) -> Facts:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
