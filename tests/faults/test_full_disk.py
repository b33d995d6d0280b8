"""A disk that is full, read-only or another's, at every write of every job: one plain error, and nothing half-done.

Refused are, in turn, all of a job's file operations (by a hook that Python calls before them); writes beyond a file's
size, whatever language does them (a limit of the kernel's); and writes to a real file system that is too small.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from decal.errors import AdapterError, DecalError
from decal.files import peft_files
from decal.model.load import load_model
from decal.model.wrapper import PeftModel
from decal.recipes.finetune import finetune
from decal.recipes.merge import merge
from decal.recipes.quantize import quantize
from decal.recipes.quickstart import quickstart
from decal.rundir import RunDir, altered
from decal.spec import LoraConfig, QuantConfig, RunConfig
from tests.cli.tiny import Decal, lines_of
from tests.faults.operations import NoMount, disk, refusing, seen, small_files
from tests.training import tiny_run

NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EACCES)
WIDEST = 160  # columns of a line of an error beside the paths in it


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something that writes under a folder; what must hold there after it failed, and after it was done again."""

    do: Callable[[Path], object]
    failed: Callable[[Path], None]
    again: Callable[[Path], None]
    before: Callable[[Path], object] = lambda place: None  # what lies there already


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    """Here they write to pytest's file, which would be the first one that must not grow."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, data, and a finished run in `whole` of the settings of `training`."""
    folder = tiny_run.make_files(tmp_path_factory.mktemp("files"))
    finetune(training(folder, folder / "whole"))
    return folder


def training(files: Path, output: Path) -> RunConfig:
    """Return the shortest run that writes all that runs write: three steps, a save at each, an evaluation."""
    settings = tiny_run.config(files, steps=3, save_every=1, eval_every=2, keep=1, accumulate=1)
    return RunConfig(**{**settings.model_dump(), "output": str(output)})


