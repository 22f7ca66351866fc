"""Verifiers `regex` and `multiple_choice`."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import re2

from posttrain.data.answers import final_part, marked_answer
from posttrain.rewards.judging import column, gold_text, verdict
from posttrain.types import RolloutError, Task, Verdict

_TRIMMED = " \t\n$*_`'\"“”‘’()[]{}.,:;!?"
_WHY = re.compile(r"\b(?:because|since|as)\b.*", re.IGNORECASE | re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed)\s*\{([^{}]*)\}")


def regex(task: Task, text: str) -> Verdict:
    """Passes if the column `pattern` matches the whole final answer, or any part of it if `search` is true.

    Patterns are RE2's, which match in time linear in the text; look-around and back-references are not supported.
    Raises RolloutError for an invalid pattern.
    """
    pattern = compiled(column(task, "pattern", str, "regex"), f"task {task.id!r}")
    final = final_part(text).encode("utf-8", "replace").decode()
    match = pattern.search(final) if task.meta.get("search") else pattern.fullmatch(final)
    passed = match is not None
    return Verdict(float(passed), passed, f"{'matches' if passed else 'does not match'}: {final[-80:]}")


@lru_cache(maxsize=4096)
def compiled(pattern: str, where: str = "a schema") -> Any:
    """Compiles an RE2 pattern, in which `.` does not match a newline. Raises RolloutError if it is invalid."""
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        message = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise RolloutError(
            f"{where}: invalid RE2 pattern {pattern[:80]!r}: {message}. Look-around and back-references are not "
            "supported, because they can take exponential time.",
            boundary="reward",
        ) from None


def multiple_choice(task: Task, text: str) -> Verdict:
    """Passes if the final answer names the correct choice, by its letter or its text, and no other.

    The column `choices` lists the texts of A, B, C, …, or has `label` and `text` lists. The gold answer is a letter, a
    choice's text, or an index starting at 0. A reply that names two choices fails.
    """
    labels, texts = _choices(task)
    correct = _gold_index(task, labels, texts)
    final = final_part(text)
    announced = marked_answer(final)
    chosen = _named(announced, labels, texts) if announced else None
    if chosen is None and final:
        chosen = _named(final, labels, texts)
    if chosen is None and final:
        chosen = _named(final.splitlines()[-1], labels, texts)
    given = f"{labels[chosen]}" if chosen is not None else final
    return verdict(chosen == correct, given, f"{labels[correct]} ({texts[correct]})")


def _choices(task: Task) -> tuple[list[str], list[str]]:
    choices: Any = column(task, "choices", (list, tuple, Mapping), "multiple_choice")
    if isinstance(choices, Mapping):
        labels, texts = [*map(str, choices.get("label") or [])], [*map(str, choices.get("text") or [])]
    else:
        texts = [*map(str, choices)]
        labels = [*string.ascii_uppercase[: len(texts)]]
    if not 2 <= len(texts) == len(labels) == len(set(labels)):
        raise RolloutError(
            f"task {task.id!r} has choices={choices!r:.80}, expected a list of 2 to 26 texts, or `label` and `text` "
            "lists of the same length.",
            boundary="reward",
        )
    return labels, texts


def _gold_index(task: Task, labels: Sequence[str], texts: Sequence[str]) -> int:
    gold = gold_text(task)
    if gold in labels:
        return labels.index(gold)
    plain = [_plain(choice) for choice in texts]
    if plain.count(_plain(gold)) == 1:
        return plain.index(_plain(gold))
    if isinstance(task.answer, int) and not isinstance(task.answer, bool) and 0 <= task.answer < len(texts):
        return task.answer
    raise RolloutError(
        f"task {task.id!r} has the gold answer {gold[:60]!r}, which is not one of its choices {', '.join(labels)}.",
        boundary="reward",
    )


def _named(text: str, labels: Sequence[str], texts: Sequence[str]) -> int | None:
    """The index of the choice that a short text names, or None if it names none or several."""
    text = _WRAPPED.sub(r"\1", text.strip())
    bare = text.strip(_TRIMMED)
    if bare in labels or bare.upper() in labels:
        return labels.index(bare if bare in labels else bare.upper())
    plain = [_plain(choice) for choice in texts]
    if plain.count(_plain(text)) == 1:
        return plain.index(_plain(text))
    letters = "|".join(map(re.escape, labels))
    statement = _WHY.sub("", text)
    lead = re.match(
        rf"[\s*$(\[{{]*(?:(?:option|choice|answer)\s+)?[(\[]?({letters})(?=$|\s*[)\].:,*}}–—-]|\s+$)", statement
    )
    if lead is None:
        marked = set(re.findall(rf"(?<![\w(])\(({letters})\)|(?:\b[Oo]ption|\b[Cc]hoice)\s+({letters})(?!\w)", text))
        named = {first or second for first, second in marked}
        return labels.index(named.pop()) if len(named) == 1 else None
    rest = statement[lead.end() :].strip(_TRIMMED + "-–—")
    index = labels.index(lead[1])
    if not rest or _plain(rest) == plain[index]:
        return index
    another = re.search(rf"(?<!\w)(?:{letters})(?!\w)", rest) or _plain(rest) in plain
    return None if another else index


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(_TRIMMED).casefold()
