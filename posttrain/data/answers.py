"""Extracts the final answer from a text; pure functions shared by data loading and verifiers."""

from __future__ import annotations

import re

from posttrain.data.thoughts import tags_of

_MARKED = re.compile(r"(?:^|\s)####[ \t]*([^\n]*)")
_SAID = re.compile(r"\banswer\b(?:\s+is|\s*[:=])\s*[:=]?\s*([^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_COMMA_NUMBER = re.compile(r"(?<=\d),(?=\d{3})")


def final_part(text: str) -> str:
    """The text after the last `</think>`; the whole text if there is no thinking, "" if the thinking never ends.

    A text that begins with another tag of a thought, such as `<thinking>` or `[THINK]`, is split at that tag's end.
    """
    opening, closing = tags_of(text)
    head, closed, tail = text.rpartition(closing)
    if opening in tail:
        return ""
    return (tail if closed else head + tail).strip()


def boxed(text: str) -> list[tuple[int, str]]:
    r"""Start and content of every complete `\boxed{…}` with balanced braces, inner before outer."""
    found: list[tuple[int, str]] = []
    opened: list[re.Match[str]] = []
    for brace in re.finditer(r"\\(?:boxed|fbox)\s*\{|[{}]", text):
        if brace.group() != "}":
            opened.append(brace)
        elif opened and len((start := opened.pop()).group()) > 1:
            found.append((start.start(), text[start.end() : brace.start()].strip()))
    return found


def marked_answer(text: str) -> str | None:
    r"""The last answer that a text marks with `####`, `\boxed{}` or "the answer is", or None.

    After "the answer is", the rest of the sentence counts: "The answer is 3.5. Done." gives "3.5".
    """
    found = boxed(text) + [(m.start(), m.group(1).strip()) for m in _MARKED.finditer(text)]
    found += [(m.start(), _SENTENCE_END.split(m.group(1))[0].strip(" *")) for m in _SAID.finditer(text)]
    return max(found)[1] if found else None


def final_answer(text: str) -> str:
    """The answer that counts as a completion's vote: the marked answer, else the text after the thinking."""
    return marked_answer(final_part(text)) or final_part(text)


def split_gold(text: str) -> tuple[str, str]:
    r"""Splits a reference solution into (gold answer, worked solution).

    GSM8K's `… #### 1,072` gives ("1072", "…"), and a solution with `\boxed{}` gives (its content, the whole solution).
    Any other text is the gold answer itself, with an empty worked solution.
    """
    marks = list(_MARKED.finditer(text))
    if marks:
        gold = _COMMA_NUMBER.sub("", marks[-1].group(1).strip())
        return gold, text[: marks[-1].start()].strip()
    boxes = boxed(text)
    return (boxes[-1][1], text.strip()) if boxes else (text.strip(), "")
