"""What a person sees of a training run: what will be trained, the data, a progress bar, and what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from decal.cli import console
from decal.recipes.finetune import Finetuned
from decal.report.graded import percent, seconds, size
from decal.rundir import RunDir
from decal.spec import RunConfig
from decal.words import counted

QUIET_SECONDS = 10.0  # without a terminal: at most one line of progress in this time


class Watch:
    """Shows the events of a run as they come; use it in a `with` block and as `on_event`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._run = RunDir(Path(config.output))
        self._console = console.err()
        self._status = self._console.status("reading the data and the model") if self._console.is_terminal else None
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}"),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None
        self._checks: list[dict[str, Any]] = []
        self._last_line = 0.0
        self._stage = ""
        self._first: float | None = None  # the held-out loss before training

    def __enter__(self) -> Watch:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
        self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "check":
            self._checks.append(event)
        elif self._checks:
            self._print(Text(checks(self._checks), style="dim"))
            self._checks = []
        show = {
            "start": self._start,
            "resume": self._start,
            "step": self._step,
            "eval": self._evaluation,
            "note": self._note,
            "advice": self._advice,
            "stop": self._stop,
        }.get(event["kind"])
        if show is not None:
            show(event)

    def stage(self, text: str) -> None:
        """Say what is being done now, before or after the training itself."""
        self._bar.stop()
        if self._status is not None:
            self._stage = text
            self._status.update(Text(text))
            self._status.start()
        else:
            self._print(Text(text, style="dim"))

    def count(self, done: int, of: int) -> None:
        """Say how far the stage has come."""
        if self._status is not None:
            self._status.update(Text(f"{self._stage}: {done} of {of}"))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _start(self, event: dict[str, Any]) -> None:
        if self._status is not None:
            self._status.stop()
        manifest = self._run.manifest()
        saved = self._run.checkpoints()
        lines = {"resume": f"after {saved[-1].name.replace('-', ' ')}"} if event["kind"] == "resume" and saved else {}
        lines |= {
            "model": self._config.model,
            "train": what_is_trained(self._config, manifest),
            "data": ledger(manifest["data"]),
        }
        if manifest.get("evaluation"):
            lines["eval"] = ledger(manifest["evaluation"])
        self._print(console.facts(lines))

    def _step(self, event: dict[str, Any]) -> None:
        shown = f"loss {event['loss']:.3f}  {event['tokens_per_s']:,.0f} tokens/s  {clock(event['seconds_left'])} left"
        if self._console.is_terminal:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task("train", total=event["steps"], shown=shown)
            self._bar.update(self._task, completed=event["step"], shown=shown)
        elif time.monotonic() - self._last_line > QUIET_SECONDS or event["step"] == event["steps"]:
            self._last_line = time.monotonic()
            self._print(Text(f"step {event['step']}/{event['steps']}  {shown}"))

    def _evaluation(self, event: dict[str, Any]) -> None:
        self._first = event["loss"] if event["step"] == 0 else self._first
        better = event["best"] and (self._first is None or event["loss"] < self._first)
        best = ", the best so far" if better else ""  # of the trained steps the best may be worse than the start
        text = (
            f"held-out loss {event['loss']:.4f} (perplexity {event['perplexity']:,.2f}) at step {event['step']}{best}"
        )
        self._print(Text(text))

    def _note(self, event: dict[str, Any]) -> None:
        self._print(Text(f"note: {event['text']}", style="dim"))

    def _advice(self, event: dict[str, Any]) -> None:
        self._loud("advice", event["text"])

    def _stop(self, event: dict[str, Any]) -> None:
        if event["kept"] is not None:  # else an error follows, which says the same and what to do
            self._loud(f"stopped at step {event['step']}", event["text"])

    def _loud(self, word: str, text: str) -> None:
        """What must not be overlooked, in a terminal broken between words."""
        line = Text.assemble((f"{word}: ", "bold yellow"), (text, "yellow"))
        self._console.print(line, soft_wrap=not self._console.is_terminal)


def what_is_trained(config: RunConfig, manifest: dict[str, Any]) -> str:
    """Return the adapter and the true share of parameters in one line or two."""
    parts = manifest["parameters"]
    share = f"{parts['trainable']:,} of {parts['total']:,} parameters ({parts['percent']:.2f}%)"
    where = f"{manifest['precision']} on {manifest['device_type']}"
    if config.train.method == "full":
        return f"all weights: {share}\n{where}, lr {config.train.lr:g}"
    lora = config.lora
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules or ())
    return f"{kind} r={lora.r} alpha={lora.lora_alpha:g} on {targets}: {share}\n{where}, lr {config.train.lr:g}"


