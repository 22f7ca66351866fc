"""How the code reads: short loops that repeat little of each other, few calls from a loop to a token, typed recipes."""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain as pt
from posttrain import algos
from posttrain.models import kernels
from tests import tiny

PACKAGE = Path(algos.__file__).parents[1]
LONGEST = {"grpo": 100}
REPEATED_LINES = 6  # shorter repetitions are the vocabulary of a loop


def shape(line: str) -> str:
    """A line of code without its names, numbers and texts."""
    marks: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline):
            if token.type == tokenize.NAME:
                marks.append(token.string if keyword.iskeyword(token.string) else "name")
            elif token.type in (tokenize.NUMBER, tokenize.STRING):
                marks.append("value")
            elif token.type == tokenize.OP:
                marks.append(token.string)
    except tokenize.TokenError:  # a line of a longer expression: what was read of it is its shape
        marks.append("…")
    return " ".join(marks)


def runs() -> dict[str, list[str]]:
    """The lines of each algorithm's `run`."""
    found: dict[str, list[str]] = {}
    for file in sorted((PACKAGE / "algos").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name == "run":
                found[file.stem] = text.splitlines()[node.lineno - 1 : node.end_lineno]
    return found


def code(lines: Sequence[str]) -> list[str]:
    """The lines that are neither blank nor comments."""
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def repeated(lines: Sequence[str], others: Sequence[Sequence[str]]) -> set[int]:
    """Indices of the lines that are part of REPEATED_LINES or more of the same shape in one of the others."""
    windows = lambda shapes: [tuple(shapes[i : i + REPEATED_LINES]) for i in range(len(shapes) - REPEATED_LINES + 1)]
    known = {window for other in others for window in windows([*map(shape, other)])}
    mine = windows([*map(shape, lines)])
    return {i + k for i, window in enumerate(mine) if window in known for k in range(REPEATED_LINES)}


def test_lines_of_one_shape_are_found_whatever_their_names() -> None:
    first = [f"a{i} = f{i}(x, {i})" for i in range(8)]
    second = [*(f"b{i} = g(y, 'text')" for i in range(7)), "return b0"]
    assert repeated(first, [second]) == {*range(8)}
    assert repeated(first, [second[:5]]) == set()


@pytest.mark.parametrize("name", sorted(runs()))
def test_an_algorithms_run_is_short_and_repeats_little_of_the_others(name: str) -> None:
    found = runs()
    assert len(found[name]) <= LONGEST.get(name, 80)
    mine, others = code(found[name]), [code(lines) for key, lines in found.items() if key != name]
    share = len(repeated(mine, others)) / len(mine)
    assert share <= 0.2, f"{share:.0%} of {name}.run are in the run of another algorithm, too"


def test_a_loop_is_at_most_nine_calls_away_from_a_drawn_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    draw = kernels.draw

    def drawing(*args: torch.Tensor, **more: float) -> tuple[torch.Tensor, torch.Tensor]:
        frames = [(frame.filename, frame.name) for frame in traceback.extract_stack()[:-1]]
        starts = [i for i, (file, name) in enumerate(frames) if (Path(file).name, name) == ("grpo.py", "run")]
        loop = max(starts, default=0)
        if not calls and loop and not any("evaluation" in file for file, _ in frames[loop:]):
            calls.extend(frames[loop:] + [(kernels.__file__, "draw")])
        return draw(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "draw", drawing)
    model, length = tiny.chatty(tmp_path / "model"), lambda completion: len(completion) % 3 / 2
    small: dict[str, Any] = {
        "rollout__max_tokens": 4,
        "rollout__slots": 32,
        "prompts": 2,
        "group_size": 2,
        "problems": 2,
        "count": 16,
    }
    pt.grpo(str(model), "sums", length, tmp_path / "run", steps=1, **small)
    ours = {Path(file).name for file, _ in calls if "posttrain" in file}
    # five files, and the journal: it wraps any generator, so it is in every way to one
    assert calls and len(calls) <= 9 and len(ours - {"journal.py"}) <= 5, calls


def test_recipes_are_typed_and_free_form_dictionaries_are_few() -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    assert not re.search(r"\brecipe: Any\b", text)
    assert len(re.findall(r"\b(?:dict|Mapping)\[str, Any\]", text)) <= 30
