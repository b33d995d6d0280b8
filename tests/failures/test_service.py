"""Silent failures between training and service: an edited scale, another template, new tokens, a part left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from decal import PeftModel, load_model
from decal.cli import main
from decal.errors import DecalError
from decal.evaluate import reference
from decal.files import sealed
from decal.files.compared import State
from decal.layers.adapted import Adapted
from decal.recipes import verify
from decal.recipes.finetune import finetune
from decal.spec import RunConfig
from tests.failures.page import told
from tests.integration import tiny
from tests.training.tiny_run import config, make_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    return finetune(config(folder, steps=6)).result


def edited(adapter: Path, to: Path, file: str, **changes: Any) -> Path:
    """Return a copy of the adapter with settings of one of its JSON files changed."""
    shutil.copytree(adapter, to)
    settings = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps({**settings, **changes}))
    return to


def test_8_an_edited_alpha(folder: Path, adapter: Path, tmp_path: Path) -> None:
    louder = edited(adapter, tmp_path / "louder", "adapter_config.json", lora_alpha=32)
    with pytest.raises(DecalError) as error:
        PeftModel.from_pretrained(load_model(folder / "model"), louder)
    told("8a", error.value)


def test_21_another_template_in_service(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE.replace("user", "USER") + " ")
    assert main.run(["generate", "--adapter", str(tmp_path / "adapter"), "--prompt", "?"], debug=False) == 2
    error, _, fix = capsys.readouterr().err.strip().splitlines()[-3:]
    told("21b", f"{error.removeprefix('error: ')}. {fix.removeprefix('  fix: ')}")


def test_24_the_data_use_tokens_that_the_model_has_no_row_for(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["the sun", "a leaf"])
    tokenizer.save_pretrained(tmp_path / "model")
    settings = config(folder, output="new-tokens").model_dump(mode="json")
    with pytest.raises(DecalError) as error:
        finetune(RunConfig(**{**settings, "model": str(tmp_path / "model")}))
    told("24a", error.value)


def test_32_a_server_that_takes_another_scale(folder: Path, adapter: Path) -> None:
    sealed_answers = sealed.read(adapter).reference
    assert sealed_answers is not None
    model = PeftModel.from_pretrained(load_model(folder / "model"), adapter)
    assert reference.replay(model, sealed_answers).within
    for layer in (m for m in model.modules() if isinstance(m, Adapted)):
        for change in layer.adapters.values():
            change.scale = change.alpha  # as a server does that does not divide by r
    part = verify.logits(reference.replay(model, sealed_answers))
    assert part.state is State.differs
    told("32a", f"{part.says}. {part.fix}")
