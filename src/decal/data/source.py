"""Open the rows of a data set: local files, a folder of files, or a repository on the hub.

`datasets` reads them, from disk or as a stream; the values of JSON and CSV files are read by `strict`, which says why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from decal.data import strict
from decal.errors import DataError, nearest

Row = Mapping[str, Any]

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SHUFFLE_BUFFER = 1000  # rows held while a stream is shuffled


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one split, in order, readable again and again; numbered from 1 (blank lines do not count)."""

    name: str
    data: Any  # datasets.Dataset, datasets.IterableDataset or a list of rows
    lines: tuple[Path, ...] = ()  # the JSON-lines files behind `data`, whose rows are then single lines of text
    first: int = 1  # the number of the first row

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        names = _class_names(self.data)
        number = self.first
        rows = iter(self.data)
        while True:
            with _reading(self.name):  # a stream meets only now what is missing or broken
                row = next(rows, None)
            if row is None:
                return
            if self.lines:
                if not row["text"].strip():
                    continue
                row = strict.decode(row["text"], self.lines)
            elif not isinstance(self.data, list):
                row = {
                    key: names[key](value) if key in names and value is not None else _prune(value)
                    for key, value in row.items()
                }
            yield number, row
            number += 1

    def part(self, *, skip: int = 0, limit: int | None = None) -> Rows:
        """Return the rows after the first `skip`, at most `limit` of them."""
        data = self.data
        if isinstance(data, list):
            data = data[skip:] if limit is None else data[skip : skip + limit]
        else:
            data = data.skip(skip) if skip else data
            data = data if limit is None else data.take(limit)
        return Rows(name=self.name, data=data, lines=self.lines, first=self.first + skip)

    def shuffled(self, *, seed: int, epoch: int) -> Rows:
        """Return the rows of a stream in the order of one epoch: files shuffled, then rows within a buffer.

        The numbers then count rows as they come, not as they stand in the files.
        """
        data = self.data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        data.set_epoch(epoch)
        return Rows(name=self.name, data=data, lines=self.lines)


def open_rows(path: str, *, split: str, streaming: bool = False, limit: int | None = None) -> Rows:
    """Open a file, a folder or a hub repository (`owner/name`, or `owner/name:config`).

    A single file is its own split; in a folder the file names say the split (`train`, `valid`, `test`, ...).
    Raises DataError if nothing is there, the split is unknown, or a file cannot be read.
    """
    rows = _open(path, split=split, streaming=streaming)
    return rows if limit is None else rows.part(limit=limit)


def _open(path: str, *, split: str, streaming: bool) -> Rows:
    place = Path(path).expanduser()
    if place.is_file():
        return _open_files([place], name=path, streaming=streaming)
    if place.is_dir():
        if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
            return _open_saved(place, split=split, streaming=streaming)
        files = split_files(place)
        split = SPLIT_WORDS.get(split, split)
        if split not in files:
            raise DataError(
                f"the folder has no split {split!r}{nearest(split, files)}",
                got=f"{path} with {_words(files)}",
                fix="Name a split that is there; the file names say it (train, valid, test).",
            )
        return _open_files(files[split], name=f"{path} ({split})", streaming=streaming)
    if _looks_local(path):
        raise _missing(place)
    repository, _, config = path.partition(":")
    data = _load(repository, name=path, config=config or None, split=split, streaming=streaming)
    return Rows(name=f"{path} ({split})", data=data)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by split; files whose names say none are `train` if no file says `train`."""
    found = sorted(file for file in folder.rglob("*") if file.is_file() and _format(file) and not _hidden(file, folder))
    if not found:
        raise DataError(
            "the folder holds no data files", got=folder, fix=f"decal reads {', '.join(FORMATS)} (also .jsonl.gz)."
        )
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for file in found:
        name = _split_of(file.relative_to(folder))
        if name is None:
            unnamed.append(file)
        else:
            splits.setdefault(name, []).append(file)
    if unnamed and "train" not in splits:
        splits["train"] = unnamed
    return splits


def _split_of(file: Path) -> str | None:
    for part in (file.name, *reversed(file.parts[:-1])):
        for word in re.split(r"[-._ ]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _hidden(file: Path, folder: Path) -> bool:
    own_files = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
    return file.name in own_files or any(part.startswith(".") for part in file.relative_to(folder).parts)


def _format(file: Path) -> str | None:
    suffixes = [s.lower() for s in file.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _open_files(files: list[Path], *, name: str, streaming: bool) -> Rows:
    kinds = {_format(file) for file in files}
    kind = kinds.pop()
    if kinds:
        raise DataError(
            "one split mixes file formats", got=", ".join(file.name for file in files), fix="Keep one format a split."
        )
    if kind is None:
        raise DataError("unknown kind of data file", got=files[0], fix=f"decal reads {', '.join(FORMATS)} (also .gz).")
    for file in files:
        if file.stat().st_size == 0:
            raise DataError("the data file is empty", got=file, fix="Give a file with at least one row.")
    if kind == "parquet" or (kind == "json" and not strict.is_array(files[0])):
        paths = {"train": [str(file.resolve()) for file in files]}
        builder = "parquet" if kind == "parquet" else "text"
        data = _load(builder, name=name, data_files=paths, split="train", streaming=streaming)
        return Rows(name=name, data=data, lines=tuple(files) if kind == "json" else ())
    read = strict.read_csv if kind == "csv" else strict.read_arrays
    data = (
        datasets.IterableDataset.from_generator(read, gen_kwargs={"files": files}) if streaming else list(read(files))
    )
    return Rows(name=name, data=data)


def _open_saved(folder: Path, *, split: str, streaming: bool) -> Rows:
    """A folder that `Dataset.save_to_disk` wrote."""
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(
                f"the data set has no split {split!r}{nearest(split, data)}",
                got=f"{folder} with {_words(data)}",
                fix="Name a split that is there.",
            )
        data = data[split]
    return Rows(name=str(folder), data=data.to_iterable_dataset() if streaming else data)


def _load(builder: str, *, name: str, config: str | None = None, split: str, **options: Any) -> Any:
    with _quiet(), _reading(name):
        return datasets.load_dataset(builder, config, split=split, **options)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What `datasets` raises becomes a DataError that names what was read."""
    try:
        yield
    except DataError:
        raise
    except (*strict.UNREADABLE, ValueError, DatasetsError) as error:
        raise strict.unreadable(error, name) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Library code never prints: no progress bars of `datasets` while it loads."""
    was_on = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.utils.enable_progress_bars()


def _class_names(data: Any) -> dict[str, Any]:
    """For columns that hold class numbers with names: the function from number to name (people mean the name)."""
    features = getattr(data, "features", None) or {}
    return {key: kind.int2str for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)}


def _prune(value: Any) -> Any:
    """Take away the None that Arrow puts where one row lacks a key that another has (in messages, calls, tools)."""
    if isinstance(value, dict):
        return {key: _prune(inner) for key, inner in value.items() if inner is not None}
    return [_prune(inner) for inner in value] if isinstance(value, list) else value


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or _format(Path(path)) is not None


def _missing(place: Path) -> DataError:
    folder = place.parent
    hint = ""
    if folder.is_dir():
        hint = nearest(place.name, [entry.name for entry in folder.iterdir()])
    return DataError(f"no such data file or folder{hint}", got=place, fix="Check the path.")


def _words(names: Any) -> str:
    return ", ".join(sorted(str(name) for name in names)) or "nothing"