def checks(events: list[dict[str, Any]]) -> str:
    """Return what came of a run's first checks in one line; a failed one would have ended the run."""
    done = [event for event in events if event["status"] == "passed"]
    return f"checks: {len(done)} passed in {sum(event['seconds'] for event in events):.1f} s"


def ledger(facts: dict[str, Any]) -> str:
    """Return a data ledger in short: the shape, what became of the rows, and what the loss is on."""
    rows = ("first " if facts["partial"] else "") + counted(facts["rows"], "row")
    lines = [facts["source"], f"{facts['shape']}; {rows}, {facts['used']:,} used"]
    lines += [f"dropped {count:,}: {reason}" for reason, count in facts["dropped"].items()]
    if facts["cut"]:
        lines.append(f"cut {facts['cut']:,} at max_length; {facts['stops_lost']:,} of them lost their stop token")
    roles = ", ".join(f"{share:.0%} {role}" for role, share in facts["loss_by_role"].items() if share)
    lines.append(f"{counted(facts['tokens'], 'token')}, {facts['loss_tokens']:,} of them learnt ({roles})")
    if facts["without_stop"]:
        lines.append(f"no stop token is learnt from {counted(facts['without_stop'], 'row')}")
    lines += [f"note: {text}" for text in facts["notes"]]
    return "\n".join(lines)


def outcome(config: RunConfig, done: Finetuned, *, as_json: bool) -> None:
    """Print what came of a run, and what to do next."""
    run = RunDir(done.run)
    losses = [event["loss"] for event in run.events() if event["kind"] == "step"]
    weights = folder_bytes(done.result)
    if as_json:
        console.dump(
            {
                "run": str(done.run),
                "result": str(done.result),
                "bytes": weights,
                "steps": done.steps,
                "kept_step": done.step,
                "first_loss": losses[0] if losses else None,
                "loss": done.loss,
                "eval_loss_before": done.eval_before,
                "eval_loss": done.eval_loss,
                "trainable": done.trainable,
                "seconds": done.seconds,
                "stopped": done.stopped,
            }
        )
        return
    kind = "adapter" if config.train.method == "lora" else "model"
    lines = {"steps": f"{done.steps:,} in {clock(done.seconds)}"}
    if losses:
        lines["loss"] = f"{losses[0]:.3f} -> {losses[-1]:.3f} (training, first and last step)"
    if done.eval_before is not None and done.eval_loss is not None:
        kept = "" if done.step == done.steps else f"; the weights of step {done.step} are kept"
        lines["held-out"] = f"{done.eval_before:.3f} -> {done.eval_loss:.3f}{kept}"
    plan = run.manifest().get("plan")
    if plan is not None:
        lines["plan"] = graded(plan)
    lines[kind] = f"{done.result} ({megabytes(weights)})"
    lines["next"] = "\n".join(next_commands(done.result, kind))
    console.note("")
    console.out().print(console.facts(lines), soft_wrap=True)


def graded(plan: dict[str, Any]) -> str:
    """Return how near the forecast of memory and time came, as the report says it."""
    said, seen, grade = plan["forecast"], plan["measured"], plan["grade"]
    memory = f"peak {beside(size(said['peak']), size(seen['peak']), grade['peak_error'])}"
    step = f"a step {beside(seconds(said['step_seconds']), seconds(seen['step_seconds']), grade['step_error'])}"
    return f"{memory}\n{step}"


def beside(said: str, seen: str, error: float | None) -> str:
    """Return a forecast beside what was measured."""
    return f"{said} forecast, {seen} measured" + (f" ({percent(error)})" if error is not None else "")


def next_commands(result: Path, kind: str) -> list[str]:
    """Return the commands to go on with."""
    if kind == "model":
        return [f"decal chat --model {result}", f'decal generate --model {result} --prompt "..."']
    return [
        f'decal generate --adapter {result} --prompt "..." --compare',
        f"decal inspect {result}",
        f"decal merge {result} --out {result.parent / 'merged'}",
    ]


def folder_bytes(folder: Path) -> int:
    """Return the size of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def megabytes(size: float) -> str:
    """Return a file size for people; MB is 10^6 bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB" if size >= 1e4 else f"{size / 1e3:.1f} kB"


def clock(seconds: float) -> str:
    """Return a time as people write it."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
