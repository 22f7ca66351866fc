"""Reward expressions: `math + 0.2*format`, `format & math`, `math & cosine_length(limit=4000)`.

    rewards  = sum, { "&", sum }                  all but the last are gates: they must pass, or the score is 0
    sum      = term, { ("+" | "-"), term }        the first term determines whether a reply passes
    term     = [ number, "*" ], reward
    reward   = name, [ "(", setting, { ",", setting }, ")" ], [ "@", tasks ]  |  "(", rewards, ")"
    setting  = column, "=", (number | name | "text")

A name is anything `reward.name` accepts on its own: a verifier, `auto`, `FILE.py:FUNCTION`, `model:FOLDER`; quote it if
it contains spaces or operators. A setting overrides a column of every task. `@` restricts a reward to the tasks of one
source, as in `auto@arithmetic + model:FOLDER@requests` or `math@'a.jsonl'`; for other tasks it is skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.types import ConfigError, RolloutError, Task, Verdict

_TOKEN = re.compile(
    r"(?P<text>'[^']*'|\"[^\"]*\")|(?P<name>[a-z]+:[^\s&*(),=@]+|[^\s&*+(),='\"@]+\.py:\w+)"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE]-?\d+)?(?!\w))|(?P<word>\w+)|(?P<sign>[-+*&(),=@])"
)


@dataclass(frozen=True)
class Leaf:
    """A named reward with the columns it sets and its position (character) in the expression."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    position: int = 1
    only: str = ""
    """The name of the tasks it applies to; empty means all."""

    @property
    def key(self) -> tuple[str, tuple[tuple[str, Any], ...], str]:
        """Leaves with the same key are the same reward, wherever they occur."""
        return self.name, self.settings, self.only

    def concerns(self, task: Task) -> bool:
        """Whether it applies to this task, by its source, its column `data_source`, or a built-in task's kind."""
        names = (task.env, task.source, *(task.meta.get(column) for column in ("kind", "skill", "data_source")))
        return not self.only or self.only in names


@dataclass(frozen=True)
class Sum:
    """A weighted sum of rewards."""

    terms: tuple[tuple[float, Node], ...]


@dataclass(frozen=True)
class Gate:
    """The last reward's score, or 0 unless all rewards before it pass."""

    parts: tuple[Node, ...]


Node = Leaf | Sum | Gate


def parse(text: str) -> Node:
    """Parses a reward expression. Raises ConfigError with the position of the error."""
    if _on_disk(text):
        return Leaf(text)
    parser = _Parser(text)
    tree = parser.rewards()
    if parser.position < len(parser.tokens):
        raise parser.error("expected +, -, & or the end of the expression")
    return tree


def summed(nodes: Sequence[Node]) -> Node:
    """The sum of rewards with weight 1; a single one is itself."""
    if not nodes:
        raise ConfigError("the list of rewards is empty. Give at least one.")
    return nodes[0] if len(nodes) == 1 else Sum(tuple((1.0, node) for node in nodes))


