"""Turns a recorded terminal session into the picture of the README: `python docs/picture.py SESSION.txt OUT.svg`.

Record with `COLUMNS=100 posttrain demo > SESSION.txt`; the text is shown as it was printed, ticks and crosses coloured.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def draw(session: Path, out: Path, width: int = 100) -> None:
    """Writes the session as an SVG of a terminal `width` columns wide."""
    screen = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    text = Text.from_ansi(session.read_text(encoding="utf-8"))
    text.highlight_regex("✓", "green")
    text.highlight_regex("✗", "red")
    screen.print(text)
    drawing = screen.export_svg(title="posttrain demo")
    out.write_text(re.sub(r"@font-face \{.*?\}", "", drawing, flags=re.DOTALL), encoding="utf-8")  # no fonts from afar


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
