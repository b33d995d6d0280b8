"""Read JSON and CSV so that every value arrives as it was written.

The readers that `datasets` has for them do not: its JSON reader turns the text "2020-01-01" into a time and 1 into 1.0
where a later row holds 2.5; its CSV reader (pandas) turns "007" into 7 and "None" into nothing, and where a text with
an unquoted comma comes first it shifts the columns without a word.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from decal.errors import DataError
from decal.reading import because, one_line, parse_json

Row = Mapping[str, Any]
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error)  # what an open file raises; gzip has two more kinds
OBJECT = 'Write each row as {"column": value, ...}.'


def decode(line: str, files: tuple[Path, ...]) -> Row:
    """Return the row in one line of a JSON-lines file; a DataError names the line and shows where it breaks."""
    try:
        row = parse_json(line.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        raise _broken_line(line, error, files) from None
    except ValueError as error:
        raise DataError(f"{_place(line, files)} cannot be understood: {error}", fix="Correct this line.") from None
    if not isinstance(row, dict):
        raise DataError(
            "each line must hold one JSON object",
            got=f"{one_line(line, 60)} in {_place(line, files)}",
            fix=OBJECT,
        )
    return row


def _broken_line(line: str, error: json.JSONDecodeError, files: tuple[Path, ...]) -> DataError:
    return DataError(
        f"{_place(line, files)} is not JSON: {_fault(error)}",
        fix="Correct or delete this line: each line holds one whole JSON object (or the whole file is one array).",
    )


def _fault(error: json.JSONDecodeError) -> str:
    near = one_line(error.doc[max(error.pos - 30, 0) : error.pos + 30], 60)
    return f"{error.msg.removesuffix(' at')} at column {error.colno}, near {near!r}"


def _place(line: str, files: tuple[Path, ...]) -> str:
    """Where a line stands, found by reading again: only for the text of an error."""
    for file in files:
        with _opened(file) as handle:
            for number, text in enumerate(handle, start=1):
                if text.rstrip("\r\n") == line.lstrip("\ufeff"):
                    return f"{file}, line {number}"
    return ", ".join(str(file) for file in files)


def is_array(file: Path) -> bool:
    """Whether a JSON file holds one array instead of an object a line."""
    with _opened(file) as handle:
        return _text(handle, file, 200).lstrip().startswith("[")


def read_arrays(files: Iterable[Path]) -> Iterator[Row]:
    """Yield the objects of JSON files that hold one array each."""
    for file in files:
        with _opened(file) as handle:
            text = _text(handle, file)
        try:
            rows = parse_json(text)
        except json.JSONDecodeError as error:
            first = text.lstrip().partition("\n")[0].strip()
            if error.msg == "Extra data" and first.endswith("]"):  # no array of rows, but an array on each line
                line = text[: text.index(first)].count("\n") + 1
                got = f"{one_line(first, 60)} in {file}, line {line}"
                raise DataError("each line must hold one JSON object", got=got, fix=OBJECT) from None
            raise DataError(
                f"{file}, line {error.lineno} is not JSON: {_fault(error)}",
                fix="Correct the file: it must hold an array of objects.",
            ) from None
        except ValueError as error:
            raise DataError(f"{file} cannot be understood: {error}", fix="Correct the file.") from None
        if not isinstance(rows, list):
            raise DataError("a JSON file must hold an array of objects", got=file, fix="Write it as [{...}, {...}].")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                shown = json.dumps(row, ensure_ascii=False)[:60]
                raise DataError(
                    f"{file} must hold an array of objects, and its item {number} is none", got=shown, fix=OBJECT
                )
        yield from rows


def read_csv(files: Iterable[Path]) -> Iterator[Row]:
    """Yield the rows of CSV (or tab-separated) files with a header; all cells are text."""
    for file in files:
        with _opened(file) as handle:
            reader = csv.reader(handle, delimiter="\t" if ".tsv" in file.suffixes else ",", strict=True)
            try:
                names = next(reader, [])
                twice = sorted({name for name in names if names.count(name) > 1})
                if twice:
                    raise DataError(f"{file} names a column twice", got=", ".join(twice), fix="Rename one of them.")
                for cells in reader:
                    if cells and len(cells) != len(names):
                        raise DataError(
                            f"{file}, line {reader.line_num} has {len(cells)} cells where the header has {len(names)}",
                            got=repr(cells)[:120],
                            fix="Put cells that hold the separator or a line break in double quotes.",
                        )
                    if cells:
                        yield dict(zip(names, cells, strict=True))
            except csv.Error as error:
                raise DataError(
                    f"{file}, line {reader.line_num} is not CSV: {error}", fix="Correct or delete this line."
                ) from None
            except UNREADABLE as error:
                raise unreadable(error, str(file)) from error


def unreadable(error: BaseException, name: str) -> DataError:
    """Return the DataError for data that could not be read at all."""
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        why = f"{cause.reason} at byte {cause.start}"
        return DataError(f"the data is not UTF-8 text: {why}", got=name, fix="Save the file as UTF-8.")
    return DataError(
        f"the data set cannot be read ({because(cause)})",
        got=name,
        fix="Check the name, the split and the network (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE=1 apply).",
    )


def _opened(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")


def _text(handle: TextIO, file: Path, size: int = -1) -> str:
    try:
        return handle.read(size)
    except UNREADABLE as error:
        raise unreadable(error, str(file)) from error
