"""Every error that decal raises says what is wrong and how to mend it, in lines that fit a terminal."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from decal import errors
from tests.shape.test_shape import FILES, name_of

KINDS = {
    name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.DecalError)
} | {"SettingError"}
LONGEST = 150  # characters of the words themselves; what is put into them comes on top
MOST_PUT_IN = 5


@dataclass(frozen=True)
class Site:
    """One place where an error is made: its words, with `{}` where something is put in; None if made elsewhere."""

    where: str
    what: str | None
    fix: str | None
    has_fix: bool


def words(node: ast.expr | None) -> str | None:
    """Return the literal text of a string or f-string; the longer branch of a choice between two."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) or "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (words(node.left) or "{}") + (words(node.right) or "{}")
    if isinstance(node, ast.IfExp):
        return max(words(node.body) or "{}", words(node.orelse) or "{}", key=len)
    return None


def sites() -> Iterator[Site]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                yield Site(
                    f"{name_of(path)}:{node.lineno}",
                    words(node.args[0] if node.args else given.get("what")),
                    words(given.get("fix")),
                    "fix" in given,
                )


SITES = list(sites())


def test_the_sites_are_found() -> None:
    assert len(SITES) > 200
    assert sum(site.what is not None for site in SITES) > 0.9 * len(SITES)


def faults(site: Site) -> list[str]:
    """Return what is amiss with the words of one error."""
    found = [] if site.has_fix else ["no fix"]
    for text in (site.what, site.fix):
        if text is not None and "\n" in text:
            found.append(f"more than a line: {text}")
        if text is not None and len(text.replace("{}", "").replace("{at}", "")) > LONGEST:
            found.append(f"longer than {LONGEST}: {text}")
        if text is not None and text.count("{}") > MOST_PUT_IN:
            found.append(f"more than {MOST_PUT_IN} things put in: {text}")
    if site.what is not None and site.what.endswith((".", "!", "?")):
        found.append(f"the fix is a sentence, this a clause: {site.what}")
    if site.fix is not None and not site.fix.endswith((".", "}", "?", "--help")):
        found.append(f"no sentence, and nothing to copy: {site.fix}")
    if site.fix is not None and not re.match(r"[A-Z{]|decal |\w+\(", site.fix):  # or a command, or a call
        found.append(f"a sentence begins with a capital: {site.fix}")
    return [f"{site.where}: {fault}" for fault in found]


def test_every_error_says_what_and_fix_in_short_lines() -> None:
    assert [fault for site in SITES for fault in faults(site)] == []


def test_a_fault_would_be_seen() -> None:
    good = Site("here", "the file is empty", "Give a file with a row.", True)
    assert faults(good) == []
    for bad in (
        Site("here", "the file is empty", None, False),
        Site("here", "the file is empty.", "Give a file with a row.", True),
        Site("here", "the file is empty", "give a file with a row.", True),
        Site("here", "the file is empty", "Give a file with a row", True),
        Site("here", "the file\nis empty", "Give a file with a row.", True),
        Site("here", "the file is empty" * 20, "Give a file with a row.", True),
    ):
        assert len(faults(bad)) == 1
