"""Reads the source of an installed function of this package without importing it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from posttrain.types import DataError

PACKAGE = Path(__file__).parents[2]


def read_source(name: str) -> dict[str, Any]:
    """`objectives.policy:clip` → {name, file, line, code}: the same code as inspect.getsource, and its location.

    The colon is followed by a function, a class or CLASS.METHOD; `recipe:NAME` is a whole bundled recipe instead. The
    file is parsed, not imported, so that a chapter loads no training code. Raises DataError if nothing is found.
    """
    module, _, wanted = name.partition(":")
    if module == "recipe":
        path = PACKAGE / "config" / "recipes" / f"{wanted}.toml"
    else:
        path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        raise DataError(f"{name!r}: there is no {path.name} in the package.")
    text = path.read_text(encoding="utf-8")
    at = {"name": name, "file": str(Path("posttrain") / path.relative_to(PACKAGE))}
    if module == "recipe":
        return {**at, "line": 1, "code": text}
    node: ast.AST = ast.parse(text)
    for part in wanted.split("."):
        inside = ast.iter_child_nodes(node)
        found = [one for one in inside if isinstance(one, ast.FunctionDef | ast.ClassDef) and one.name == part]
        if not found:
            raise DataError(f"{name!r}: {path.name} defines no {part}.")
        node = found[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    return {**at, "line": first, "code": "\n".join(text.splitlines()[first - 1 : node.end_lineno]) + "\n"}
