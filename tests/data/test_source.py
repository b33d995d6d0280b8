"""Opening rows from files, folders and saved data sets, and what is said when they cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from decal.data.source import open_rows
from decal.errors import DataError
from tests.data.conftest import Write

ROWS: list[dict[str, Any]] = [{"text": "2020-01-01", "n": 1}, {"text": "zwei\u2028 🙂", "n": 2.5}, {"text": "None"}]


def read(path: str | Path, *, split: str = "train", **options: Any) -> list[Any]:
    return [row for _, row in open_rows(str(path), split=split, **options)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "array"])
def test_json_values_stay_what_they_are(tmp_path: Path, kind: str, streaming: bool) -> None:
    """The JSON reader of `datasets` would make a time of the first text and 1.0 of the first number."""
    path = tmp_path / f"data.{'json' if kind == 'array' else kind}"
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
    text = json.dumps(ROWS, indent=1) if kind == "array" else "\ufeff" + lines
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    rows = read(path, streaming=streaming)
    assert rows == ROWS
    assert type(rows[0]["n"]) is int
    assert read(path, streaming=streaming, limit=1) == ROWS[:1]
    assert [number for number, _ in open_rows(str(path), split="train", streaming=streaming)] == [1, 2, 3]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "separator"), [("data.csv", ","), ("data.tsv", "\t"), ("data.csv.gz", ",")])
def test_csv_cells_stay_text(tmp_path: Path, name: str, separator: str, streaming: bool) -> None:
    path = tmp_path / name
    text = "\n".join(separator.join(cells) for cells in [("text", "label"), ('"a\nb"', "None"), ("NA", "007")])
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert read(path, streaming=streaming) == [{"text": "a\nb", "label": "None"}, {"text": "NA", "label": "007"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_class_numbers_become_names_and_absent_keys_stay_absent(tmp_path: Path, streaming: bool) -> None:
    made = datasets.Dataset.from_list(
        [
            {"label": 1, "messages": [{"role": "user", "content": "a", "name": "x"}]},
            {"label": None, "messages": [{"role": "user", "content": "b"}]},
        ]
    ).cast_column("label", datasets.ClassLabel(names=["lost", "found"]))
    path = tmp_path / "data.parquet"
    with datasets.utils.tqdm(disable=True):
        datasets.utils.disable_progress_bars()
        made.to_parquet(path)
        datasets.utils.enable_progress_bars()
    assert read(path, streaming=streaming) == [
        {"label": "found", "messages": [{"role": "user", "content": "a", "name": "x"}]},
        {"label": None, "messages": [{"role": "user", "content": "b"}]},
    ]


def test_a_folder_is_split_by_its_file_names(write: Write, tmp_path: Path) -> None:
    write({"text": "a"}, name="folder/my.train.jsonl")
    write({"text": "b"}, name="folder/valid-00001.jsonl")
    write({"text": "c"}, name="folder/test/part.jsonl")
    write({"text": "d"}, name="folder/train_2.jsonl")
    (tmp_path / "folder/README.md").write_text("not data")
    folder = tmp_path / "folder"
    assert read(folder) == [{"text": "a"}, {"text": "d"}]
    assert read(folder, split="validation") == read(folder, split="dev") == [{"text": "b"}]
    assert read(folder, split="test", streaming=True) == [{"text": "c"}]
    with pytest.raises(DataError, match=r"no split 'tests'; nearest is 'test' .*with test, train, validation"):
        read(folder, split="tests")


def test_a_folder_of_unnamed_files_is_train(write: Write, tmp_path: Path) -> None:
    write({"text": "b"}, name="folder/b.jsonl")
    write({"text": "a"}, name="folder/a.jsonl")
    assert read(tmp_path / "folder") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset(tmp_path: Path, streaming: bool) -> None:
    datasets.utils.disable_progress_bars()
    made = datasets.Dataset.from_list([{"text": "a"}])
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "two")
    datasets.utils.enable_progress_bars()
    assert read(tmp_path / "one", streaming=streaming) == [{"text": "a"}]
    assert read(tmp_path / "two", split="test", streaming=streaming) == [{"text": "a"}]
    with pytest.raises(DataError, match=r"no split 'dev' .*test, train"):
        read(tmp_path / "two", split="dev")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_line_is_shown(tmp_path: Path, packed: bool, streaming: bool) -> None:
    path = tmp_path / ("data.jsonl.gz" if packed else "data.jsonl")
    text = '{"text": "a"}\n\n{"text": "b", "label": oops}\n'
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(DataError, match=r"data\.jsonl.*, line 3 is not JSON: .* column 24, near '.*\"label\": oops"):
        read(path, streaming=streaming)


def test_a_broken_array_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"text": "a"},\n {"text": }]')
    with pytest.raises(DataError, match=r"line 2 is not JSON.*near '.*\"text\": \}"):
        read(path)
    path.write_text('[{"text": "a"}, 2]')
    with pytest.raises(DataError, match=r"array of objects, and its item 2 is none .got: 2"):
        read(path)
    path.write_text("\n[1, 2]\n[3, 4]\n")
    with pytest.raises(DataError, match=r"each line must hold one JSON object .got: \[1, 2\] in .*data\.json, line 2"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', r'one JSON object .got: "b" in .*a\.jsonl, line 2'),
        ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', r"one JSON object .got: \[1, 2\] in .*a\.jsonl, line 2"),
        ("a.csv", b"text,text\n1,2\n", r"a\.csv names a column twice .got: text"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 1000)[:40], "cannot be read"),
        ("a.csv", b"text,label\nhello, you,x\na,b\n", r"line 2 has 3 cells where the header has 2 .got: \['hello', "),
        ("a.csv", b'text,label\n"a"b,x\n', "line 2 is not CSV"),
        ("a.parquet", b"nothing of the sort", "cannot be read"),
        ("a.docx", b"x", r"unknown kind of data file .*decal reads \.jsonl"),
    ],
)
def test_unreadable_files_say_why(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(path)


def test_a_missing_file_names_the_nearest(write: Write, tmp_path: Path) -> None:
    write({"text": "a"}, name="train.jsonl")
    with pytest.raises(DataError, match=r"no such data file or folder; nearest is 'train\.jsonl'"):
        read(tmp_path / "trian.jsonl")


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data files"):
        read(tmp_path)


def test_mixed_formats_in_one_split(write: Write, tmp_path: Path) -> None:
    write({"text": "a"}, name="folder/a.jsonl")
    write({"text": "a"}, name="folder/b.csv")
    with pytest.raises(DataError, match=r"mixes file formats .got: a\.jsonl, b\.csv"):
        read(tmp_path / "folder")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_without_network_says_so(streaming: bool) -> None:
    with pytest.raises(DataError, match=r"cannot be read .*HF_HUB_OFFLINE"):
        read("nobody/nothing", streaming=streaming)


@pytest.mark.parametrize("array", [False, True])
def test_parts_of_a_stream(tmp_path: Path, array: bool) -> None:
    rows = [{"text": str(i)} for i in range(10)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows) if array else "\n".join(map(json.dumps, rows)))
    stream = open_rows(str(path), split="train", streaming=True, limit=8)
    rest = stream.part(skip=3)
    assert [(n, r["text"]) for n, r in rest] == [(i + 1, str(i)) for i in range(3, 8)]
    orders = [[r["text"] for _, r in rest.shuffled(seed=1, epoch=epoch)] for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == ["3", "4", "5", "6", "7"]
