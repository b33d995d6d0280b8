"""The page of one run, `report.html`: what was trained on what, how it went, and what came of it.

It reads the run's folder and nothing else, in any state: finished, stopped, interrupted, failed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any

from decal import rundir
from decal.errors import RunError
from decal.report import graded, html, plots
from decal.report.plots import Series
from decal.rundir import ADAPTER, MANIFEST, REPORT, RUN, RunDir
from decal.words import counted

SEAL = "decal.json"
Event = dict[str, Any]


def write(run: RunDir, out: Path | None = None) -> Path:
    """Write the run's page (to `report.html` in its folder) and return where it lies."""
    path = out or run.path / REPORT
    text = page(run)
    try:
        rundir.write_bytes(path, text.encode())
    except OSError as error:
        raise RunError(
            f"the report could not be written ({error.strerror or error})",
            got=path,
            fix=f"Make room, then: decal report {run.path}" if out is None else "Choose another --out.",
        ) from None
    return path


@contextmanager
def at_the_end(run: RunDir) -> Iterator[None]:
    """Write the page when the block ends, however it ends; after an error only if that can be done."""
    try:
        yield
    except BaseException:
        if run.holds_run():
            with suppress(RunError):
                write(run)
        raise
    write(run)


def page(run: RunDir) -> str:
    """Return the page. Raises RunError if there is no run, or if what it says of itself is damaged."""
    if not run.holds_run():
        raise RunError(
            "there is no run here", got=run.path, fix="Give the folder of a run: the --output of decal train."
        )
    manifest = run.manifest() if (run.path / MANIFEST).exists() else {}
    events = run.events()
    name = run.path.resolve().name
    return html.page(
        f"{name}: decal run",
        [
            head(name, manifest, events, [path.name for path in run.checkpoints()]),
            summary(manifest, events),
            html.section("Advice", *[html.loud(f"step {e['step']}:", e["text"]) for e in _of(events, "advice")]),
            html.section("What was trained", html.facts(what(manifest)), html.facts(settings(manifest))),
            html.section("Curves", curves(manifest, events)),
            html.section("Evaluations", evaluations(events)),
            html.section("Checks", checks(events)),
            html.section("Data", *data(manifest)),
            html.section("Forecast and measured", graded.plan(manifest.get("plan"))),
            html.section("Notes", *[html.text(e["text"]) for e in _of(events, "note")]),
            html.section("Seal", seal(run)),
            html.section("Versions and machine", html.facts(machine(manifest))),
            html.section("All settings", html.folded(RUN, _read(run.path / RUN))),
        ],
    )


def head(name: str, manifest: Mapping[str, Any], events: list[Event], checkpoints: list[str]) -> str:
    """Return the title, and how the run ended."""
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(events[0]["time"])) + " UTC" if events else ""
    begun = html.text(f"begun {began}", "dim") if began else ""
    return f"<h1>{escape(name)}</h1>{begun}{ended(manifest, events, checkpoints)}"


def ended(manifest: Mapping[str, Any], events: list[Event], checkpoints: list[str]) -> str:
    """Return how the last sitting ended, and what can be done now."""
    steps = _of(events, "step")
    at = f"step {steps[-1]['step']:,} of {steps[-1]['steps']:,}" if steps else "its first step"
    sitting = events[max((i for i, e in enumerate(events) if e.get("kind") == "resume"), default=0) :]
    stops, errors = _of(sitting, "stop"), _of(sitting, "error")
    if stops:
        text = stops[-1]["text"]
        if stops[-1].get("kept") is None:  # only then an error follows, whose fix is what to do
            text = f"{text}. The run has no result. {errors[-1]['fix'] if errors else ''}"
        return html.loud(f"Stopped at step {stops[-1]['step']}:", text)
    if "outcome" in manifest:
        return html.text(f"Finished: {at}.")
    if errors:
        return html.loud("Not finished:", f"the run got to {at}. {errors[-1]['text']}. {errors[-1]['fix']}")
    again = f"goes on from {checkpoints[-1]}" if checkpoints else "begins it again, for no checkpoint was written"
    return html.loud("Not finished:", f"the run got to {at}. decal train {RUN} --resume {again}.")