def jobs(files: Path) -> dict[str, Job]:
    """Return every job that writes, the smallest of its kind."""
    whole, adapter, model = files / "whole", str(files / "whole" / "adapter"), str(files / "model")
    settings = QuantConfig(format="nf4", allow_dense=True)

    def train(place: Path) -> object:
        run = RunDir(place / "run")
        return finetune(training(files, run.path), resume=run.holds_run())

    def only_whole_checkpoints(place: Path) -> None:
        names = ("trainable.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
        for checkpoint in RunDir(place / "run").checkpoints():
            assert altered(checkpoint, names) is None

    def same_adapter(place: Path) -> None:
        mine, other = (peft_files.read_tensors(run / "adapter") for run in (place / "run", whole))
        assert all(torch.equal(mine[key], other[key]) for key in other)

    def absent_or_whole(place: Path) -> None:
        if (place / "out").exists():  # refused was only the deletion of what was no longer needed
            load_model(place / "out", device="cpu")
            shutil.rmtree(place / "out")

    def save(place: Path) -> None:
        wrapped = PeftModel(load_model(model, device="cpu"), LoraConfig(r=2, init_lora_weights=False))
        wrapped.save_pretrained(place / "out")

    def old_or_new(place: Path) -> None:
        """The old adapter whole, the new one whole, or a refusal; never one's factors under the other's settings."""
        try:
            config, tensors = peft_files.read(place / "out")
        except AdapterError:
            return
        old = peft_files.read_tensors(whole / "adapter")
        kept = tensors.keys() == old.keys() and all(torch.equal(tensors[key], old[key]) for key in old)
        assert config.r == (4 if kept else 2)

    def new(place: Path) -> None:
        PeftModel.from_pretrained(load_model(model, device="cpu"), place / "out")
        assert peft_files.read(place / "out")[0].r == 2

    def whole_model(place: Path) -> None:
        load_model(place / "out", device="cpu")

    return {
        "train": Job(do=train, failed=only_whole_checkpoints, again=same_adapter),
        "merge": Job(
            do=lambda place: merge(adapter, place / "out", dtype="fp32"), failed=absent_or_whole, again=whole_model
        ),
        "quantize": Job(
            do=lambda place: quantize(model, place / "out", settings, report=True),
            failed=absent_or_whole,
            again=whole_model,
        ),
        "save_pretrained": Job(
            do=save,
            failed=old_or_new,
            again=new,
            before=lambda place: shutil.copytree(whole / "adapter", place / "out"),
        ),
    }


def check_text(error: DecalError, place: Path) -> None:
    """Raise AssertionError unless an error says what and how to mend it, each in one line of a terminal."""
    for line in (error.what, error.fix):
        assert line
        assert "\n" not in line
        assert len(line.replace(str(place), "")) <= WIDEST, line


def number_of_operations(job: Job, place: Path) -> int:
    """Return how many file operations a job makes where nothing is refused."""
    names: list[str] = []
    place.mkdir()
    job.before(place)
    with seen(place, lambda _, name: names.append(name)):
        job.do(place)
    return len(names)


def refuse_from_each(job: Job, folder: Path, places: Iterable[int], number: int) -> int:
    """Refuse from each of the places on, look at what lies there, do the job again with room; return the errors."""
    errors = 0
    for after in places:
        place = folder / f"{number}-{after}"
        place.mkdir()
        job.before(place)
        with refusing(place, after=after, number=number) as names:
            try:
                job.do(place)
            except DecalError as error:
                check_text(error, place)
                errors += 1
            except OSError as error:
                raise AssertionError(f"refused {names}") from error
        job.failed(place)
        job.do(place)
        job.again(place)
    return errors


JOBS = ("train", "merge", "quantize", "save_pretrained")


@pytest.mark.parametrize("name", JOBS)
def test_a_disk_that_refuses_in_the_middle_of_a_job(files: Path, tmp_path: Path, name: str) -> None:
    job = jobs(files)[name]
    total = number_of_operations(job, tmp_path / "whole")
    assert refuse_from_each(job, tmp_path, [total // 3], errno.ENOSPC) == 1
    assert refuse_from_each(job, tmp_path, [2 * total // 3], errno.EROFS) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", JOBS)
def test_a_disk_that_refuses_at_any_write(files: Path, tmp_path: Path, name: str, number: int) -> None:
    job = jobs(files)[name]
    total = number_of_operations(job, tmp_path / "whole")
    errors = refuse_from_each(job, tmp_path, range(total), number)
    print(f"{name}, {errno.errorcode[number]}: {total} file operations refused in turn, {errors} errors")
    assert errors > total / 2  # the last ones delete what is no longer needed, which may fail


@pytest.mark.parametrize("name", JOBS)
def test_a_file_that_cannot_grow(files: Path, tmp_path: Path, name: str) -> None:
    """The kernel's limit meets the libraries in Rust too, whose errors are of other types."""
    job = jobs(files)[name]
    for size in (0, 600, 2000):  # nothing; the smallest files; all but tensors and tokenizers
        place = tmp_path / str(size)
        place.mkdir()
        job.before(place)
        with small_files(size), pytest.raises(DecalError, match="File too large") as raised:
            job.do(place)
        check_text(raised.value, place)
        job.failed(place)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", JOBS)
def test_a_real_disk_of_any_size_that_is_too_small(files: Path, tmp_path: Path, name: str) -> None:
    job = jobs(files)[name]
    pages = range(4096, 1 << 20, 4096 if name == "save_pretrained" else 7 * 4096)
    errors = 0
    for size in pages:
        try:
            with disk(tmp_path / str(size), size) as place:
                error = error_of(job, place)
                if error is None:
                    break
                assert "No space left" in error.what
                errors += 1
                job.failed(place)
        except NoMount:
            pytest.skip("no right to mount a file system here")
    else:
        raise AssertionError("the disk was never large enough")
    print(f"{name}: {errors} disks were too small, one of {size:,} bytes was not")
    assert errors >= 2


def error_of(job: Job, place: Path) -> DecalError | None:
    """Return the error of a job where the disk is full, None if it had room; any other error is a failure."""
    try:
        job.do(place)
    except DecalError as error:
        check_text(error, place)
        return error
    return None


def test_a_disk_without_room_for_the_quickstarts_tickets(tmp_path: Path) -> None:
    with small_files(100), pytest.raises(DecalError, match=r"train\.jsonl could not be written \(File too large\)"):
        quickstart(tmp_path / "out", training=8, held_out=2)
    assert not list((tmp_path / "out" / "tickets").iterdir())


@pytest.mark.parametrize("command", ["train", "merge", "quantize", "quickstart"])
def test_the_command_line_says_it_in_lines(decal: Decal, files: Path, tmp_path: Path, command: str) -> None:
    out, adapter, model = tmp_path / "out", files / "whole" / "adapter", files / "model"
    words: dict[str, list[object]] = {
        "train": ["train", "-m", model, "-d", files / "data.jsonl", "-o", out, "--steps", "1"],
        "merge": ["merge", adapter, "--out", out],
        "quantize": ["quantize", model, out, "--allow-dense"],
        "quickstart": ["quickstart", "-o", out],
    }
    with refusing(tmp_path, after=0, number=errno.EROFS):
        said = decal(*words[command])
    assert said.code == 2
    first, *_, fix = lines_of(said.err)
    assert "Read-only file system" in first
    assert "choose" in fix.lower()
