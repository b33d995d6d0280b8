"""Write docs/cli.md from the real commands: `python scripts/cli_docs.py`. A test compares the two."""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from decal.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The command line

Written by `python scripts/cli_docs.py` from the commands themselves; a test keeps them equal.

- Results go to stdout, progress and errors to stderr; without a terminal both are plain text.
- `--json` prints the same results for programs.
- Exit code 0: done; 2: something you can mend, told in up to three lines (error, got, fix); 130: stopped by Ctrl-C or
  SIGTERM, with the command that goes on; 1: anything else. `--debug`, or `DECAL_DEBUG=1`, shows the traceback.
- A run folder (`runs/first`) stands for the adapter or the model in it.
- `decal train` and `decal quickstart` take any setting as `KEY=VALUE`: all of them are in [settings.md](settings.md).

| command | what it does |
|---|---|
"""


def page() -> str:
    """Return the page as it should be now."""
    group: Any = typer.main.get_command(main.app)
    lines = [f"| [`decal {name}`](#decal-{name}) | {command.short_help} |" for name, command in group.commands.items()]
    return HEAD + "\n".join(lines) + "\n" + "".join(section(name, c) for name, c in group.commands.items())


def section(name: str, command: Any) -> str:
    """Return one command's part: what it does, examples, and a table of all it takes."""
    head, *examples = [line for line in command.epilog.split("\n\n") if line]
    assert head == "Examples:", name
    rows = [f"| {words(p)} | {cell(p.help or '')}{default(p)} |" for p in command.params if p.name != "help"]
    return (
        f"\n## decal {name}\n\n{inspect.cleandoc(command.help)}\n\n```sh\n"
        + "\n".join(examples)
        + "\n```\n\n| takes | meaning |\n|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def words(parameter: Any) -> str:
    """Return how a parameter is written."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    return ", ".join(f"`{option}`" for option in parameter.opts)


def default(parameter: Any) -> str:
    """Return a plain default where the help text does not name one."""
    value = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    shown = isinstance(value, (int, float, str)) and not isinstance(value, bool) and parameter.show_default
    return f" (default: {value})" if shown else ""


def cell(text: str) -> str:
    """Return text that a table cell can hold."""
    return text.replace("|", "\\|").rstrip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
