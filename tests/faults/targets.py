"""The files that decal reads: how each is read in earnest, and what a damaged one that is accepted may mean."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]  # it brings no types
import pyarrow.parquet  # type: ignore[import-untyped]
import torch
import yaml
from torch import Tensor

from decal.cli import adapter_facts
from decal.data import prepare as data_door
from decal.data.source import open_rows
from decal.files import checkpoint, sealed
from decal.model.load import load_model, load_tokenizer, meta_model
from decal.model.wrapper import PeftModel
from decal.recipes import compare
from decal.recipes.finetune import finetune
from decal.rundir import RunDir
from decal.spec import DataConfig, read_run_config
from decal.training import job as jobs
from decal.training import optim, state
from tests.training import tiny_run

DATA = {"jsonl": "lines", "json": "json", "csv": "text", "tsv": "text", "parquet": "bytes", "jsonl.gz": "bytes"}
IDS = torch.tensor([[10, 20, 30, 40, 50]])


@dataclass(frozen=True, kw_only=True)
class Target:
    """One file. `read` uses it as decal does and returns what came of it, to be compared."""

    group: str
    file: Path
    kind: str  # of damage
    read: Callable[[], Any]
    meant: Callable[[bytes, bytes, Any], bool]  # whether another result is what the changed file says


def always(before: bytes, after: bytes, result: Any) -> bool:
    """Whatever the file says now is what it says: it holds nothing that could tell."""
    return True


def never(before: bytes, after: bytes, result: Any) -> bool:
    """Another result is a wrong one: a digest must have seen it."""
    return False


def other_json(before: bytes, after: bytes, result: Any) -> bool:
    """The text holds another value than before, so it asks for something else."""
    return bool(json.loads(before) != json.loads(after))


def other_yaml(before: bytes, after: bytes, result: Any) -> bool:
    return bool(yaml.safe_load(before) != yaml.safe_load(after))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def all_targets(folder: Path) -> list[Target]:
    """Make a model, data, a run that was stopped after some checkpoints and a finished one; return their files."""
    tiny_run.make_files(folder)
    config = tiny_run.config(folder, steps=4, save_every=2, eval_every=2, keep=5)
    finetune(config)
    return [
        *adapters(folder / "run" / "adapter", folder / "model"),
        *checkpoints(folder, config),
        *runs(RunDir(folder / "run")),
        *data(folder),
        *bases(folder),
    ]


def adapters(adapter: Path, model: Path) -> list[Target]:
    base = load_model(model, device="cpu")
    strict = json.loads((adapter / sealed.SEAL).read_text())["version"] > 1  # from there on with a digest

    def read() -> Any:
        compare.base_of([str(adapter)])
        adapter_facts.read(adapter)
        seal = sealed.read(adapter)
        wrapped = PeftModel.from_pretrained(base, adapter)
        try:
            with torch.no_grad():
                return seal, digest({"": wrapped(input_ids=IDS).logits})
        finally:
            wrapped.unload()

    tensors = never if strict else always
    return [
        Target(group="adapter", file=adapter / "adapter_config.json", kind="json", read=read, meant=other_json),
        Target(group="adapter", file=adapter / "decal.json", kind="json", read=read, meant=other_json),
        Target(group="adapter", file=adapter / "adapter_model.safetensors", kind="bytes", read=read, meant=tensors),
    ]


def checkpoints(folder: Path, config: Any) -> list[Target]:
    job = jobs.prepare(config)
    last = folder / "run" / "checkpoints" / "step-4"

    def read() -> Any:
        training = state.Training(
            model=job.model,
            optimizer=optim.build(job.model, config.train, say=lambda text: None),
            scaler=job.numbers.scaler(),
            batches=job.batches,
            progress=state.Progress(),
        )
        state.check(last)
        state.load(last, training)
        slots = training.optimizer.state.values()
        moments = {f"{i}{name}": value for i, slot in enumerate(slots) for name, value in slot.items()}
        return (
            digest(state.trainable(job.model)),
            digest(moments),
            digest({"": torch.get_rng_state()}),
            asdict(training.progress),
            dict(job.batches.state_dict()),
        )

    kinds = {state.TRAINABLE: "bytes", state.OPTIMIZER: "bytes", state.RNG: "bytes"}
    kinds |= {state.STATE: "json", "complete.json": "json"}
    return [
        Target(group="checkpoint", file=last / name, kind=kind, read=read, meant=never) for name, kind in kinds.items()
    ]


def runs(run: RunDir) -> list[Target]:
    def settings() -> Any:
        return read_run_config(run.path / "run.yaml").model_dump()

    def events() -> Any:
        found = run.events()
        whole = (run.path / "events.jsonl").read_bytes()
        run.rewind(2)
        (run.path / "events.jsonl").write_bytes(whole)
        return found

    return [
        Target(group="run", file=run.path / "run.yaml", kind="yaml", read=settings, meant=other_yaml),
        Target(group="run", file=run.path / "manifest.json", kind="json", read=run.manifest, meant=other_json),
        Target(group="run", file=run.path / "events.jsonl", kind="lines", read=events, meant=always),
    ]


def data(folder: Path) -> list[Target]:
    tokenizer = load_tokenizer(folder / "model")
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()][:8]
    flat = [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in rows]
    place = folder / "rows"
    place.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (place / "rows.jsonl").write_bytes(lines)
    (place / "rows.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (place / "rows.json").write_text(json.dumps(rows))
    for name, mark in (("csv", ","), ("tsv", "\t")):
        with open(place / f"rows.{name}", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=mark)
            writer.writeheader()
            writer.writerows(flat)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), place / "rows.parquet")

    def reader(file: Path) -> Callable[[], Any]:
        def read() -> Any:
            found = [dict(row) for _, row in open_rows(str(file), split="train")]
            settings = DataConfig(path=str(file), max_length=64)
            return found, data_door.prepare(settings, tokenizer, seed=0).ledger.digest

        return read

    return [
        Target(
            group="data",
            file=place / f"rows.{name}",
            kind=kind,
            read=reader(place / f"rows.{name}"),
            meant=as_read(name),
        )
        for name, kind in DATA.items()
    ]


def as_read(name: str) -> Callable[[bytes, bytes, Any], bool]:
    """Return whether rows are those that Python's own readers find in a file of that kind."""

    def check(before: bytes, after: bytes, result: Any) -> bool:
        rows = result[0]
        if name == "parquet":
            return bool(rows == pyarrow.parquet.read_table(io.BytesIO(after)).to_pylist())
        text = (gzip.decompress(after) if name.endswith("gz") else after).decode("utf-8-sig")
        if name.startswith("jsonl"):
            lines = text.replace("\r", "\n").split("\n")
            return bool(rows == [json.loads(line) for line in lines if line.strip()])
        if name == "json":
            return bool(rows == json.loads(text))
        mark = "\t" if name == "tsv" else ","
        return bool(rows == list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, strict=True)))

    return check


