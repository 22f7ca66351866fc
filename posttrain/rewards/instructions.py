"""IFEval: the 25 kinds of verifiable instructions (arXiv 2311.07911), checked strictly or loosely.

A row has the columns `instruction_id_list` and `kwargs`, one set of arguments per id. Each kind is a function of the
reply and those arguments. Each function documents what the paper leaves open; an empty reply follows no instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.data.answers import final_part
from posttrain.rewards.judging import column
from posttrain.rewards.language import LANGUAGES, could_be
from posttrain.rewards.schema import read_json
from posttrain.types import RolloutError, Task, Verdict

CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""The responses that `constrained_response` allows."""

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Inc|Ltd|Co|U\.S|a\.m|p\.m)\.")
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*]*+(?=\s|$)|[。！？।؟]|\n\s*\n")


def ifeval(task: Task, text: str) -> Verdict:
    """The share of the task's instructions that the final answer follows; passes if it follows all of them.

    Parts: 1 or 0 for each instruction id; a second one of the same kind is `ID#2`. Raises RolloutError for an unknown
    id or invalid arguments.
    """
    return _check(task, [final_part(text)])


def ifeval_loose(task: Task, text: str) -> Verdict:
    """Loose `ifeval`: an instruction counts as followed if any of eight variants of the reply follows it.

    The variants: unchanged, without its first line, without its last, without both; each also without asterisks.
    """
    return _check(task, [*loosely(final_part(text))])


def loosely(text: str) -> Iterator[str]:
    """The eight variants of a reply for loose checking."""
    lines = text.split("\n")
    for kept in (lines, lines[1:], lines[:-1], lines[1:-1]):
        variant = "\n".join(kept).strip()
        yield variant
        yield variant.replace("*", "")


def _check(task: Task, variants: list[str]) -> Verdict:
    ids = column(task, "instruction_id_list", (list, tuple), "ifeval")
    kwargs = column(task, "kwargs", (list, tuple), "ifeval")
    if not ids or len(ids) != len(kwargs):
        raise RolloutError(
            f"task {task.id!r} has {len(ids)} instructions and {len(kwargs)} kwargs, expected as many of both.",
            boundary="reward",
        )
    parts: dict[str, float] = {}
    for name, arguments in zip(ids, kwargs, strict=True):
        if name not in INSTRUCTIONS:
            raise RolloutError(f"task {task.id!r} has the unknown instruction {name!r}.", boundary="reward")
        given = {key: value for key, value in (arguments or {}).items() if value is not None}
        try:
            followed = any(variant.strip() and INSTRUCTIONS[name](variant, **given) for variant in variants)
            INSTRUCTIONS[name]("?", **given)  # so that an empty reply does not hide invalid arguments
        except (TypeError, ValueError, AttributeError) as error:
            raise RolloutError(
                f"task {task.id!r}: invalid arguments {given!r:.80} for {name}: {error}.", boundary="reward"
            ) from None
        count = sum(key.partition("#")[0] == name for key in parts)
        parts[f"{name}#{count + 1}" if count else name] = float(followed)
    missed = [name for name, value in parts.items() if not value]
    share = 1 - len(missed) / len(parts)
    return Verdict(share, not missed, f"not followed: {', '.join(missed)}" if missed else "all followed", parts)


def _satisfies(count: int, relation: str, bound: int) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r} must be 'at least' or 'less than'")
    return count >= bound if relation == "at least" else count < bound


def sentences(text: str) -> int:
    """Number of sentences. A sentence ends with `.`, `!` or `?` before a space, an empty line, or the end of the text.

    The full stop of a common abbreviation does not end a sentence.
    """
    text = _ABBREVIATION.sub(lambda match: match.group().replace(".", ""), text)
    return sum(bool(_WORD.search(piece)) for piece in _SENTENCE_END.split(text))


def words(text: str) -> int:
    """Number of words; `well-known` and `don't` count as one each."""
    return len(_WORD.findall(text))


def keywords_existence(text: str, keywords: list[str]) -> bool:
    """Every keyword occurs, ignoring case, possibly within a longer word."""
    return all(keyword.lower() in text.lower() for keyword in keywords)


