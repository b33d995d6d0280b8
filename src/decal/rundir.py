"""The run folder: the contract between train, resume and report. Every write is atomic.

run.yaml · manifest.json · events.jsonl · checkpoints/step-N/ · adapter/ (or model/ after full fine-tuning)
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from decal.errors import RunError

RUN, MANIFEST, EVENTS, CHECKPOINTS = "run.yaml", "manifest.json", "events.jsonl", "checkpoints"
ADAPTER, MODEL, REPORT = "adapter", "model", "report.html"
COMPLETE = "complete.json"  # written last into a checkpoint; a folder without it is never resumed from


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new, never a part: temp, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` only if the block ends well; an old `path` is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


class RunDir:
    """One run's folder, opened for writing by train and for reading by everything else."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def model(self) -> Path:
        return self.path / MODEL

    def holds_run(self) -> bool:
        """Whether a run has been written here."""
        return os.path.isfile(self.path / RUN)  # False, too, where nothing may be read

    def check_free(self) -> None:
        """Raise RunError for a folder that already holds a run or anything else, or that cannot be made."""
        self.check_writable()
        if self.holds_run():
            begun = bool(self.checkpoints()) or self.adapter.exists() or self.model.exists()
            raise RunError(
                "the output folder already holds a run"
                if begun
                else "the output folder already holds a run that wrote neither a checkpoint nor a result",
                got=self.path,
                fix=f"Choose another --output, or continue it: decal train {self.path / RUN} --resume."
                if begun
                else "If it is no longer running, delete the folder; or choose another --output.",
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise RunError("the output folder is not empty", got=self.path, fix="Choose another --output.")

    def check_writable(self) -> None:
        """Raise RunError if the folder cannot be made or written to; leave nothing that was not there."""
        made: list[Path] = []
        try:
            for folder in (*reversed(self.path.parents), self.path):
                if not folder.is_dir():
                    folder.mkdir()
                    made.append(folder)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise self._unusable(error) from None
        finally:
            with suppress(OSError):  # another process has put something there meanwhile
                for folder in reversed(made):
                    folder.rmdir()

    def _unusable(self, error: OSError) -> RunError:
        files = [path for path in (self.path, *self.path.parents) if os.path.isfile(path)]
        if files:
            return RunError(
                "a file lies where the output folder should be", got=files[0], fix="Choose another --output."
            )
        return RunError(
            f"the output folder cannot be made or written to ({error.strerror or error})",
            got=self.path,
            fix="Choose another --output, in a folder that you may write to.",
        )

    def claim(self, run_yaml: str) -> None:
        """Start a new run here; refuse a folder that already holds one, or holds anything else."""
        self.check_free()
        try:
            write_bytes(self.path / RUN, run_yaml.encode())
        except OSError as error:
            raise self._unusable(error) from None

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one line to events.jsonl and return it."""
        line = {"kind": kind, "time": round(time.time(), 3), **fields}
        with open(self.path / EVENTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return line

    def events(self) -> list[dict[str, Any]]:
        """Return all whole events; a last line cut short by a crash is left out."""
        file = self.path / EVENTS
        if not file.exists():
            return []
        lines = file.read_bytes().split(b"\n")
        events = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                events += [json.loads(line)] if line else []
            except ValueError as error:  # no JSON, or no UTF-8
                raise RunError(
                    f"line {number} of {EVENTS} is damaged ({error})", got=file, fix="Delete that line."
                ) from None
        return events

    def rewind(self, step: int) -> None:
        """Drop the events of steps after `step`: a resumed run writes them again."""
        kept = [e for e in self.events() if e.get("step", 0) <= step]
        write_bytes(self.path / EVENTS, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in kept).encode())

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_json(self.path / MANIFEST, dict(manifest))

    def manifest(self) -> dict[str, Any]:
        """Return what the run says of itself. Raises RunError if the file is damaged."""
        file = self.path / MANIFEST
        try:
            value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            value["data"]["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{MANIFEST} is damaged ({type(error).__name__}: {error})",
                got=file,
                fix="Delete it: --resume writes it anew, but cannot tell then whether the data are still the same.",
            ) from None
        return value

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first; half-written ones are not among them."""
        found = (self.path / CHECKPOINTS).glob("step-*")
        whole = [path for path in found if (path / COMPLETE).is_file()]
        return sorted(whole, key=step_of)

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Yield a folder to fill; it becomes checkpoints/step-N only if the block ends well."""
        with new_folder(self.path / CHECKPOINTS / f"step-{step}") as folder:
            yield folder
            write_json(folder / COMPLETE, {"step": step})

    def clean(self) -> None:
        """Delete what a killed process left half-written among the checkpoints."""
        for path in (self.path / CHECKPOINTS).glob(".step-*"):
            shutil.rmtree(path)

    def prune(self, *, keep: int, best: int | None) -> None:
        """Delete all but the last `keep` checkpoints and the best one."""
        for path in self.checkpoints()[:-keep]:
            if path.name != f"step-{best}":
                shutil.rmtree(path)
