"""A chapter's Markdown as a tree that the page draws node by node, so that no text ever becomes markup.

A chapter is `# Title`, a lead, and sections `## …`. Inside a section, `::: intuition`, `::: mathematics` and
`::: implementation` open a layer that `:::` closes; what stands outside is seen in every layer. `$…$` is a formula in
TeX, `$$` on lines of their own a displayed one. `[^name]` points to a source, defined by a line `[^name]: …`. Fenced
blocks whose first word is in FENCES stand for something that is looked up: a function's source, a worked example.

A node is text, or {"tag": …, "children": [nodes], …}.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.tree import SyntaxTreeNode

from posttrain.lab.course.source import read_source
from posttrain.types import DataError, ResumeError

FOLDER = Path(__file__).parent
CHAPTERS = ("why", "rewards", "algorithms", "reasoning", "hands-on", "challenges")
LAYERS = ("intuition", "mathematics", "implementation")
FENCES = ("source", "worked", "explore", "exercise", "command")
EXPLORERS = ("stages", "preferences", "algorithms", "grpo", "hacking")
TAGS = {
    "paragraph": "p", "em": "em", "strong": "strong", "bullet_list": "ul", "ordered_list": "ol", "list_item": "li",
    "blockquote": "blockquote", "table": "table", "thead": "thead", "tbody": "tbody", "tr": "tr", "th": "th",
    "td": "td", "hr": "hr", "hardbreak": "br",
}  # fmt: skip
Node = str | dict[str, Any]


def chapters() -> list[dict[str, Any]]:
    """Every chapter in order: its name, title, lead, sections and how many words each layer has."""
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
def read_chapter(name: str) -> dict[str, Any]:
    """One chapter as JSON wants it, read once: chapters ship with the package, and so does the source that they show.

    Raises ResumeError for an unknown name, DataError where its text is wrong.
    """
    if name not in CHAPTERS:
        raise ResumeError(f"the course has no chapter {name!r}; it has {', '.join(CHAPTERS)}.")
    return {"name": name, **parse((FOLDER / f"{name}.md").read_text(encoding="utf-8"))}


def parse(text: str) -> dict[str, Any]:
    """The Markdown of a chapter as {title, lead, sections, sources, words}. Raises DataError, naming what is wrong."""
    text, notes = _take_notes(text)
    head, *rest = _split(text, "## ")
    title, _, lead = head.strip().partition("\n")
    if not title.startswith("# "):
        raise DataError(f"a chapter begins with {title[:40]!r}; expected '# ' and its title.")
    numbers: dict[str, int] = {}
    sections = [_section(piece, numbers) for piece in rest]
    if missing := set(numbers) - set(notes):
        raise DataError(f"the chapter points to sources that it does not define: {', '.join(sorted(missing))}.")
    if unused := set(notes) - set(numbers):
        raise DataError(f"the chapter defines sources that nothing points to: {', '.join(sorted(unused))}.")
    return {
        "title": title[2:].strip(),
        "lead": _blocks(lead, {}),
        "sections": sections,
        "sources": [{"name": one, "number": n, "children": _inline(notes[one])} for one, n in numbers.items()],
        "words": {layer: _count(sections, layer) for layer in LAYERS},
    }


def _take_notes(text: str) -> tuple[str, dict[str, str]]:
    """The text without its definitions of sources, and those, by name."""
    pattern = re.compile(r"^\[\^([\w-]+)\]:[ ]+(.+)\n?", re.MULTILINE)
    found = pattern.findall(text)
    if repeated := {name for name, _ in found if [n for n, _ in found].count(name) > 1}:
        raise DataError(f"the chapter defines a source twice: {', '.join(sorted(repeated))}.")
    return pattern.sub("", text), dict(found)


def _split(text: str, mark: str) -> list[str]:
    """What precedes the first line that begins with `mark`, then a piece for each such line outside of fences."""
    pieces: list[list[str]] = [[]]
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if line.startswith(mark) and not fenced:
            pieces.append([])
        pieces[-1].append(line)
    return ["\n".join(piece) for piece in pieces]


def _section(text: str, numbers: dict[str, int]) -> dict[str, Any]:
    """A section's title and its parts: {layer: its name or None, children}."""
    title, _, body = text.partition("\n")
    title = title[3:].strip()
    parts: list[dict[str, Any]] = []
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


def _count(sections: list[dict[str, Any]], layer: str) -> int:
    """Words that a reader of one layer meets, formulas and code left out."""
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
    """A text that points to no sources, as an exercise's is."""
    return _blocks(text, {})


def _inline(text: str) -> list[Node]:
    return _children(SyntaxTreeNode(MARKDOWN.parseInline(text)).children[0], {})


def _children(node: SyntaxTreeNode, numbers: dict[str, int]) -> list[Node]:
    """Its children as nodes; what only groups them is left out."""
    found: list[Node] = []
    for child in node.children:
        tight = child.type == "paragraph" and child.hidden  # a list whose items are one line each
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
    raise DataError(f"a chapter holds {kind} ({node.tag or node.content[:40]!r}), which its page cannot draw.")


def _checked(address: str) -> str:
    """An address within the lab, or one that a reader may follow out of it."""
    if not address.startswith(("/", "#", "https://", "http://")):
        raise DataError(f"a chapter links to {address!r}; expected /…, #… or https://….")
    return address


def _fence(node: SyntaxTreeNode) -> Node:
    """A fenced block: code, or what its first word and the name after it stand for."""
    what, _, name = node.info.strip().partition(" ")
    if what == "source":
        return {"tag": "source", **read_source(name.strip())}
    if what == "explore" and name not in EXPLORERS:
        raise DataError(f"there is no explorer {name!r}; there are {', '.join(EXPLORERS)}.")
    if what == "command":
        return {"tag": "command", "children": [node.content.rstrip("\n")]}
    if what in FENCES:
        return {"tag": what, "name": name.strip()}
    return {"tag": "pre", "children": [{"tag": "code", "children": [node.content.rstrip("\n")]}]}


def _math(state: StateInline, silent: bool) -> bool:
    """$…$ in a line: no space inside the signs, no digit after them, so that prices stay prices."""
    found = re.compile(r"\$(?=\S)([^$\n]*[^$\s\\])\$(?!\d)").match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        state.push("math", "", 0).content = found[1]
    state.pos = found.end()
    return True


def _note(state: StateInline, silent: bool) -> bool:
    """[^name], a source."""
    found = re.compile(r"\[\^([\w-]+)\]").match(state.src, state.pos, state.posMax)
    if not found:
        return False
    if not silent:
        state.push("note", "", 0).content = found[1]
    state.pos = found.end()
    return True


def _math_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Lines between two lines `$$`."""
    if state.getLines(start, start + 1, state.blkIndent, False).strip() != "$$":
        return False
    close = start + 1
    while close < end and state.getLines(close, close + 1, state.blkIndent, False).strip() != "$$":
        close += 1
    if close == end:
        raise DataError(f"a displayed formula is never closed: {state.getLines(start + 1, start + 2, 0, False)!r}.")
    if not silent:
        state.push("math_block", "", 0).content = state.getLines(start + 1, close, state.blkIndent, False)
        state.line = close + 1
    return True


def _markdown() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.inline.ruler.before("escape", "math", _math)
    reader.inline.ruler.before("link", "note", _note)
    reader.block.ruler.before("fence", "math_block", _math_block, {"alt": ["paragraph", "blockquote", "list"]})
    return reader


MARKDOWN = _markdown()
