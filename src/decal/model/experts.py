"""Find the 3-D parameters of experts that a model's code uses one matrix at a time.

transformers stores a mixture's experts as parameters (experts, out, in) or (experts, in, out). Those can be coded
whose class, in the forward that transformers calls "eager", does nothing with them but F.linear(x, self.P[i]) or
x @ self.P[i]: its source says so. Other uses (batched products over all experts) stay wide.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

LINEAR, PRODUCT, OTHER = "linear", "product", "other"
FUNCTIONS = ("F.linear", "nn.functional.linear", "torch.nn.functional.linear")


def parameters(module: nn.Module) -> dict[str, bool]:
    """Return the names of a module's own parameters that hold experts decal can code: {name: stored as (in, out)}."""
    stacked = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and p.is_floating_point()]
    uses = _uses(type(module)) if stacked else {}  # type: ignore[arg-type]  # torch's stub of __hash__
    return {n: uses[n] == {PRODUCT} for n in stacked if uses.get(n) in ({LINEAR}, {PRODUCT})}


def use_eager(module: nn.Module) -> None:
    """Let an experts module compute by its class's own forward, not by a product over all experts at once."""
    config = getattr(module, "config", None)
    if config is not None:
        config._experts_implementation = "eager"


@cache
def _uses(kind: type[nn.Module]) -> dict[str, set[str]]:
    """Return how a class's code, and that of the classes it is made from, reads each attribute of self."""
    found: dict[str, set[str]] = {}
    for part in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        except (OSError, TypeError):  # a class without a file: its uses are unknown
            return {}
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Load):
                use = _use(node, parents)
                if use is not None:
                    found.setdefault(node.attr, set()).add(use)
    return found


def _use(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> str | None:
    outer = parents[node]
    if isinstance(outer, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in outer.ops):
        return None
    if isinstance(outer, ast.Subscript) and outer.value is node and not isinstance(outer.slice, (ast.Slice, ast.Tuple)):
        user = parents[outer]
        called = isinstance(user, ast.Call) and not user.keywords and user.args[1:2] == [outer]
        if called and ast.unparse(user.func) in FUNCTIONS:  # type: ignore[attr-defined]  # a Call
            return LINEAR
        if isinstance(user, ast.BinOp) and isinstance(user.op, ast.MatMult) and user.right is outer:
            return PRODUCT
    return OTHER
