"""Parses a chapter's Markdown into a tree that the page renders node by node, so that text never becomes markup.

A chapter is `# Title`, a lead, and sections `## …`. Inside a section, `::: intuition`, `::: mathematics` and
`::: implementation` open a layer that `:::` closes; everything else is shown in every layer. `$…$` is a TeX formula,
`$$` on lines of their own a display formula. `[^name]` refers to a source, defined by a line `[^name]: …`. A fenced
block whose first word is in FENCES is replaced by what it names, such as a function's source or a worked example.

A node is text, or {"tag": …, "children": [nodes], …}.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TypedDict

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.tree import SyntaxTreeNode

from posttrain.lab.course.source import read_source
from posttrain.types import DataError, Json, ResumeError

FOLDER = Path(__file__).parent
CHAPTERS = ("why", "rewards", "algorithms", "reasoning", "hands-on", "challenges")
LAYERS = ("intuition", "mathematics", "implementation")
FENCES = ("source", "worked", "explore", "exercise", "command")
EXPLORERS = ("stages", "preferences", "algorithms", "grpo", "hacking", "search")
TAGS = {
    "paragraph": "p", "em": "em", "strong": "strong", "bullet_list": "ul", "ordered_list": "ol", "list_item": "li",
    "blockquote": "blockquote", "table": "table", "thead": "thead", "tbody": "tbody", "tr": "tr", "th": "th",
    "td": "td", "hr": "hr", "hardbreak": "br",
}  # fmt: skip
Node = str | Json


class Part(TypedDict):
    """Nodes of a section that one layer shows, or every layer (None)."""

    layer: str | None
    children: list[Node]


class Heading(TypedDict):
    """A section's id and title."""

    id: str
    title: str


class Section(Heading):
    """A section with its parts."""

    parts: list[Part]


class Source(TypedDict):
    """A source that a chapter refers to."""

    name: str
    number: int
    children: list[Node]


class Parsed(TypedDict):
    """A parsed chapter; `words` counts the words that a reader of each layer sees."""

    title: str
    lead: list[Node]
    sections: list[Section]
    sources: list[Source]
    words: dict[str, int]


class Chapter(Parsed):
    """A chapter with its name."""

    name: str


class ChapterLine(TypedDict):
    """A chapter in the list of chapters."""

    name: str
    title: str
    lead: list[Node]
    sections: list[Heading]
    words: dict[str, int]


def chapters() -> list[ChapterLine]:
    """All chapters in order."""
    found = [read_chapter(name) for name in CHAPTERS]
    return [
        {
            "name": chapter["name"],
            "title": chapter["title"],
            "lead": chapter["lead"],
            "sections": [{"id": one["id"], "title": one["title"]} for one in chapter["sections"]],
            "words": chapter["words"],
        }
        for chapter in found
    ]


@cache
def read_chapter(name: str) -> Chapter:
    """One chapter for JSON, parsed once, because chapters and the sources they show do not change while installed.

    Raises ResumeError for an unknown name, DataError if the text is invalid.
    """
    if name not in CHAPTERS:
        raise ResumeError(f"the course has no chapter {name!r}; choose one of {', '.join(CHAPTERS)}.")
    return {"name": name, **parse((FOLDER / f"{name}.md").read_text(encoding="utf-8"))}


def parse(text: str) -> Parsed:
    """Parses a chapter. Raises DataError that names the problem."""
    text, notes = _take_notes(text)
    head, *rest = _split(text, "## ")
    title, _, lead = head.strip().partition("\n")
    if not title.startswith("# "):
        raise DataError(f"a chapter starts with {title[:40]!r}; expected '# ' and its title.")
    numbers: dict[str, int] = {}
    sections = [_section(piece, numbers) for piece in rest]
    if missing := set(numbers) - set(notes):
        raise DataError(f"the chapter refers to undefined sources: {', '.join(sorted(missing))}.")
    if unused := set(notes) - set(numbers):
        raise DataError(f"the chapter defines unused sources: {', '.join(sorted(unused))}.")
    return {
        "title": title[2:].strip(),
        "lead": _blocks(lead, {}),
        "sections": sections,
        "sources": [{"name": one, "number": n, "children": _inline(notes[one])} for one, n in numbers.items()],
        "words": {layer: _count(sections, layer) for layer in LAYERS},
    }


def _take_notes(text: str) -> tuple[str, dict[str, str]]:
    """The text without its source definitions, and the definitions by name."""
    pattern = re.compile(r"^\[\^([\w-]+)\]:[ ]+(.+)\n?", re.MULTILINE)
    found = pattern.findall(text)
    if repeated := {name for name, _ in found if [n for n, _ in found].count(name) > 1}:
        raise DataError(f"the chapter defines a source twice: {', '.join(sorted(repeated))}.")
    return pattern.sub("", text), dict(found)


def _split(text: str, mark: str) -> list[str]:
    """The text before the first line that starts with `mark`, then one piece per such line outside fenced blocks."""
    pieces: list[list[str]] = [[]]
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if line.startswith(mark) and not fenced:
            pieces.append([])
        pieces[-1].append(line)
    return ["\n".join(piece) for piece in pieces]


