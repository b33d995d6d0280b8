"""What a user's script does with hub names; run in a process of its own, because HF_ENDPOINT is read at import."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from decal import AutoPeftModelForCausalLM, DecalError, PeftConfig, PeftModel, load_model, load_tokenizer


def logits(model: Any) -> list[float]:
    with torch.no_grad():
        values: list[float] = model.eval()(input_ids=torch.arange(8)[None]).logits.float().flatten().tolist()
    return values


def error(act: Callable[[], object]) -> str:
    try:
        act()
    except DecalError as refusal:
        return str(refusal)
    return "nothing was raised"


def online(docs: Path) -> dict[str, Any]:
    base = load_model("user/model")
    asked: dict[str, Any] = {"base": logits(base)}
    on_top = PeftModel.from_pretrained(base, "user/adapter")
    asked["on_top"] = logits(on_top)
    asked["legal"] = list(on_top.load_adapter("user/adapters", "legal", subfolder="legal"))
    on_top.set_adapter("legal")
    asked["after_switch"] = logits(on_top)
    asked["revision"] = PeftConfig.from_pretrained("user/adapter", revision="v1").to_dict()
    auto = AutoPeftModelForCausalLM.from_pretrained("user/adapter")
    asked["auto"] = logits(auto)
    asked["tokens"] = load_tokenizer("user/model")("leaf")["input_ids"]
    asked["pushed"] = auto.push_to_hub("user/new", commit_message="First adapter")
    asked["again"] = logits(PeftModel.from_pretrained(load_model("user/model"), "user/new"))
    asked["no_repo"] = error(lambda: load_model("user/nowhere"))
    asked["no_revision"] = error(lambda: PeftConfig.from_pretrained("user/adapter", revision="v9"))
    asked["not_an_adapter"] = error(lambda: PeftConfig.from_pretrained("user/model"))
    fragment = runpy.run_path(str(docs / "hub.py"))
    asked["fragment"] = fragment["config"].to_dict()
    return asked


def offline(docs: Path) -> dict[str, Any]:
    return {
        "cached": logits(AutoPeftModelForCausalLM.from_pretrained("user/adapter")),
        "model": error(lambda: load_model("user/never-seen")),
        "adapter": error(lambda: PeftConfig.from_pretrained("user/never-seen")),
        "auto": error(lambda: AutoPeftModelForCausalLM.from_pretrained("user/never-seen")),
    }


if __name__ == "__main__":
    act = {"online": online, "offline": offline}[sys.argv[1]]
    Path(sys.argv[3]).write_text(json.dumps(act(Path(sys.argv[2]))), encoding="utf-8")
