"""Tool-use questions of the Berkeley Function Calling Leaderboard (BFCL, Patil et al.) as tasks, and their verifier.

A row has a question and the schemas of some functions; a file of the same name in the folder `possible_answer` beside
it has the calls that are right, with the values each argument may have. Files whose rows call once, choose among
functions, call in parallel, or have no function that fits (irrelevance) are understood; several turns are not, since
they need the simulated services behind the calls.
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
from posttrain.types import DataError, Task, Verdict

ENV = "bfcl"
NO_CALL = "None of these functions fits."
"""A reply that is right where no function fits."""
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}
_IGNORED = re.compile(r"[ ,./\-_*^]")


def is_bfcl(row: Row) -> bool:
    """Whether a row is one of BFCL's."""
    return isinstance(row.values.get("question"), list) and (
        "function" in row.values or "involved_classes" in row.values
    )


def reader(source: str, system: str = "", instruction: str = "") -> Callable[[Row], Task]:
    """What makes tasks of a file's rows. Raises DataError where the file with the answers is missing."""
    path = Path(source)
    answers = path.parent / "possible_answer" / path.name
    if answers.is_file():
        accepted = {row.values["id"]: row.values["ground_truth"] for row in read_rows(str(answers))}
    elif "irrelevance" in path.name:
        accepted = None
    else:
        raise DataError(f"{source} needs its answers in {answers}, which does not exist.")

    def read(row: Row) -> Task:
        name, turns = str(row.values.get("id")), row.values["question"]
        if len(turns) != 1 or "function" not in row.values:
            raise DataError(f"{row.where}: {name} has several turns, which need BFCL's own services. Use another file.")
        if accepted is not None and name not in accepted:
            raise DataError(f"{row.where}: {name} has no answer in {answers}.")
        functions = [_function(f) for f in row.values["function"]]
        messages = with_instruction(messages_of(row, turns[0], "question"), instruction)
        messages = with_system_text(with_system(row.where, messages, system), describe(functions))
        calls = [] if accepted is None else accepted[name]
        return Task(name, ENV, messages, _gold(calls), {"accepted": calls, "functions": functions})

    return read


def verify(task: Task, text: str) -> Verdict:
    """Passes where a reply makes exactly the calls that are right, in any order; where none is, one that makes none.

    Names must be equal, arguments among the accepted values; one may be left out where "" is accepted. Texts are
    compared without case, spaces and `, . / - _ * ^`, numbers by value.
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


def _function(given: Mapping[str, Any]) -> dict[str, Any]:
    """A function's schema with JSON schema's names for its types."""
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


def _gold(calls: Sequence[Mapping[str, Any]]) -> str:
    """A reply that makes the calls, with the first value that is accepted of each argument that must be given."""
    if not calls:
        return NO_CALL
    made = [{"name": name, "arguments": _first(accepted)} for call in calls for name, accepted in call.items()]
    return "\n".join(f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in made)


def _first(accepted: Any) -> Any:
    """A value of what `_same` accepts."""
    if isinstance(accepted, Mapping):
        return {name: _first(values[0]) for name, values in accepted.items() if "" not in values}
    return [_first(one) for one in accepted] if isinstance(accepted, list) else accepted


def _same_call(call: tuple[str, Any], wanted: Mapping[str, Any]) -> bool:
    ((name, accepted),) = wanted.items()
    return call[0] == name and _same(call[1], accepted)


def _same(given: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one; an object is where each entry is among the values wanted for its name."""
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
    """Most calls that can each have a wanted one of their own (Kuhn's augmenting paths)."""
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
