"""Builds one self-contained HTML page of tables, pictures and text, escaping everything that is not markup.

The page loads nothing, and its content security policy enforces that: no scripts, pictures only as data.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from posttrain.cli.tables import printable

STYLE = """
:root { color-scheme: light dark;
  --text: #1a1a1a; --soft: #5c5c5c; --ground: #ffffff; --box: #f4f4f2; --line: #cfcfca; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e4; --soft: #a8a8a2; --ground: #16171a; --box: #212328; --line: #43464d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; color: var(--text); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; white-space: pre-wrap; overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; max-width: 60rem; }
nav a { display: inline-block; margin-right: 1rem; color: inherit; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .25rem 0; }
caption span { display: block; max-width: min(60rem, calc(100vw - 2rem)); }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
tbody th { font-weight: 400; min-width: 9rem; max-width: 20rem; }
td { max-width: 34rem; white-space: pre-wrap; }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.wide { columns: 2 29rem; column-gap: 1rem; }
.box { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .75rem; min-width: 0; }
.box h4 { margin: 0 0 .25rem; font-size: .875rem; }
.note { color: var(--soft); font-size: .875rem; }
.text { margin: .25rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .875rem/1.45 ui-monospace, monospace; }
figure { margin: 0 0 1rem; break-inside: avoid; }
figure img { width: 100%; max-width: 40rem; height: auto; background: #ffffff; border-radius: 6px; padding: .25rem; }
summary { cursor: pointer; padding: .25rem 0; }
"""


class Html(str):
    """Text that is already markup; any other text is escaped when it is inserted."""


def put(value: object) -> Html:
    """A value as markup: escaped, with control characters made visible, unless it is already markup."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value))))


def tag(name: str, *children: object, **attributes: str) -> Html:
    """`<name …>children</name>`; a trailing underscore in an attribute's name is dropped (`class_`)."""
    attrs = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{attrs}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Concatenates values as markup."""
    return Html("".join(put(child) for child in children))


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """A table whose first column has the row headers; it scrolls on its own if it is wider than the page."""
    top = tag("tr", *(tag("th", name, scope="col") for name in head))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    made = tag("table", tag("caption", tag("span", caption)), tag("thead", top), tag("tbody", *body))
    return tag("div", made, class_="scroll", role="region", tabindex="0", aria_label=caption)


def picture(svg: Path, about: str) -> Html:
    """An embedded SVG file, with `about` as its alternative text."""
    data = base64.b64encode(svg.read_bytes()).decode("ascii")
    return Html(f'<img src="data:image/svg+xml;base64,{data}" alt="{put(about)}">')


def box(title: object, *children: object) -> Html:
    """A titled box in a grid."""
    return tag("div", tag("h4", title), *children, class_="box")


def model_text(text: str) -> Html:
    """Model output, verbatim."""
    return tag("div", text, class_="text") if text else tag("div", "(nothing)", class_="note")


def section(title: str, *children: object) -> Html:
    """A section of the page, with a heading that the navigation links to."""
    return tag("section", tag("h2", title, id=anchor(title)), *children)


def anchor(title: str) -> str:
    """The anchor id of a heading."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def page(title: str, about: object, sections: Sequence[tuple[str, Html]]) -> str:
    """The whole document from (heading, content) pairs; empty sections are left out."""
    kept = [(name, content) for name, content in sections if content]
    links = tag("nav", *(tag("a", name, href=f"#{anchor(name)}") for name, _ in kept), aria_label="Sections")
    body = tag("main", tag("h1", title), about, links, *(section(name, content) for name, content in kept))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{put(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
