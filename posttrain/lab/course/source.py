"""The source of a function of this package, as it is installed here, read without importing it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from posttrain.types import DataError

PACKAGE = Path(__file__).parents[2]


def read_source(name: str) -> dict[str, Any]:
    """`objectives.policy:clip` → {name, file, line, code}: what inspect.getsource returns, and where it stands.

    After the colon stands a function, a class or CLASS.METHOD; `recipe:NAME` is a shipped recipe instead, whole. The
    file is parsed, not imported: the lab shows training, but never loads it. Raises DataError where there is none.
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