def keywords_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword occurs that often, ignoring case, possibly within longer words."""
    return _satisfies(text.lower().count(keyword.lower()), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a whole word, ignoring case."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A character occurs that often, ignoring case."""
    if len(letter) != 1:
        raise ValueError(f"letter {letter!r} must be a single character")
    return _satisfies(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    """The reply is in the language or, if it is too short to tell, in its script."""
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}")
    return could_be(text, language)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    """At least, or fewer than, that many sentences (`sentences`)."""
    return _satisfies(sentences(text), relation, num_sentences)


def number_words(text: str, num_words: int, relation: str) -> bool:
    """At least, or fewer than, that many words (`words`)."""
    return _satisfies(words(text), relation, num_words)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly that many non-empty paragraphs separated by `***`, which may also open or close the reply."""
    pieces = [piece.strip() for piece in re.split(r"(?<!\*)\*\*\*(?!\*)", text)]
    inner = pieces[bool(not pieces[0]) : len(pieces) - (not pieces[-1])]
    return all(inner) and len(inner) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly that many paragraphs separated by empty lines, and the n-th begins with a word, ignoring case."""
    pieces = [piece.strip() for piece in re.split(r"\n\s*\n", text) if piece.strip()]
    if not 1 <= nth_paragraph <= num_paragraphs == len(pieces):
        return False
    first = _WORD.search(pieces[nth_paragraph - 1].split()[0])
    return first is not None and first.group().lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least that many `[placeholders]`."""
    return len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """A line or sentence begins with the marker; spaces within it and its last full stop are optional."""
    letters = [letter for letter in postscript_marker if letter.isalpha()]
    if not letters:
        raise ValueError(f"postscript_marker {postscript_marker!r} contains no letter")
    marker = r"\.\s?".join(map(re.escape, letters))
    return re.search(rf"(?:^|[\s*_\"“(])(?<!p\. ){marker}(?!\w)", text, re.IGNORECASE) is not None


def bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly that many lines that begin with `* ` or `- `."""
    return len(re.findall(r"^[ \t]*[*-][ \t]+\S", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    """Exactly one of the three allowed responses."""
    return sum(choice in text for choice in CHOICES) == 1


def highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least that many `*highlighted*` or `**highlighted**` spans within a line; bullets do not count."""
    bare = re.sub(r"^[ \t]*\*[ \t]+", "", text, flags=re.MULTILINE)
    return len(re.findall(r"(?<!\*)(\*{1,3})(?=[^\s*])[^*\n]*[^\s*]\1(?!\*)", bare)) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least that many sections, each starting with the (case-sensitive) marker and a number or letter."""
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter)}\s?(?:\d+|[A-Z]\b)", text)) >= num_sections


def json_format(text: str) -> bool:
    """The whole reply is JSON, optionally within one ``` block."""
    match = re.fullmatch(r"```(?:json|JSON|Json)?\s(.*)```", text.strip(), re.DOTALL)
    try:
        read_json(match[1] if match else text)
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    """Contains a non-empty `<<title>>`."""
    return any(found.strip() for found in re.findall(r"<<([^<>\n]+)>>", text))


def two_responses(text: str) -> bool:
    """Two different responses separated by `******`, which may also open or close the reply."""
    pieces = [piece.strip() for piece in text.split("******")]
    inner = pieces[bool(not pieces[0]) : len(pieces) - (not pieces[-1])]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The reply begins with the prompt, ignoring case."""
    prompt = prompt_to_repeat.strip().lower()
    return text.strip().lower().startswith(prompt)


def end_checker(text: str, end_phrase: str) -> bool:
    """The reply ends with the phrase, ignoring case and a closing quotation mark."""
    return text.strip().strip('"').rstrip().lower().endswith(end_phrase.strip().strip('"').lower())


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """At least, or fewer than, that many words in capitals; single letters such as `I` count."""
    return _satisfies(sum(word.isupper() for word in _WORD.findall(text)), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """English in capitals only."""
    return text.isupper() and could_be(text, "en")


def english_lowercase(text: str) -> bool:
    """English in lower case only."""
    return text.islower() and could_be(text, "en")


def no_comma(text: str) -> bool:
    """Contains no comma of any script."""
    return not set(",，،、") & set(text)


def quotation(text: str) -> bool:
    """The whole reply is in double quotation marks."""
    bare = text.strip()
    return len(bare) > 2 and bare[0] in '"“' and bare[-1] in '"”'


INSTRUCTIONS: Mapping[str, Callable[..., Any]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""Instruction id → function that checks whether a reply follows it."""
