"""Where progress goes: events.jsonl always; TensorBoard, W&B or MLflow when asked, each loaded only then."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from decal.errors import ConfigError, DecalError, RunError
from decal.rundir import RunDir, writing
from decal.spec import RunConfig

Event = dict[str, Any]
SHOWN = {  # what a chart is drawn of, by the kind of event
    "step": ("loss", "lr", "grad_norm", "tokens_per_s"),
    "eval": ("loss", "perplexity"),
}


class Writer(Protocol):
    """One logging service."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars in TensorBoard's event files, under tensorboard/ in the run folder."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = folder / "tensorboard"
        with writing(self._folder):
            self._writer = SummaryWriter(str(self._folder))
            self._writer.add_text("run.yaml", f"```\n{config.to_yaml()}\n```")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with writing(self._folder, fix="Make room, or take tensorboard out of train.log_to; then go on with --resume."):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()


class WandB:
    """Scalars in a Weights & Biases run named after the run folder."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        self._run = wandb.init(
            project="decal", name=folder.name, dir=str(folder), config=config.model_dump(mode="json")
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Scalars in an MLflow run named after the run folder, on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import mlflow

        self._client = mlflow.tracking.MlflowClient()
        experiment = mlflow.set_experiment("decal").experiment_id
        self._id = self._client.create_run(experiment, run_name=folder.name).info.run_id
        self._client.log_text(self._id, config.to_yaml(), "run.yaml")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name.replace("/", "."), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


WRITERS: Mapping[str, Callable[[Path, RunConfig], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError for a logging service whose package is missing, before anything slow begins."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.log_to names {name}, which is not installed",
                fix=f'Run: pip install "decal[{name}]", or take {name} out of train.log_to.',
            )


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of an event that a chart is drawn of, such as {"train/loss": 1.2}."""
    group = {"step": "train"}.get(event["kind"], event["kind"])
    return {f"{group}/{name}": float(event[name]) for name in SHOWN.get(event["kind"], ()) if name in event}


class Report:
    """The run's voice: `report("step", step=3, loss=1.2)` writes one event everywhere."""

    def __init__(self, run: RunDir, writers: Sequence[Writer], on_event: Callable[[Event], None] | None) -> None:
        self._run, self._writers, self._on_event = run, writers, on_event

    def __call__(self, kind: str, **fields: Any) -> Event:
        event = self._run.event(kind, **fields)
        values = scalars(event)
        for writer in self._writers if values else ():
            writer.write(int(event["step"]), values)
        if self._on_event is not None:
            self._on_event(event)
        return event


@contextmanager
def reporting(run: RunDir, config: RunConfig, on_event: Callable[[Event], None] | None = None) -> Iterator[Report]:
    """Yield a Report over the services that the settings name; they are closed however the block ends.

    What ends it is an event, too, so that whoever reads the run later knows why it has no result.
    """
    writers: list[Writer] = []
    try:
        for name in config.train.log_to:
            writers.append(WRITERS[name](run.path, config))
        yield Report(run, writers, on_event)
    except DecalError as error:
        with suppress(RunError):  # on a full disk the error itself is all that can be said
            run.event(
                "error", text=error.what if error.got is None else f"{error.what} (got: {error.got})", fix=error.fix
            )
        raise
    finally:
        for writer in writers:
            writer.close()
