"""Where the final answer stands in a text: pure functions that data files and verifiers share."""

from __future__ import annotations

import re

_MARKED = re.compile(r"(?:^|\s)####[ \t]*([^\n]*)")
_SAID = re.compile(r"\banswer\b(?:\s+is|\s*[:=])\s*[:=]?\s*([^\n]+)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_COMMA_NUMBER = re.compile(r"(?<=\d),(?=\d{3})")


def final_part(text: str) -> str:
    """What follows the last `</think>`; everything where there is no thinking; "" where thinking never ended."""
    head, closed, tail = text.rpartition("</think>")
    if "<think>" in tail:
        return ""
    return (tail if closed else head + tail).strip()


def boxed(text: str) -> list[tuple[int, str]]:
    r"""Start and content of every complete `\boxed{…}`, braces balanced, inner before outer."""
    found: list[tuple[int, str]] = []
    opened: list[re.Match[str]] = []
    for brace in re.finditer(r"\\(?:boxed|fbox)\s*\{|[{}]", text):
        if brace.group() != "}":
            opened.append(brace)
        elif opened and len((start := opened.pop()).group()) > 1:
            found.append((start.start(), text[start.end() : brace.start()].strip()))
    return found


def marked_answer(text: str) -> str | None:
    r"""The answer a text announces by `####`, `\boxed{}` or "the answer is"; the last one counts. None without one.

    A sentence is read up to its end: "The answer is 3.5. Done." gives "3.5".
    """
    found = boxed(text) + [(m.start(), m.group(1).strip()) for m in _MARKED.finditer(text)]
    found += [(m.start(), _SENTENCE_END.split(m.group(1))[0].strip(" *")) for m in _SAID.finditer(text)]
    return max(found)[1] if found else None


def split_gold(text: str) -> tuple[str, str]:
    r"""(gold, worked) of a reference solution.

    GSM8K's `… #### 1,072` gives ("1072", "…") and a solution with `\boxed{}` gives (its content, the whole solution).
    Any other text is the gold itself, with nothing worked.
    """
    marks = list(_MARKED.finditer(text))
    if marks:
        gold = _COMMA_NUMBER.sub("", marks[-1].group(1).strip())
        return gold, text[: marks[-1].start()].strip()
    boxes = boxed(text)
    return (boxes[-1][1], text.strip()) if boxes else (text.strip(), "")
