"""The parts that a report's page is made of. Every text is escaped here, so that nothing in a run can write markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --dim: #5d6b7a; --line: #dce2e8; --back: #ffffff; --card: #f6f8fa;
  --main: #1f6feb; --second: #c2410c; --good: #1a7f37; --warn: #9a6700; --bad: #cf222e; --loud: #fff8e1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9ef; --dim: #94a3b3; --line: #323c47; --back: #10161d;
  --card: #18212b; --main: #6cb0ff; --second: #ff9d66; --good: #56d364; --warn: #e3b341; --bad: #ff7b72;
  --loud: #2b2611; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1010px; padding: 24px 18px 48px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 6px 0; }
.dim { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.tile b { display: block; font-size: 17px; line-height: 1.4; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile span { color: var(--dim); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 8px 4px; }
figcaption { padding: 0 6px 4px; font-size: 14px; }
.key { white-space: nowrap; color: var(--dim); font-size: 13px; margin-left: 10px; }
.key::before { content: ""; display: inline-block; width: 14px; border-top: 3px solid var(--main);
  margin: 0 5px 4px 0; }
.key.faint::before { opacity: .4; }
.key.second::before { border-color: var(--second); }
.key.limit::before { border-top: 2px dashed var(--dim); }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--dim); }
svg polyline { fill: none; stroke: var(--main); stroke-width: 2; stroke-linejoin: round; }
svg polyline.faint { stroke-width: 1; opacity: .4; }
svg polyline.second { stroke: var(--second); }
svg polyline.limit { stroke: var(--dim); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg circle { fill: var(--main); }
svg circle.second { fill: var(--second); }
svg .grid { stroke: var(--line); }
svg .mark { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 2 3; }
table { border-collapse: collapse; width: 100%; }
table.numbers { width: auto; min-width: 50%; }
td, th { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
table.facts td { overflow-wrap: anywhere; }
td.number + td:not(.number) { padding-left: 8px; }
th { font-weight: 600; color: var(--dim); }
table.facts th { width: 190px; font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.passed { color: var(--good); } .failed { color: var(--bad); } .skipped { color: var(--dim); }
.loud { background: var(--loud); border-left: 4px solid var(--warn); border-radius: 4px; padding: 8px 12px;
  margin: 8px 0; }
.loud b { color: var(--warn); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto;
  font-size: 13px; }
summary { cursor: pointer; color: var(--dim); }
@media (max-width: 560px) { table.facts th { width: 36%; } body { padding: 16px 12px 40px; } }
@media print { figure, .tile { break-inside: avoid; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole document that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a heading with its parts; nothing if all of them are empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>" if inner else ""


def text(words: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>"


def tiles(values: Mapping[str, str]) -> str:
    """Return large numbers, each with its name under it."""
    inner = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in values.items()
    )
    return f'<div class="tiles">{inner}</div>'


def facts(values: Mapping[str, Any]) -> str:
    """Return `name: value` as a table of two columns; what is None or empty is left out."""
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in values.items()
        if value is not None and value != ""
    ]
    return f'<table class="facts">{"".join(rows)}</table>' if rows else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Return a table; the columns in `numbers` stand to the right. A cell `status` gets its colour."""
    if not rows:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{_kind(i, cell, numbers)}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return f"<table{kind}><thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def loud(word: str, words: str) -> str:
    """Return a line that must not be overlooked."""
    return f'<p class="loud"><b>{escape(word)}</b> {escape(words)}</p>'


def folded(title: str, words: str) -> str:
    """Return a text of fixed width that is shown on demand."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(words)}</pre></details>" if words else ""


STATUS = {"passed": "passed", "failed": "failed", "not applicable": "skipped", "skipped": "skipped"}


def _kind(column: int, cell: str, numbers: Sequence[int]) -> str:
    kind = "number" if column in numbers else STATUS.get(cell, "")
    return f' class="{kind}"' if kind else ""
