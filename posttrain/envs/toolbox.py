"""Tools by name: a calculator, Python in the sandbox, search over local files, and user-defined functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import nearest
from posttrain.data.tasks.calculator import calculator
from posttrain.data.tool_calls import Call, call_arguments
from posttrain.data.tool_schema import Tool, ToolError, tool_from
from posttrain.envs.bm25 import Index, read_passages
from posttrain.rewards.functions import load_function
from posttrain.rewards.sandbox.pool import Sandbox
from posttrain.rewards.sandbox.tasks import run_python
from posttrain.types import ConfigError, RolloutError

MOST_CHARACTERS = 2000
"""Maximum length of a result; a longer one is truncated and its full length is stated."""
MOST_PASSAGES = 10
PYTHON, SEARCH = "python", "search:"
NAMES = ("calculator", PYTHON)
"""Fixed names allowed in `env.tools`, besides `search:PATH` and `FILE.py:FUNCTION`."""


@dataclass(frozen=True)
class Result:
    """Result of a tool call: the text shown to the model, and whether the call succeeded."""

    text: str
    ok: bool


def load_tools(names: str, sandbox: Callable[[], Sandbox] = Sandbox) -> dict[str, Tool]:
    """Loads the tools listed in `env.tools`, keyed by the name the model calls. `python` runs in the `sandbox`.

    Raises ConfigError for an unknown tool, and if `python` is listed but the sandbox is unavailable, so that a machine
    without isolation fails before the first episode.
    """
    tools: dict[str, Tool] = {}
    for name in _split(names):
        tool = _load(name, sandbox)
        if tool.name in tools:
            raise ConfigError(f"env.tools={names!r} has two tools named {tool.name}. Rename one.")
        tools[tool.name] = tool
    if not tools:
        raise ConfigError(
            f"env.tools={names!r} lists no tool. Give at least one, e.g. {', '.join(NAMES)} or search:PATH."
        )
    return tools


def tools_hash(names: str) -> str:
    """Hash of the files behind the tools, so that a change is detected when a run is resumed."""
    digest = hashlib.sha256()
    for name in _split(names):
        digest.update(name.encode())
        if name.startswith(SEARCH):
            digest.update(repr(read_passages(Path(name.removeprefix(SEARCH)))).encode())
        elif ".py:" in name:
            digest.update(Path(name.rpartition(":")[0]).read_bytes())
    return digest.hexdigest()


def run_call(call: Call, tools: Mapping[str, Tool]) -> Result:
    """Runs a tool call. An error of the model or the tool becomes a result that describes it.

    Raises RolloutError only if the tool itself does, because then no call could have succeeded.
    """
    try:
        if call.error:
            raise ToolError(call.error)
        if call.name not in tools:
            raise ToolError(f"there is no tool {call.name[:60]!r}; there is: {', '.join(tools)}.")
        tool = tools[call.name]
        value = tool.function(**call_arguments(call, tool))
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except ToolError as error:
        return Result(_cut(f"Error: {error}"), False)
    except RolloutError:
        raise
    except Exception as error:  # a tool may raise anything; the model sees the error and can continue
        return Result(_cut(f"Error: {type(error).__name__}: {error}"), False)
    return Result(_cut(text), True)


def search_in(path: Path) -> Tool:
    """A tool that searches the documents at a path."""
    index = Index(read_passages(path))

    def search(query: str, count: int = 3) -> str:
        """Finds the passages of the documents that fit a query best.

        Args:
            query: words to look for
            count: most passages to show, up to 10
        """
        found = index.search(query, max(1, min(count, MOST_PASSAGES)))
        return "\n\n".join(f"[{p.source}]\n{p.text}" for p in found) or "Nothing found."

    return tool_from(search)


def python_in(sandbox: Sandbox) -> Tool:
    """A tool that runs programs in a sandbox."""

    def python(code: str) -> str:
        """Runs a Python program and shows what it prints.

        Args:
            code: the whole program, which has five seconds; print what you want to see
        """
        printed, error = run_python(sandbox, code)
        if error:
            raise ToolError(f"{error}\nPrinted before: {printed}" if printed else error)
        return printed or "Nothing was printed."

    return tool_from(python)


def runs_python(names: str) -> bool:
    """Whether `env.tools` lets the model run its own programs."""
    return PYTHON in _split(names)


def _load(name: str, sandbox: Callable[[], Sandbox]) -> Tool:
    if name == PYTHON:
        return python_in(sandbox())
    if name == "calculator":
        return tool_from(calculator)
    if name.startswith(SEARCH):
        return search_in(Path(name.removeprefix(SEARCH)))
    if ".py" in name:
        return tool_from(load_function(name, "tool"))
    raise ConfigError(f"unknown tool {name!r}{nearest(name, [*NAMES, SEARCH + 'PATH'])} Or give FILE.py:FUNCTION.")


def _split(names: str) -> Sequence[str]:
    return [name for part in names.split(",") if (name := part.strip())]


def _cut(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # JSON may contain lone surrogates, which are not valid text
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}… ({len(text)} characters in all)"
