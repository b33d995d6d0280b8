"""Checkpoints one tensor at a time: against transformers' and the hub's own files, and what tells weights apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file

from decal.errors import DecalError
from decal.files import checkpoint
from decal.files.checkpoint import INDEX, WEIGHTS, Checkpoint, Writer

TENSORS = {f"layer.{i}.weight": torch.arange(256.0).view(16, 16) + i for i in range(5)}
ONE = 16 * 16 * 4  # bytes of one of them


@pytest.mark.parametrize("shard", [100 * ONE, 2 * ONE])
def test_reads_what_the_hub_library_writes(tmp_path: Path, shard: int) -> None:
    save_torch_state_dict(TENSORS, tmp_path, max_shard_size=shard)
    read = Checkpoint(tmp_path)
    assert read.file_of.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert torch.equal(read.tensor(key), tensor)
        assert read.shape(key) == (16, 16)


@pytest.mark.parametrize(("shard", "files"), [(100 * ONE, 1), (2 * ONE + 500, 3), (ONE // 2, 6)])
def test_writing_goes_on_where_the_folder_ends(tmp_path: Path, shard: int, files: int) -> None:
    save_file({"first": torch.ones(ONE // 4)}, tmp_path / WEIGHTS)
    with Writer(tmp_path, shard=shard) as writer:
        for key, tensor in TENSORS.items():
            writer.add({key: tensor})
    written = sorted(file.name for file in tmp_path.iterdir())
    assert written == ([WEIGHTS] if files == 1 else [*_names(files), INDEX])
    read = Checkpoint(tmp_path)
    assert read.file_of.keys() == {"first", *TENSORS}
    assert all(torch.equal(read.tensor(key), tensor) for key, tensor in TENSORS.items())


def _names(files: int) -> list[str]:
    return [f"model-{i:05}-of-{files:05}.safetensors" for i in range(1, files + 1)]


def test_nothing_gets_its_name_when_writing_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with Writer(tmp_path, shard=ONE) as writer:
            writer.add(TENSORS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (tmp_path / WEIGHTS).exists()
    assert not (tmp_path / INDEX).exists()


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    def of(name: str, tensors: dict[str, torch.Tensor], shard: int = 100 * ONE) -> str | None:
        save_torch_state_dict(tensors, tmp_path / name, max_shard_size=shard)
        return checkpoint.fingerprint(tmp_path / name)

    (tmp_path / "one").mkdir()
    first = of("one", TENSORS)
    (tmp_path / "split").mkdir()
    assert of("split", TENSORS, shard=2 * ONE) == first
    for name, other in {
        "value": {**TENSORS, "layer.3.weight": TENSORS["layer.3.weight"] + 1e-3},
        "one row": {**TENSORS, "layer.1.weight": TENSORS["layer.1.weight"] * (torch.arange(16) != 8)[:, None]},
        "later rows": {**TENSORS, "layer.2.weight": torch.cat([torch.arange(240.0), torch.ones(16)]).view(16, 16)},
        "name": {("layer.9.weight" if "4" in key else key): tensor for key, tensor in TENSORS.items()},
        "dtype": {key: tensor.bfloat16() for key, tensor in TENSORS.items()},
        "shape": {key: tensor.view(8, 32) for key, tensor in TENSORS.items()},
    }.items():
        (tmp_path / name).mkdir()
        assert of(name, other) != first, name
    assert checkpoint.fingerprint(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(DecalError, match="checkpoint is damaged"):
        Checkpoint(tmp_path)
