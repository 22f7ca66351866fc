"""Replies that must match a pattern, or name one of the choices a task gives."""

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
    """Passes where the column `pattern` matches the whole final answer, or anywhere in it with `search` true.

    Patterns are RE2's, whose time is linear in the text however it was written, so neither look-around nor
    back-references exist. Raises RolloutError for a pattern that RE2 does not know.
    """
    pattern = compiled(column(task, "pattern", str, "regex"), f"task {task.id!r}")
    final = final_part(text).encode("utf-8", "replace").decode()
    found = pattern.search(final) if task.meta.get("search") else pattern.fullmatch(final)
    passed = found is not None
    return Verdict(float(passed), passed, f"{'matches' if passed else 'does not match'}: {final[-80:]}")


@lru_cache(maxsize=4096)
def compiled(pattern: str, where: str = "a schema") -> Any:
    """An RE2 pattern, in which `.` matches no line break. Raises RolloutError naming what is wrong with it."""
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        said = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise RolloutError(
            f"{where}: the pattern {pattern[:80]!r} cannot be used: {said}. Patterns are RE2's, without look-around "
            "and back-references, because those can run for hours on some texts.",
            boundary="reward",
        ) from None


def multiple_choice(task: Task, text: str) -> Verdict:
    """Passes where the final answer names the right choice, by its letter or its text, and no other.

    The column `choices` lists the texts of A, B, C, …, or holds `label` and `text` lists. The gold answer is a letter,
    a choice's text, or a number counted from 0. A reply that names two choices fails.
    """
    labels, texts = _choices(task)
    right = _gold_index(task, labels, texts)
    final = final_part(text)
    announced = marked_answer(final)
    named = _named(announced, labels, texts) if announced else None
    if named is None and final:
        named = _named(final, labels, texts)
    if named is None and final:
        named = _named(final.splitlines()[-1], labels, texts)
    given = f"{labels[named]}" if named is not None else final
    return verdict(named == right, given, f"{labels[right]} ({texts[right]})")


def _choices(task: Task) -> tuple[list[str], list[str]]:
    said: Any = column(task, "choices", (list, tuple, Mapping), "multiple_choice")
    if isinstance(said, Mapping):
        labels, texts = [*map(str, said.get("label") or [])], [*map(str, said.get("text") or [])]
    else:
        texts = [*map(str, said)]
        labels = [*string.ascii_uppercase[: len(texts)]]
    if not 2 <= len(texts) == len(labels) == len(set(labels)):
        raise RolloutError(
            f"task {task.id!r} has choices={said!r:.80}, expected a list of 2 to 26 texts, or `label` and `text` lists "
            "of one length.",
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
        f"task {task.id!r} has the answer {gold[:60]!r}, which is none of its choices {', '.join(labels)}.",
        boundary="reward",
    )


def _named(said: str, labels: Sequence[str], texts: Sequence[str]) -> int | None:
    """The one choice that a short text names, or None: for no choice, and for several."""
    said = _WRAPPED.sub(r"\1", said.strip())
    bare = said.strip(_TRIMMED)
    if bare in labels or bare.upper() in labels:
        return labels.index(bare if bare in labels else bare.upper())
    plain = [_plain(choice) for choice in texts]
    if plain.count(_plain(said)) == 1:
        return plain.index(_plain(said))
    letters = "|".join(map(re.escape, labels))
    reason = _WHY.sub("", said)
    lead = re.match(
        rf"[\s*$(\[{{]*(?:(?:option|choice|answer)\s+)?[(\[]?({letters})(?=$|\s*[)\].:,*}}–—-]|\s+$)", reason
    )
    if lead is None:
        marked = set(re.findall(rf"(?<![\w(])\(({letters})\)|(?:\b[Oo]ption|\b[Cc]hoice)\s+({letters})(?!\w)", said))
        found = {first or second for first, second in marked}
        return labels.index(found.pop()) if len(found) == 1 else None
    rest = reason[lead.end() :].strip(_TRIMMED + "-–—")
    index = labels.index(lead[1])
    if not rest or _plain(rest) == plain[index]:
        return index
    another = re.search(rf"(?<!\w)(?:{letters})(?!\w)", rest) or _plain(rest) in plain
    return None if another else index


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(_TRIMMED).casefold()