def bases(folder: Path) -> list[Target]:
    """A folder with one file of weights, and one with several and an index."""
    one, several = folder / "base", folder / "sharded"
    shutil.copytree(folder / "model", one)
    shutil.copytree(folder / "model", several)
    (several / "model.safetensors").unlink()
    load_model(folder / "model", device="cpu").save_pretrained(several, max_shard_size="40KB")  # type: ignore[operator]
    rows = str(folder / "data.jsonl")

    def reader(base: Path) -> Callable[[], Any]:
        def read() -> Any:
            meta_model(base)
            model = load_model(base, device="cpu")
            tokenizer = load_tokenizer(base)
            ledger = data_door.prepare(DataConfig(path=rows, max_length=64, limit=4), tokenizer, seed=0).ledger
            with torch.no_grad():
                logits: Any = model(input_ids=IDS)
            return digest({"": logits.logits}), ledger.digest, checkpoint.fingerprint(base)

        return read

    texts = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    return [
        *(Target(group="base", file=one / n, kind="json", read=reader(one), meant=other_json) for n in texts),
        Target(group="base", file=one / "chat_template.jinja", kind="text", read=reader(one), meant=always),
        Target(group="base", file=one / "model.safetensors", kind="bytes", read=reader(one), meant=always),
        Target(
            group="base",
            file=several / checkpoint.INDEX,
            kind="json",
            read=reader(several),
            meant=never,
        ),
        Target(
            group="base",
            file=sorted(several.glob("model-*.safetensors"))[0],
            kind="bytes",
            read=reader(several),
            meant=always,
        ),
    ]
