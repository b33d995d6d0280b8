"""Hub names everywhere a folder may stand, against a hub on this machine; and none of it without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from decal import LoraConfig, get_peft_model
from tests.integration import hub_server, tiny

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What the client got from the hub, and the hub as it left it."""

    hub: hub_server.Hub
    online: dict[str, Any]
    offline: dict[str, Any]
    offline_seconds: float
    printed: str
    requests_offline: int


def read(folder: Path) -> hub_server.Files:
    return {name: (folder / name).read_bytes() for name in tiny.files(folder)}


def repositories(tmp: Path) -> dict[str, dict[str, hub_server.Files]]:
    """A model, adapters of it in a repository's root, at another revision and in a subfolder."""
    tiny.save_model(tmp / "model")
    for rank, name in ((4, "adapter"), (2, "v1"), (3, "adapters/legal")):
        lora = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        base = AutoModelForCausalLM.from_pretrained(tmp / "model")
        base.name_or_path = "user/model"
        get_peft_model(base, lora).save_pretrained(tmp / name)
    junk = {"README.md": b"# An adapter\n", "optimizer.pt": b"never downloaded"}
    return {
        "user/model": {"main": read(tmp / "model")},
        "user/adapter": {"main": {**read(tmp / "adapter"), **junk}, "v1": read(tmp / "v1")},
        "user/adapters": {"main": read(tmp / "adapters")},
        "username/my-lora-adapter": {"main": read(tmp / "adapter")},
    }


def client(act: str, tmp: Path, environment: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Run the client with nothing of this machine's hub settings."""
    answer = tmp / f"{act}.json"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    settings = {"HF_HOME": str(tmp / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "tests" / "integration" / "hub_client.py")]
    done = subprocess.run(
        [*command, act, str(ROOT / "docs_src"), str(answer)],
        env={**kept, **settings},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text("utf-8")), done.stdout


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    tmp = tmp_path_factory.mktemp("hub")
    with hub_server.running() as hub:
        hub.repos = repositories(tmp)
        endpoint = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test"}
        online, printed = client("online", tmp, endpoint)
        asked = len(hub.requests)
        start = time.monotonic()
        offline, _ = client("offline", tmp, {**endpoint, "HF_HUB_OFFLINE": "1"})
        yield Visit(
            hub=hub,
            online=online,
            offline=offline,
            offline_seconds=time.monotonic() - start,
            printed=printed,
            requests_offline=len(hub.requests) - asked,
        )


def test_a_model_and_an_adapter_load_by_their_hub_names(visit: Visit) -> None:
    assert visit.online["on_top"] != visit.online["base"]
    assert visit.online["auto"] == visit.online["on_top"]
    assert visit.online["tokens"] == tiny.tokenizer()("leaf")["input_ids"]


def test_a_subfolder_and_a_revision_are_found(visit: Visit) -> None:
    assert visit.online["legal"] == [[], []]
    assert visit.online["after_switch"] not in (visit.online["base"], visit.online["on_top"])
    assert visit.online["revision"]["r"] == 2
    assert visit.online["revision"]["base_model_name_or_path"] == "user/model"


def test_of_an_adapter_only_its_own_files_are_downloaded(visit: Visit) -> None:
    fetched = {request.rpartition("/")[2] for request in visit.hub.requests if "GET /user/adapter/resolve/" in request}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors", "decal.json"}


def test_a_pushed_adapter_comes_back_the_same(visit: Visit) -> None:
    files = visit.hub.repos["user/new"]["main"]
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "decal.json"}
    assert visit.online["again"] == visit.online["auto"]
    assert visit.online["pushed"].startswith(f"{visit.hub.url}/user/new/")
    assert visit.hub.commits[0]["summary"] == "First adapter"


def test_the_sections_hub_fragment_runs(visit: Visit) -> None:
    assert visit.online["fragment"]["r"] == 4
    assert "base model: user/model" in visit.printed
    assert "rank 4, alpha 8" in visit.printed
    assert "target modules: ['q_proj', 'v_proj']" in visit.printed


@pytest.mark.parametrize(
    ("case", "says"),
    [("no_repo", "user/nowhere"), ("no_revision", "v9"), ("not_an_adapter", "adapter_config.json")],
)
def test_what_the_hub_has_not_is_an_error_of_ours(visit: Visit, case: str, says: str) -> None:
    assert says in visit.online[case]


def test_offline_the_cache_serves_and_the_rest_is_refused_quickly(visit: Visit) -> None:
    assert visit.offline["cached"] == visit.online["auto"]
    for case in ("model", "adapter", "auto"):
        assert "user/never-seen" in visit.offline[case]
        assert "HF_HUB_OFFLINE" in visit.offline[case]
    assert visit.requests_offline == 0
    assert visit.offline_seconds < 60  # the start of Python and torch; no time-outs of the network
