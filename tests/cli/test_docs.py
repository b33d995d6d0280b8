"""docs/cli.md says what the commands say, and the examples run."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from decal.spec import RunConfig, read_run_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["cli", "settings"])
def test_the_page_is_what_the_commands_and_settings_say(name: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / f"{name}_docs.py"))
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert text == script["page"](), f"run: python scripts/{name}_docs.py"


def test_every_setting_has_its_row() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    settings = RunConfig(model="m", data={"path": "d"}, quantize="nf4").model_dump()
    for name, value in settings.items():
        for inner in value if isinstance(value, dict) else ():
            assert f"| `{name}.{inner}` |" in text
        assert f"| `{name}` |" in text


def test_the_example_settings_are_settings() -> None:
    config = read_run_config(ROOT / "examples" / "route.yaml")
    assert (ROOT / config.model / "config.json").is_file()


@pytest.mark.slow
def test_the_example_loop_learns_and_reads_back(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "examples" / "own_loop.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("True")


def test_every_file_that_the_readme_links_to_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert local
    for link in local:
        assert (ROOT / link).exists(), link
