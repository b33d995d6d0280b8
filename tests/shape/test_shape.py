"""The house rules that a tool can hold: sizes, names, floors, quick starts."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import decal

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "decal"
FILES = sorted(PACKAGE.rglob("*.py"))
FILE_CAP, FUNCTION_CAP = 400, 60
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_no_file_is_longer_than_the_cap() -> None:
    lengths = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > FILE_CAP}


def test_no_function_is_longer_than_the_cap() -> None:
    """Counted without the signature: a command's is a table of its options."""
    lengths = {
        f"{name_of(path)}:{function.name}": (function.end_lineno or 0) - function.body[0].lineno + 1
        for path in FILES
        for function in functions(path)
    }
    assert not {name: length for name, length in lengths.items() if length > FUNCTION_CAP}


def test_no_file_is_a_bag() -> None:
    bags = re.compile(r"(^|_)(utils?|common|helpers?|misc)(_|$)")
    assert not [name_of(path) for path in PACKAGE.rglob("*") if bags.search(path.stem)]


def test_only_the_top_init_exports() -> None:
    """Inside, modules are imported, never packages: re-exports make cycles. `bundled` holds one path."""
    inits = [path for path in FILES if path.name == "__init__.py" and path.parent not in (PACKAGE, PACKAGE / "bundled")]
    assert not [name_of(path) for path in inits if path.read_text("utf-8").strip()]


def test_no_except_is_bare_and_nothing_prints() -> None:
    bare, prints = [], []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                bare.append(name_of(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                prints.append(name_of(path))
    assert not bare
    outside = {name for name in prints if not name.startswith(("cli/", "recipes/"))}
    assert outside <= {"model/wrapper.py"}  # print_trainable_parameters, as in PEFT


def test_every_export_can_be_used_after_every_module_was_imported() -> None:
    """Importing a subpackage sets an attribute on the package: it must not cover a public function."""
    modules = [module.name for module in pkgutil.walk_packages(decal.__path__, "decal.")]
    for name in modules:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    folders = {module.split(".")[1] for module in modules}
    assert not folders & set(decal.__all__)
    for name in decal.__all__:
        assert callable(getattr(decal, name)), name
    assert set(decal.__all__) <= set(dir(decal))
    with pytest.raises(AttributeError, match="no_such_name"):
        decal.no_such_name  # noqa: B018


def test_type_checkers_see_every_export() -> None:
    source = (PACKAGE / "__init__.py").read_text("utf-8")
    seen = set(re.findall(r"import (\w+) as \1", source))
    assert seen == set(decal.__all__)


@pytest.mark.parametrize(
    "statement",
    [
        "import decal",
        "import decal.errors, decal.bundled, decal.locate, decal.rundir, decal.spec",
        "import decal; decal.LoraConfig(r=4); decal.RunConfig(model='m', data={'path': 'd'})",
        "import decal.report",
        "import decal.cli.main",
    ],
)
def test_these_start_without_torch(statement: str) -> None:
    if "cli.main" in statement and not (PACKAGE / "cli" / "main.py").is_file():
        pytest.skip("no command line yet")
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'peft'}"
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_package_runs_without_peft_and_bitsandbytes() -> None:
    """They are the tests' oracles: a model is wrapped, run, saved and loaded where neither can be imported."""
    code = """
import sys, tempfile
for name in ("peft", "trl", "bitsandbytes"):
    sys.modules[name] = None
import torch
from torch import nn
from decal import LoraConfig, PeftModel, get_peft_model
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    twin = nn.Sequential(nn.Linear(4, 4))
    twin.load_state_dict({"0.weight": model.get_base_model()[0].weight, "0.bias": model.get_base_model()[0].bias})
    x = torch.randn(2, 4)
    print(torch.equal(PeftModel.from_pretrained(twin, folder)(x), model(x)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.strip() == "True", done.stderr


def test_import_linter_keeps_the_floors() -> None:
    command = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_no_machine_is_named_in_what_is_committed() -> None:
    """No home folders, package mirrors or work folders: `git ls-files` is what others get."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(r"(?<![\w.])/(home|root|Users|work)/\w|index-url|extra-index|\.internal\b")
    texts = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".json", ""}
    paths = [ROOT / name for name in listed.stdout.split("\0") if name and Path(name).suffix in texts]
    read = {path: path.read_text("utf-8") for path in paths if path.is_file() and path != Path(__file__)}
    assert not [str(path.relative_to(ROOT)) for path, text in read.items() if private.search(text)]
