"""Allowed values of settings, taken from the keys of a dict or the modules of a folder without importing them.

A field `policy_loss: Annotated[str, KeysOf("objectives/policy.py", "POLICY_LOSSES")]` accepts the keys of that dict, so
adding a loss takes one dict entry, and adding an engine takes one file.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class KeysOf:
    """The keys of the dict (or the members of the set or tuple) `table` in a module of this package.

    `more` are appended, and names in `without` are left out. With `or_file`, a setting may also be `FILE.py:FUNCTION`.
    """

    module: str
    table: str
    more: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    or_file: bool = False

    def names(self) -> tuple[str, ...]:
        """The names, in the order of the source."""
        return tuple(n for n in (*_keys(self.module, self.table), *self.more) if n not in self.without)


@dataclass(frozen=True)
class FilesIn:
    """The modules in a folder of this package. With `several`, a setting may list more than one, comma-separated."""

    folder: str
    several: bool = False

    def names(self) -> tuple[str, ...]:
        """The names, in alphabetical order."""
        return tuple(sorted(p.stem for p in (PACKAGE / self.folder).glob("*.py") if not p.stem.startswith("_")))


Choices = KeysOf | FilesIn


@cache
def _keys(module: str, table: str) -> tuple[str, ...]:
    for node in ast.parse((PACKAGE / module).read_text(encoding="utf-8")).body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(t, ast.Name) and t.id == table for t in targets):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Call):  # frozenset({…})
                value = value.args[0]
            found = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
            return tuple(k.value for k in found if isinstance(k, ast.Constant) and isinstance(k.value, str))
    raise AssertionError(f"posttrain/{module} has no table {table} of plain strings")
