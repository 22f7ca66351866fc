"""Tasks from the Berkeley Function Calling Leaderboard (BFCL, Patil et al.), and their verifier.

A row has a question and the schemas of some functions. The file of the same name in the neighbouring folder
`possible_answer` has the correct calls, with the accepted values of each argument. Supported are single calls, a choice
among functions, parallel calls, and questions for which no function fits (irrelevance); multi-turn rows are not,
because they need the simulated services behind the calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.answers import final_part
from posttrain.data.sources import Row, messages_of, read_rows, with_instruction, with_system
from posttrain.data.tool_calls import describe, parse_calls, with_system_text
from posttrain.types import DataError, Json, JsonView, Task, Verdict

ENV = "bfcl"
NO_CALL = "None of these functions fits."
"""A correct reply if no function fits."""
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
_IGNORED = re.compile(r"[ ,./\-_*^]")


def is_bfcl(row: Row) -> bool:
    """Whether a row is in BFCL's format."""
    return isinstance(row.values.get("question"), list) and (
        "function" in row.values or "involved_classes" in row.values
    )


def reader(source: str, system: str = "", instruction: str = "") -> Callable[[Row], Task]:
    """A function that converts the file's rows into tasks. Raises DataError if the file with the answers is missing."""
    path = Path(source)
    answers = path.parent / "possible_answer" / path.name
    if answers.is_file():
        accepted = {row.values["id"]: row.values["ground_truth"] for row in read_rows(str(answers))}
    elif "irrelevance" in path.name:
        accepted = None
    else:
        raise DataError(f"{source} needs the file with its answers, {answers}, which does not exist. Add it.")

    def read(row: Row) -> Task:
        name, turns = str(row.values.get("id")), row.values["question"]
        if len(turns) != 1 or "function" not in row.values:
            raise DataError(
                f"{row.where}: {name} has several turns, which need BFCL's simulated services. Use another file."
            )
        if accepted is not None and name not in accepted:
            raise DataError(f"{row.where}: {name} has no answer in {answers}.")
        functions = [_function(f) for f in row.values["function"]]
        messages = with_instruction(messages_of(row, turns[0], "question"), instruction)
        messages = with_system_text(with_system(row.where, messages, system), describe(functions))
        calls = [] if accepted is None else accepted[name]
        return Task(name, ENV, messages, _gold(calls), {"accepted": calls, "functions": functions})

    return read


def verify(task: Task, text: str) -> Verdict:
    """Passes a reply that makes exactly the expected calls, in any order, or no call if none is expected.

    Names must be equal and arguments must have accepted values; an argument may be omitted if "" is accepted. Texts are
    compared ignoring case, spaces and `, . / - _ * ^`, and numbers by value.
    """
    reply = final_part(text)
    calls, wanted = parse_calls(reply), task.meta["accepted"]
    if not wanted:
        right = not calls and bool(reply)
        return Verdict(float(right), right, f"{len(calls)} calls, none wanted", {"calls": float(len(calls))})
    made = [(call.name, call.arguments) for call in calls]
    pairs = [[j for j, one in enumerate(wanted) if _same_call(call, one)] for call in made]
    matched = _matching(pairs)
    right = matched == len(wanted) == len(calls)
    names = sum(name in {next(iter(one)) for one in wanted} for name, _ in made)
    parts = {"calls": float(len(calls)), "matched": matched / len(wanted), "named": names / max(1, len(made))}
    return Verdict(float(right), right, f"{matched} of {len(wanted)} calls right, {len(calls)} made", parts)


def _function(given: JsonView) -> Json:
    """A function's schema, with BFCL's type names replaced by those of JSON schema."""
    return {"name": given["name"], "description": given["description"], "parameters": _schema(given["parameters"])}


def _schema(value: Any) -> Any:
    if isinstance(value, list):
        return [_schema(entry) for entry in value]
    if not isinstance(value, Mapping):
        return value
    kind = value.get("type")
    if kind == "any":
        return {k: _schema(v) for k, v in value.items() if k != "type"}
    renamed = {"type": _TYPES.get(kind, kind)} if isinstance(kind, str) else {}
    return {k: _schema(v) for k, v in value.items()} | renamed


def _gold(calls: Sequence[JsonView]) -> str:
    """A reply with the expected calls, using the first accepted value of each required argument."""
    if not calls:
        return NO_CALL
    made = [{"name": name, "arguments": _first(accepted)} for call in calls for name, accepted in call.items()]
    return "\n".join(f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in made)


def _first(accepted: Any) -> Any:
    """A value that `_same` accepts."""
    if isinstance(accepted, Mapping):
        return {name: _first(values[0]) for name, values in accepted.items() if "" not in values}
    return [_first(one) for one in accepted] if isinstance(accepted, list) else accepted


def _same_call(call: tuple[str, Any], wanted: JsonView) -> bool:
    ((name, accepted),) = wanted.items()
    return call[0] == name and _same(call[1], accepted)


def _same(given: Any, wanted: Any) -> bool:
    """Whether a value matches the wanted one. In an object, each entry must match one of the values wanted for it."""
    if isinstance(wanted, Mapping):
        if not isinstance(given, Mapping) or not given.keys() <= wanted.keys():
            return False
        return all(
            any(_same(given[name], one) for one in values) if name in given else "" in values
            for name, values in wanted.items()
        )
    if isinstance(wanted, list):
        both = isinstance(given, list) and len(given) == len(wanted)
        return both and all(_same(a, b) for a, b in zip(given, wanted, strict=True))
    if isinstance(wanted, str):
        return isinstance(given, str) and _plain(given) == _plain(wanted)
    return isinstance(given, bool) == isinstance(wanted, bool) and given == wanted


def _plain(text: str) -> str:
    return _IGNORED.sub("", text).casefold().replace("'", '"')


def _matching(pairs: Sequence[Sequence[int]]) -> int:
    """Size of a maximum matching between calls and wanted calls (Kuhn's augmenting paths)."""
    taken: dict[int, int] = {}

    def place(call: int, tried: set[int]) -> bool:
        for wanted in pairs[call]:
            if wanted not in tried:
                tried.add(wanted)
                if wanted not in taken or place(taken[wanted], tried):
                    taken[wanted] = call
                    return True
        return False

    return sum(place(call, set()) for call in range(len(pairs)))