def _section(text: str, numbers: dict[str, int]) -> Section:
    """Parses a section; `numbers` collects the sources it refers to."""
    title, _, body = text.partition("\n")
    title = title[3:].strip()
    parts: list[Part] = []
    layer: str | None = None
    for piece in _split(body, ":::"):
        mark, _, rest = piece.partition("\n") if piece.startswith(":::") else ("", "", piece)
        named = mark[3:].strip()
        if mark:
            if bool(named) == (layer is not None) or (named and named not in LAYERS):
                raise DataError(f"section {title!r}: {mark!r} where layer {layer!r} is open; layers do not nest.")
            layer = named or None
        if children := _blocks(rest, numbers):
            parts.append({"layer": layer, "children": children})
    if layer:
        raise DataError(f"section {title!r}: layer {layer!r} is never closed.")
    return {"id": re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"), "title": title, "parts": parts}


def _count(sections: list[Section], layer: str) -> int:
    """Number of words that a reader of one layer sees, without formulas and code."""
    parts = [part for section in sections for part in section["parts"] if part["layer"] in (None, layer)]
    return sum(len(_words(node).split()) for part in parts for node in part["children"])


def _words(node: Node) -> str:
    if isinstance(node, str):
        return node
    if node["tag"] in ("pre", "command"):
        return ""
    between = " " if node["tag"] in ("ul", "ol", "table", "thead", "tbody", "tr", "blockquote") else ""
    return between.join(_words(child) for child in node.get("children", []))


# --- Markdown -------------------------------------------------------------------------------------------------------


def _blocks(text: str, numbers: dict[str, int]) -> list[Node]:
    return [_node(child, numbers) for child in SyntaxTreeNode(MARKDOWN.parse(text)).children]


def nodes(text: str) -> list[Node]:
    """Parses a text without references to sources, such as an exercise's."""
    return _blocks(text, {})


def _inline(text: str) -> list[Node]:
    return _children(SyntaxTreeNode(MARKDOWN.parseInline(text)).children[0], {})


def _children(node: SyntaxTreeNode, numbers: dict[str, int]) -> list[Node]:
    """A node's children, without nodes that only group them."""
    found: list[Node] = []
    for child in node.children:
        tight = child.type == "paragraph" and child.hidden  # a list with one line per item
        found += _children(child, numbers) if child.type == "inline" or tight else [_node(child, numbers)]
    return found


def _node(node: SyntaxTreeNode, numbers: dict[str, int]) -> Node:
    kind = node.type
    if kind in ("text", "softbreak"):
        return node.content or " "
    if kind == "code_inline":
        return {"tag": "code", "children": [node.content]}
    if kind in ("math", "math_block"):
        return {"tag": "formula", "tex": node.content.strip(), "display": kind == "math_block"}
    if kind == "note":
        return {"tag": "note", "name": node.content, "number": numbers.setdefault(node.content, len(numbers) + 1)}
    if kind == "fence":
        return _fence(node)
    if kind == "link":
        return {"tag": "a", "href": _checked(str(node.attrs["href"])), "children": _children(node, numbers)}
    if kind == "heading" and node.tag == "h3":
        return {"tag": "h3", "children": _children(node, numbers)}
    if kind in TAGS:
        return {"tag": TAGS[kind], "children": _children(node, numbers)}
    raise DataError(f"a chapter contains {kind} ({node.tag or node.content[:40]!r}), which the page cannot render.")


def _checked(address: str) -> str:
    """Returns a link target inside the lab or on the web. Raises DataError for any other."""
    if not address.startswith(("/", "#", "https://", "http://")):
        raise DataError(f"a chapter links to {address!r}; expected /…, #… or https://….")
    return address


def _fence(node: SyntaxTreeNode) -> Node:
    """A fenced block: code, or the item named by its info string."""
    what, _, name = node.info.strip().partition(" ")
    if what == "source":
        return {"tag": "source", **read_source(name.strip())}
    if what == "explore" and name not in EXPLORERS:
        raise DataError(f"there is no explorer {name!r}; choose one of {', '.join(EXPLORERS)}.")
    if what == "command":
        return {"tag": "command", "children": [node.content.rstrip("\n")]}
    if what in FENCES:
        return {"tag": what, "name": name.strip()}
    return {"tag": "pre", "children": [{"tag": "code", "children": [node.content.rstrip("\n")]}]}


def _math(state: StateInline, silent: bool) -> bool:
    """Inline $…$: no space just inside the signs and no digit after them, so that prices are not formulas."""
    found = re.compile(r"\$(?=\S)([^$\n]*[^$\s\\])\$(?!\d)").match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        state.push("math", "", 0).content = found[1]
    state.pos = found.end()
    return True


def _note(state: StateInline, silent: bool) -> bool:
    """[^name], a reference to a source."""
    found = re.compile(r"\[\^([\w-]+)\]").match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        state.push("note", "", 0).content = found[1]
    state.pos = found.end()
    return True


def _math_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A display formula between two `$$` lines."""
    if state.getLines(start, start + 1, state.blkIndent, False).strip() != "$$":
        return False
    close = start + 1
    while close < end and state.getLines(close, close + 1, state.blkIndent, False).strip() != "$$":
        close += 1
    if close == end:
        raise DataError(f"a display formula is never closed: {state.getLines(start + 1, start + 2, 0, False)!r}.")
    if not silent:
        state.push("math_block", "", 0).content = state.getLines(start + 1, close, state.blkIndent, False)
        state.line = close + 1
    return True


def _markdown() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.inline.ruler.before("escape", "math", _math)
    reader.inline.ruler.before("link", "note", _note)
    reader.block.ruler.before("fence", "math_block", _math_block, {"alt": ["paragraph", "blockquote", "list"]})
    for ruler in (reader.core.ruler, reader.block.ruler, reader.inline.ruler, reader.inline.ruler2):
        ruler.getRules()  # compiled here: the library compiles on first use, where two threads would see half the rules
    return reader


MARKDOWN = _markdown()
