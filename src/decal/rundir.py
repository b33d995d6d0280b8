"""The run folder: the contract between train, resume and report. Every write is atomic.

run.yaml · manifest.json · events.jsonl · checkpoints/step-N/ · adapter/ (or model/ after full fine-tuning)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from decal.errors import RunError
from decal.reading import because, one_line, parse_json, read_json, reading

RUN, MANIFEST, EVENTS, CHECKPOINTS = "run.yaml", "manifest.json", "events.jsonl", "checkpoints"
ADAPTER, MODEL, REPORT = "adapter", "model", "report.html"
NAMED = re.compile(r"step-\d+")  # the folders among the checkpoints that are any
LONGEST_NUMBER = 24  # digits
COMPLETE = "complete.json"  # written last into a checkpoint; a folder without it is never resumed from


REMAKE = "Delete it: --resume writes it anew, but cannot tell then whether data and settings are still the same."


class NotWritten(RunError):
    """A disk is full, read-only or gone; `reason` is what the system says."""

    def __init__(self, path: Path, reason: str, *, fix: str) -> None:
        self.reason = reason
        super().__init__(f"{path.name} could not be written ({reason})", got=path, fix=fix)


MAKE_ROOM = "Make room, or choose a place that you may write to; nothing half-written was left in its place."


@contextmanager
def writing(path: Path, *, fix: str = MAKE_ROOM) -> Iterator[None]:
    """Turn what a full or read-only disk raises in the block, from whatever library, into NotWritten.

    The outermost block names the place, for only that one has a name that the user knows.
    """
    try:
        yield
    except NotWritten as error:
        raise NotWritten(path, error.reason, fix=fix) from error
    except Exception as error:
        reason = disk_fault(error)
        if reason is None:
            raise
        raise NotWritten(path, reason, fix=fix) from error


def disk_fault(error: Exception) -> str | None:
    """Return what the system said of a write that failed; None for an error of another kind.

    The libraries written in Rust have error types of their own, whose texts end in `(os error 28)`.
    """
    if isinstance(error, OSError):
        return error.strerror or because(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number else None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves either the old content or the new, never a part: temp, fsync, rename.

    Raises NotWritten, as all that writes here.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def together(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder; what is written there takes the places of `names` in `folder` if the block ends well.

    What is not written there is deleted here. The last name is what a reader asks for first: it is away while the
    others take their places, so that a crash just then leaves a set that is refused, never a mixed one.
    """
    new = folder / f".{names[-1]}.{os.getpid()}.tmp"
    try:
        with writing(folder):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            yield new
            (folder / names[-1]).unlink(missing_ok=True)
            for name in names:
                if (new / name).exists():
                    os.replace(new / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` only if the block ends well; an old `path` is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder so that a crash leaves it whole or gone: it loses its name first."""
    away = folder.with_name(f".{folder.name}.{os.getpid()}.gone")
    with writing(folder):
        os.replace(folder, away)
        shutil.rmtree(away)


def _leftovers(folder: Path, name: str) -> list[Path]:
    """Return what writing and deleting here has not brought to its end: `.name.PID.tmp`, `.old` and `.gone`."""
    return [path for end in ("old", "tmp", "gone") for path in folder.glob(f".{name}.*.{end}")]


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of every file in a folder, by its path there. Large files are read side by side."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(_sha256, files))
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while part := handle.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def altered(folder: Path, names: Iterable[str]) -> tuple[Path, str] | None:
    """Return the first of a checkpoint's files that does not hold what was written there, and why; None if all do.

    `names` and whatever else complete.json lists are looked at.
    """
    try:
        said = read_json(folder / COMPLETE)
        files = {name: (int(facts["bytes"]), str(facts["sha256"])) for name, facts in said["files"].items()}
        if said["step"] != step_of(folder):
            raise ValueError("it is of another step")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return folder / COMPLETE, because(error)
    now = contents(folder)
    for name in dict.fromkeys((*names, *files)):
        if name not in files:
            return folder / COMPLETE, f"it does not list {name}"
        if name not in now:
            return folder / name, "it is gone"
        if (now[name]["bytes"], now[name]["sha256"]) != files[name]:
            size, whole = now[name]["bytes"], files[name][0]
            told = f"{size} of {one_line(str(whole), LONGEST_NUMBER)} bytes"  # a damaged list holds any number
            return folder / name, "other bytes than were written" if size == whole else told
    return None


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def _event(line: Any) -> dict[str, Any]:
    """Return one line's value if it can be an event."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or type(line.get("step", 0)) is not int:
        raise ValueError("it is no event")
    return line


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
        if self.path.is_dir() and set(self.path.iterdir()) - set(self._leftovers()):
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
        except (OSError, ValueError) as error:  # ValueError: a name that holds a NUL
            raise self._unusable(error) from None
        finally:
            with suppress(OSError):  # another process has put something there meanwhile
                for folder in reversed(made):
                    folder.rmdir()

    def _unusable(self, error: OSError | ValueError) -> RunError:
        files = [path for path in (self.path, *self.path.parents) if os.path.isfile(path)]
        reason = getattr(error, "strerror", None) or error
        if files:
            return RunError(
                "a file lies where the output folder should be", got=files[0], fix="Choose another --output."
            )
        return RunError(
            f"the output folder cannot be made or written to ({reason})",
            got=one_line(str(self.path), 120),
            fix="Choose another --output, in a folder that you may write to.",
        )

    def claim(self, run_yaml: str) -> None:
        """Start a new run here; refuse a folder that already holds one, or holds anything else."""
        self.check_free()
        write_bytes(self.path / RUN, run_yaml.encode())

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one line to events.jsonl and return it."""
        line = {"kind": kind, "time": round(time.time(), 3), **fields}
        file = self.path / EVENTS
        with writing(file, fix="Make room, then go on with --resume."), open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        return line

    def events(self) -> list[dict[str, Any]]:
        """Return all whole events; a last line cut short by a crash is left out."""
        file = self.path / EVENTS
        if not file.exists():
            return []
        lines = file.read_bytes().split(b"\n")
        events = []
        for number, line in enumerate(lines[:-1], start=1):
            with reading(f"line {number} of {EVENTS} is damaged", file, fix="Delete that line.", kind=RunError):
                events += [_event(parse_json(line.decode("utf-8")))] if line else []
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
        with reading(f"{MANIFEST} is damaged", file, fix=REMAKE, kind=RunError):
            value: dict[str, Any] = read_json(file)
            if not re.fullmatch("[0-9a-f]{64}", value["data"]["digest"]):
                raise ValueError("the digest of the data is none")
            return value

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first; half-written ones are not among them."""
        found = (self.path / CHECKPOINTS).glob("step-*")
        whole = [path for path in found if NAMED.fullmatch(path.name) and (path / COMPLETE).is_file()]
        return sorted(whole, key=step_of)

    @contextmanager
    def checkpoint(self, step: int, *, best: int | None = None) -> Iterator[Path]:
        """Yield a folder to fill; it becomes checkpoints/step-N only if the block ends well. `best` was best so far."""
        with new_folder(self.path / CHECKPOINTS / f"step-{step}") as folder:
            yield folder
            write_json(folder / COMPLETE, {"step": step, "best": best, "files": contents(folder)})

    def clean(self) -> None:
        """Delete what a killed process left half-written or half-deleted; a folder that it was replacing comes back."""
        for path in [*_leftovers(self.path / CHECKPOINTS, "step-*"), *self._leftovers()]:
            replaced = path.with_name(path.name.removeprefix(".").rsplit(".", 2)[0])
            with writing(path):
                if path.suffix == ".old" and not replaced.exists():
                    os.replace(path, replaced)
                else:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _leftovers(self) -> list[Path]:
        return [path for name in (RUN, MANIFEST, EVENTS, ADAPTER, MODEL) for path in _leftovers(self.path, name)]

    def prune(self, *, keep: int, best: int | None) -> None:
        """Delete all but the last `keep` checkpoints, the best one, and those that were best to the last ones.

        For if the newest is lost, the run goes on from one before it, and may want its best one at the end.
        """
        whole = self.checkpoints()
        wanted = {best, *(_best_of(path) for path in whole[-keep:])}
        for path in whole[:-keep]:
            if step_of(path) not in wanted:
                discard(path)


def _best_of(checkpoint: Path) -> int | None:
    try:
        best = read_json(checkpoint / COMPLETE)["best"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: whoever reads the checkpoint says so
    return best if isinstance(best, int) else None