def weighted(tree: Node, weights: Sequence[float]) -> Node:
    """The tree with the weights of its terms multiplied by `weights`. Raises ConfigError if the numbers differ."""
    if not weights:
        return tree
    terms = tree.terms if isinstance(tree, Sum) else ((1.0, tree),)
    if len(weights) != len(terms):
        raise ConfigError(f"reward.weights has {len(weights)} values for {len(terms)} rewards. Give one for each.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"reward.weights={list(weights)} are not all finite numbers.")
    return Sum(tuple((weight * own, node) for weight, (own, node) in zip(weights, terms, strict=True)))


def as_term(text: str) -> str:
    """A reward as it is written within an expression."""
    parse(text)
    return f"'{text}'" if _on_disk(text) else f"({text})"


def leaves(tree: Node) -> list[Leaf]:
    """The distinct rewards of a tree, from left to right."""
    if isinstance(tree, Leaf):
        return [tree]
    inner = [node for _, node in tree.terms] if isinstance(tree, Sum) else tree.parts
    return list({leaf.key: leaf for node in inner for leaf in leaves(node)}.values())


def leaves_of(text: str) -> list[Leaf]:
    """The distinct rewards in an expression. Raises ConfigError as `parse` does."""
    return leaves(parse(text))


def labels(tree: Node) -> dict[Any, str]:
    """Each leaf's key → its short name in a verdict's parts: a file's function name, or `model` for a folder."""
    names: dict[Any, str] = {}
    for leaf in leaves(tree):
        short = leaf.name.rpartition(":")[2] if ".py:" in leaf.name else leaf.name.partition(":")[0]
        taken = sum(label.partition("#")[0] == short for label in names.values())
        names[leaf.key] = f"{short}#{taken + 1}" if taken else short
    return names


def joined(tree: Node, verdicts: Mapping[Any, Verdict]) -> Verdict:
    """Combines the verdicts (by key) of the leaves that apply to a reply's task into one.

    Parts: each leaf's score and its own parts. Raises RolloutError if no leaf applies to the task.
    """
    combined = _score(tree, verdicts)
    if combined is None:
        raise RolloutError(
            "no part of the reward applies to this task; add one for it, or one without @.", boundary="reward"
        )
    score, passed = combined
    parts: dict[str, float] = {}
    details: list[str] = []
    for key, label in ((key, label) for key, label in labels(tree).items() if key in verdicts):
        parts[label] = verdicts[key].score
        parts |= {f"{label}/{name}": value for name, value in verdicts[key].parts.items()}
        details += [f"{label}: {verdicts[key].detail}"] if verdicts[key].detail else []
    return Verdict(score, passed, "; ".join(details), parts)


def _score(tree: Node, verdicts: Mapping[Any, Verdict]) -> tuple[float, bool] | None:
    """(score, passed), or None if no leaf of the tree applies to the task and so there are no verdicts."""
    if isinstance(tree, Leaf):
        return (verdicts[tree.key].score, verdicts[tree.key].passed) if tree.key in verdicts else None
    if isinstance(tree, Sum):
        terms = [(weight, _score(node, verdicts)) for weight, node in tree.terms]
        scored = [(weight, *result) for weight, result in terms if result is not None]
        return (sum(weight * score for weight, score, _ in scored), scored[0][2]) if scored else None
    *gates, last = (_score(node, verdicts) for node in tree.parts)
    gates_passed = all(gate[1] for gate in gates if gate is not None)
    return None if last is None else ((last[0] if gates_passed else 0.0), gates_passed and last[1])


def _on_disk(text: str) -> bool:
    """True for an existing file's function or existing model folders, whose paths may contain any character."""
    file, colon, name = text.rpartition(":")
    if colon and file.endswith(".py"):
        return name.isidentifier() and Path(file).is_file()
    return text.startswith("model:") and all(Path(part).is_dir() for part in text.removeprefix("model:").split("+"))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, first character
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match:
                self.tokens.append((match.lastgroup or "", match.group(), at + 1))
            elif not text[at].isspace():
                raise ConfigError(f"reward {text!r}, character {at + 1}: unexpected {text[at]!r}. Quote the name.")
            at = match.end() if match else at + 1

    def error(self, expected: str) -> ConfigError:
        if self.position < len(self.tokens):
            _, seen, at = self.tokens[self.position]
            return ConfigError(f"reward {self.text!r}, character {at}: found {seen!r}, {expected}.")
        return ConfigError(f"reward {self.text!r} ends after character {len(self.text)}: {expected}.")

    def take(self, *wanted: str) -> str | None:
        """Consumes and returns the next token if its kind or sign is one of `wanted`."""
        if self.position < len(self.tokens):
            kind, text, _ = self.tokens[self.position]
            if kind in wanted or (kind == "sign" and text in wanted):
                self.position += 1
                return text
        return None

    def rewards(self) -> Node:
        parts = [self.sum()]
        while self.take("&"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else Gate(tuple(parts))

    def sum(self) -> Node:
        terms = [self.term()]
        while sign := self.take("+", "-"):
            weight, node = self.term()
            terms.append((-weight if sign == "-" else weight, node))
        return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else Sum(tuple(terms))

    def term(self) -> tuple[float, Node]:
        number = self.take("number")
        if number is not None and not self.take("*"):
            raise self.error(f"expected * and a reward after the weight {number}")
        return float(number or 1), self.reward()

    def reward(self) -> Node:
        if self.take("("):
            inner = self.rewards()
            if not self.take(")"):
                raise self.error("expected ) or another part")
            return inner
        at = self.tokens[self.position][2] if self.position < len(self.tokens) else 0
        name = self.take("name", "word", "text")
        if name is None:
            raise self.error("expected a reward's name or (")
        settings = self.settings() if self.take("(") else ()
        only = self.take("word", "text") if self.take("@") else ""
        if only is None:
            raise self.error("expected a task name after @")
        return Leaf(name.strip("'\""), settings, at, only.strip("'\""))

    def settings(self) -> tuple[tuple[str, Any], ...]:
        settings: dict[str, object] = {}
        while True:
            column = self.take("word")
            if column is None or not self.take("="):
                raise self.error("expected a setting such as limit=4000")
            settings[column] = self.value()
            if self.take(")"):
                return tuple(sorted(settings.items()))
            if not self.take(","):
                raise self.error("expected , or )")

    def value(self) -> Any:
        negative = self.take("-")
        number = self.take("number")
        if number is not None:
            value = int(number) if number.isdecimal() else float(number)
            return -value if negative else value
        text = None if negative else self.take("text", "word")
        if text is None:
            raise self.error("expected a number, a word or a quoted string")
        return {"true": True, "false": False}.get(text, text.strip("'\""))