def summary(manifest: Mapping[str, Any], events: list[Event]) -> str:
    """Return the few numbers that matter most."""
    steps, outcome = _of(events, "step"), manifest.get("outcome", {})
    values: dict[str, str] = {}
    before, after = outcome.get("eval_loss_before"), outcome.get("eval_loss")
    if before is not None and after is not None:
        values["held-out loss, before and after"] = f"{before:.3f} → {after:.3f}"
    if steps:
        values["training loss, first and last step"] = f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"
    if "kept_step" in outcome:
        values["step whose weights were kept"] = f"{outcome['kept_step']:,} of {outcome['steps']:,}"
    if "parameters" in manifest:
        values["parameters trained"] = _count(manifest["parameters"]["trainable"])
    seconds = sum(e["seconds"] for e in steps)
    if seconds:
        values["tokens per second"] = f"{sum(e['tokens'] for e in steps) / seconds:,.0f}"
    if "seconds" in outcome:
        values["in all"] = _clock(outcome["seconds"])
    return html.tiles(values) if values else ""


def what(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model and what of it was trained."""
    config = manifest.get("config")
    if not config:
        return {}
    parts = manifest.get("parameters")
    lines: dict[str, Any] = {"model": config.get("model"), "revision": config.get("revision")}
    if config.get("train", {}).get("method") == "full":
        lines["method"] = "full fine-tuning: all weights"
    elif config.get("lora"):
        lines |= adapter(config["lora"])
    if parts:
        lines["parameters"] = f"{parts['trainable']:,} of {parts['total']:,} trained ({parts['percent']:.2f}%)"
    quantize = config.get("quantize")
    lines["base stored in"] = _words(quantize) if quantize else "its own format"
    lines["output head"] = (manifest.get("output_head") or {}).get("says")
    return lines


def adapter(lora: Mapping[str, Any]) -> dict[str, Any]:
    """Return an adapter's settings as people speak of them."""
    kind = "DoRA" if lora.get("use_dora") else "LoRA"
    rank, alpha, stabilized = lora["r"], lora["lora_alpha"], lora.get("use_rslora")
    scale = alpha / math.sqrt(rank) if stabilized else alpha / rank
    rule = "alpha / sqrt(r)" if stabilized else "alpha / r"
    targets = lora.get("target_modules")
    return {
        "method": f"{kind}, rank-stabilised" if stabilized else kind,
        "rank, alpha": f"r={rank}, lora_alpha={alpha:g}: scale {scale:g} ({rule})",
        "targets": targets if isinstance(targets, str) else ", ".join(targets or ()),
        "dropout": f"{lora['lora_dropout']:g}",
        "also trained": ", ".join(lora.get("modules_to_save") or ()),
    }


def settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return how it was trained."""
    train = manifest.get("config", {}).get("train")
    if not train:
        return {}
    return {
        "rate": f"{train['lr']:g}, {train['schedule']}, warm-up {train['warmup']:g}",
        "batch": f"{counted(train['micro_batch'], 'row')} x {train['accumulate']} accumulated",
        "optimizer": f"{train['optimizer']}, weight decay {train['weight_decay']:g}",
        "gradient clipped at": f"{train['max_grad_norm']:g}",
        "computed in": manifest.get("precision"),
        "seed": train["seed"],
    }


def curves(manifest: Mapping[str, Any], events: list[Event]) -> str:
    """Return loss, gradient norm, learning rate and speed over the steps."""
    steps, evals = _of(events, "step"), _of(events, "eval")
    loss = [(e["step"], e["loss"]) for e in steps]
    marks = [(e["step"], f"{e['advice']}: {e['text']}") for e in _of(events, "advice") if e["step"] > 0]
    limit = manifest.get("config", {}).get("train", {}).get("max_grad_norm")
    norms = [(e["step"], e["grad_norm"]) for e in steps]
    clip = [(x, limit) for x in (loss[0][0], loss[-1][0])] if limit and loss else []
    shown = [Series(name="training", points=loss, kind="faint"), Series(name="smoothed", points=plots.smoothed(loss))]
    held = Series(name="held-out", points=[(e["step"], e["loss"]) for e in evals], kind="second", dots=True)
    inner = [
        plots.curve("Loss", [*shown, held], marks=marks),
        plots.curve(
            "Gradient norm",
            [Series(name="before clipping", points=norms), Series(name="clipped at", points=clip, kind="limit")],
            log=True,
            marks=marks,
        ),
        plots.curve("Learning rate", [Series(name="rate", points=[(e["step"], e["lr"]) for e in steps])]),
        plots.curve(
            "Tokens per second", [Series(name="speed", points=[(e["step"], e["tokens_per_s"]) for e in steps])]
        ),
    ]
    drawn = "".join(inner)
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def evaluations(events: list[Event]) -> str:
    evals = _of(events, "eval")
    best = max((e["step"] for e in evals if e.get("best")), default=None)
    rows = [
        [f"{e['step']:,}", f"{e['loss']:.4f}", f"{e['perplexity']:,.2f}", "the best" if e["step"] == best else ""]
        for e in evals
    ]
    return html.table(["step", "held-out loss", "perplexity", ""], rows, numbers=(0, 1, 2))


def checks(events: list[Event]) -> str:
    """Return each check with its outcome and whatever else it says."""
    told = {"kind", "time", "name", "status", "seconds"}
    rows = [
        [
            str(e.get("name", "")),
            str(e.get("status", "")),
            "; ".join(_pairs({k: e[k] for k in e if k not in told})),
            f"{e['seconds']:.2f} s" if "seconds" in e else "",
        ]
        for e in _of(events, "check")
    ]
    return html.table(["check", "outcome", "measured", "took"], rows, numbers=(3,))


def data(manifest: Mapping[str, Any]) -> list[str]:
    """Return the ledgers of the training and the held-out rows."""
    parts = []
    for name, title in (("data", "Training rows"), ("evaluation", "Held-out rows")):
        facts = manifest.get(name)
        if facts:
            parts += [
                f"<h3>{title}</h3>",
                html.facts(ledger(facts)),
                *[html.text(f"note: {n}") for n in facts["notes"]],
            ]
    return parts


def ledger(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return one ledger: rows in, kept and dropped, and what the loss is on."""
    lost = [f"{count:,} {reason}" for reason, count in facts["dropped"].items() if count]
    cut = f"{facts['cut']:,}, of which {facts['stops_lost']:,} lost their stop token" if facts["cut"] else None
    share = facts["loss_tokens"] / facts["tokens"] if facts["tokens"] else 0.0
    return {
        "source": facts["source"],
        "rows": f"{facts['rows']:,} read as {facts['shape']}, {facts['used']:,} used",
        "dropped": "; ".join(lost) or "none",
        "cut at max_length": cut,
        "tokens": f"{facts['tokens']:,}, the longest row {facts['longest']:,}",
        "learnt": f"{facts['loss_tokens']:,} tokens ({share:.0%})",
        "loss by role": ", ".join(f"{part:.0%} {role}" for role, part in facts["loss_by_role"].items()),
        "rows without a stop token": facts["without_stop"] or None,
        "packing fills": None if facts["fill"] is None else f"{facts['fill']:.0%}",
        "digest": facts["digest"],
    }


def seal(run: RunDir) -> str:
    """Return what the adapter's seal says, if it has one."""
    text = _read(run.path / ADAPTER / SEAL)
    try:
        values = json.loads(text)
    except ValueError:
        return html.loud(f"{SEAL}", "is damaged") if text else ""
    if not isinstance(values, dict):
        return ""
    try:
        return html.facts(graded.seal(values))
    except (KeyError, TypeError, AttributeError, ValueError):  # of another version: as it stands there
        return html.facts({name: _words(value) for name, value in values.items()})


def machine(manifest: Mapping[str, Any]) -> dict[str, Any]:
    device = manifest.get("device")
    lines = {
        "device": f"{device} ({manifest.get('device_type')}), {counted(manifest.get('threads', 0), 'thread')}"
        if device
        else None
    }
    return {**lines, **manifest.get("versions", {})}


def _of(events: list[Event], kind: str) -> list[Event]:
    return [e for e in events if e.get("kind") == kind]


def _pairs(values: Mapping[str, Any]) -> list[str]:
    return [
        _words(v) if isinstance(v, str) else f"{n.replace('_', ' ')}: {_shown(v)}"
        for n, v in values.items()
        if v is not None
    ]


def _words(value: Any) -> str:
    """Return a value of a manifest in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_words(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return (
            counted(len(value), "entry")
            if len(value) > 8 or any(isinstance(v, (list, dict)) for v in value)
            else ", ".join(map(str, value))
        )
    return str(value)


def _shown(value: Any) -> str:
    """Return a number with a few digits, anything else in words."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "" if value is None else _words(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _count(number: float) -> str:
    for size, sign in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {sign}"
    return f"{number:,}"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
