"""Rewards put together from others: `math + 0.2*format`, `format & math`, `math & cosine_length(limit=4000)`.

    rewards  = sum, { "&", sum }                  every one but the last is a gate: it must pass, or the score is 0
    sum      = term, { ("+" | "-"), term }        the first term says whether a reply passes
    term     = [ number, "*" ], reward
    reward   = name, [ "(", setting, { ",", setting }, ")" ], [ "@", tasks ]  |  "(", rewards, ")"
    setting  = column, "=", (number | name | "text")

A name is what `reward.name` may be by itself: a verifier, `auto`, `FILE.py:FUNCTION`, `model:FOLDER`; in quotes where
it holds spaces or signs. A setting stands for a column of every task. With `@` a reward is for the tasks of one name in
a mixture, as in `auto@arithmetic + model:FOLDER@requests`; to others it is neither put nor counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    """One reward by its name, with columns that it sets, and the character of the recipe's text where it stands."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    position: int = 1
    only: str = ""
    """The name of the tasks that it is for; empty is all."""

    @property
    def key(self) -> tuple[str, tuple[tuple[str, Any], ...], str]:
        """Leaves with one key are one reward, wherever they stand."""
        return self.name, self.settings, self.only

    def concerns(self, task: Task) -> bool:
        """Whether it is for this task: its data set, or the kind or skill of a built-in one."""
        return not self.only or self.only in (task.env, task.meta.get("kind"), task.meta.get("skill"))


@dataclass(frozen=True)
class Sum:
    """Rewards with their weights."""

    terms: tuple[tuple[float, Node], ...]


@dataclass(frozen=True)
class Gate:
    """Rewards that must all pass, but the last, for the last one's score to count."""

    parts: tuple[Node, ...]


Node = Leaf | Sum | Gate


def parse(text: str) -> Node:
    """What a reward's text says. Raises ConfigError naming the character at fault."""
    if _on_disk(text):
        return Leaf(text)
    parser = _Parser(text)
    tree = parser.rewards()
    if parser.position < len(parser.tokens):
        raise parser.error("expected +, -, & or the end")
    return tree


def leaves(tree: Node) -> list[Leaf]:
    """The rewards of a tree from left to right, each once."""
    if isinstance(tree, Leaf):
        return [tree]
    inner = [node for _, node in tree.terms] if isinstance(tree, Sum) else tree.parts
    return list({leaf.key: leaf for node in inner for leaf in leaves(node)}.values())


def leaves_of(text: str) -> list[Leaf]:
    """The rewards that a reward's text names. Raises ConfigError as `parse` does."""
    return leaves(parse(text))


def labels(tree: Node) -> dict[Any, str]:
    """Each leaf's key → its short name in a verdict's parts: the function of a file, `model` of a folder."""
    found: dict[Any, str] = {}
    for leaf in leaves(tree):
        short = leaf.name.rpartition(":")[2] if ".py:" in leaf.name else leaf.name.partition(":")[0]
        taken = sum(label.partition("#")[0] == short for label in found.values())
        found[leaf.key] = f"{short}#{taken + 1}" if taken else short
    return found


def joined(tree: Node, verdicts: Mapping[Any, Verdict]) -> Verdict:
    """The verdict on one reply from those of the leaves that concern its task, by key.

    Parts: each leaf's score, and its own parts. Raises RolloutError where no leaf concerns the task.
    """
    whole = _score(tree, verdicts)
    if whole is None:
        raise RolloutError("no part of the reward is for this task; add one, or one without @.", boundary="reward")
    score, passed = whole
    parts: dict[str, float] = {}
    details: list[str] = []
    for key, label in ((key, label) for key, label in labels(tree).items() if key in verdicts):
        parts[label] = verdicts[key].score
        parts |= {f"{label}/{name}": value for name, value in verdicts[key].parts.items()}
        details += [f"{label}: {verdicts[key].detail}"] if verdicts[key].detail else []
    return Verdict(score, passed, "; ".join(details), parts)


def _score(tree: Node, verdicts: Mapping[Any, Verdict]) -> tuple[float, bool] | None:
    """(score, passed); None where nothing in the tree concerns the task, so that its verdicts are not there."""
    if isinstance(tree, Leaf):
        return (verdicts[tree.key].score, verdicts[tree.key].passed) if tree.key in verdicts else None
    if isinstance(tree, Sum):
        terms = [(weight, _score(node, verdicts)) for weight, node in tree.terms]
        scored = [(weight, *found) for weight, found in terms if found is not None]
        return (sum(weight * score for weight, score, _ in scored), scored[0][2]) if scored else None
    *gates, last = (_score(node, verdicts) for node in tree.parts)
    opened = all(gate[1] for gate in gates if gate is not None)
    return None if last is None else ((last[0] if opened else 0.0), opened and last[1])


def _on_disk(text: str) -> bool:
    """True for one file's function or for model folders whose paths may hold any sign."""
    file, colon, _ = text.rpartition(":")
    if colon and file.endswith(".py"):
        return Path(file).is_file()
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
                raise ConfigError(f"reward {text!r}, character {at + 1}: {text[at]!r} has no meaning. Quote the name.")
            at = match.end() if match else at + 1

    def error(self, expected: str) -> ConfigError:
        if self.position < len(self.tokens):
            _, seen, at = self.tokens[self.position]
            return ConfigError(f"reward {self.text!r}, character {at}: found {seen!r}, {expected}.")
        return ConfigError(f"reward {self.text!r} ends after character {len(self.text)}: {expected}.")

    def take(self, *wanted: str) -> str | None:
        """The next token where its kind, or the sign itself, is wanted; moves on then."""
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
            raise self.error("expected the name of tasks after @")
        return Leaf(name.strip("'\""), settings, at, only.strip("'\""))

    def settings(self) -> tuple[tuple[str, Any], ...]:
        found: dict[str, Any] = {}
        while True:
            column = self.take("word")
            if column is None or not self.take("="):
                raise self.error("expected a setting such as limit=4000")
            found[column] = self.value()
            if self.take(")"):
                return tuple(sorted(found.items()))
            if not self.take(","):
                raise self.error("expected , or )")

    def value(self) -> Any:
        negative = self.take("-")
        number = self.take("number")
        if number is not None:
            value = int(number) if number.isdecimal() else float(number)
            return -value if negative else value
        said = None if negative else self.take("text", "word")
        if said is None:
            raise self.error("expected a number, a word or a text in quotes")
        return {"true": True, "false": False}.get(said, said.strip("'\""))
