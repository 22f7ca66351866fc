"""Reads the source of an installed function of this package without importing it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TypedDict

from posttrain.types import DataError

PACKAGE = Path(__file__).parents[2]


class SourceText(TypedDict):
    """The code of a function, class or recipe, and its location."""

    name: str
    file: str
    line: int
    code: str


def read_source(name: str) -> SourceText:
    """`objectives.policy:clip` → the same code as inspect.getsource, and its location.

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
    file = str(Path("posttrain") / path.relative_to(PACKAGE))
    if module == "recipe":
        return {"name": name, "file": file, "line": 1, "code": text}
    node: ast.AST = ast.parse(text)
    for part in wanted.split("."):
        inside = ast.iter_child_nodes(node)
        found = [one for one in inside if isinstance(one, ast.FunctionDef | ast.ClassDef) and one.name == part]
        if not found:
            raise DataError(f"{name!r}: {path.name} defines no {part}.")
        node = found[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    code = "\n".join(text.splitlines()[first - 1 : node.end_lineno]) + "\n"
    return {"name": name, "file": file, "line": first, "code": code}
