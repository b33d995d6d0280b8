"""Write docs/settings.md from the settings themselves: `python scripts/settings_docs.py`. A test compares the two."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from decal.settings import Settings, group_of, takes
from decal.spec import LoraConfig, RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
HEAD = """# All settings of a run

Written by `python scripts/settings_docs.py` from the settings themselves; a test keeps them equal.

They stand in a YAML file, and any of them can be given as a word: `decal train run.yaml train.lr=1e-4 lora.r=32`. The
file `run.yaml` in a run's folder holds all of them. A setting that takes text takes the word as it stands, without
quotes: `data.template={{text}} -> {{label}}`. Lists and groups are YAML: `lora.target_modules=[q_proj, v_proj]`,
`lora.rank_pattern={q_proj: 8}`. An unknown name, a value that is not of the kind, and a number that is not finite are
errors. In Python the same settings are `RunConfig`, `DataConfig`, `LoraConfig`, `TrainConfig` and `QuantConfig`.
`LoraConfig` may be changed after it was made (each change is checked, and a model keeps what it was made with); the
others may not.

```yaml
model: Qwen/Qwen3-0.6B
data:
  path: support.jsonl
  eval_rows: 200
lora:
  r: 32
train:
  lr: 1.0e-4
  early_stopping: 3
output: runs/support
```
"""
LORA = """
In a run some defaults are others, given second; `lora_alpha` is then twice `r`, whatever `r` is. `task_type` must be
`CAUSAL_LM` or null: a run trains causal language models. What becomes of PEFT's further fields is in
[files.md](files.md#adapter_configjson).
"""


def page() -> str:
    """Return the page as it should be now."""
    parts = [HEAD, "\n## The run\n\n", table(RunConfig, RunConfig)]
    for name, field in RunConfig.model_fields.items():
        group = group_of(field.annotation)
        if group is not None:
            says = " ".join((group.__doc__ or "").split("\n\n")[0].split())
            parts.append(f"\n## {name}\n\n{says}\n{LORA if group is LoraConfig else ''}\n")
            parts.append(table(group, RunConfig, section=name))
    return "".join(parts)


def table(group: type[Settings], run: type[Settings], *, section: str = "") -> str:
    """Return one row for each setting of a group."""
    in_a_run: Any = run(model="m", data={"path": "d"})
    group_in_a_run = getattr(in_a_run, section) if section else in_a_run
    rows = ["| setting | default | takes | meaning |", "|---|---|---|---|"]
    for name, field in group.model_fields.items():
        assert field.description, f"{group.__name__}.{name} has no description"
        said = default(field)
        if group is LoraConfig and getattr(group_in_a_run, name) != field.default:
            said += f"; in a run {shown(getattr(group_in_a_run, name))}"
        full = f"{section}.{name}" if section else name
        rows.append(f"| `{full}` | {said} | {cell(kind(field))} | {cell(field.description)} |")
    return "\n".join(rows) + "\n"


def default(field: FieldInfo) -> str:
    """Return a field's default; nothing where it must be given or is a section of its own."""
    if field.is_required():
        return "required"
    if field.default_factory is not None or isinstance(field.default, Settings):
        return ""
    return shown(field.default)


def shown(value: Any) -> str:
    """Return a value as YAML has it."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def kind(field: FieldInfo) -> str:
    """Return what a setting takes, with its bounds."""
    bounds = [
        f"{word} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, word in BOUNDS.items()
        if hasattr(limit, name)
    ]
    words = takes(field.annotation).replace("'", "`")
    return f"{words}, {' and '.join(bounds)}" if bounds else words


def cell(text: str) -> str:
    """Return text that a table cell can hold."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
