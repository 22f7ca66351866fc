"""What a person sees: the learning curve in the terminal and as a picture, and tables of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

BLOCKS = " ▁▂▃▄▅▆▇█"


def terminal_curve(
    steps: Sequence[int], values: Sequence[float], title: str, width: int = 64, height: int = 8, top: float = 1.0
) -> str:
    """A filled curve of `values` in [0, top] drawn with block characters; NaN leaves a gap."""
    if not steps:
        return f"{title}: nothing measured yet"
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means: list[float] = []
    for a, b in zip(edges, edges[1:], strict=False):
        part = [v for v in values[a:b] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    lines = [title]
    for level in range(height - 1, -1, -1):
        cells = ""
        for mean in means:
            filled = 0.0 if math.isnan(mean) else min(1.0, max(0.0, mean / top)) * height - level
            cells += BLOCKS[round(8 * min(1.0, max(0.0, filled)))]
        label = f"{top * (level + 1) / height:5.0%}" if level % 2 else "     "
        lines.append(f"{label} │{cells}")
    lines.append("      └" + "─" * columns)
    lines.append(f"       step {steps[0]}" + f"{steps[-1]}".rjust(max(1, columns - len(f"step {steps[0]}"))))
    return "\n".join(lines)


def picture(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path, title: str) -> None:
    """Writes one small panel per curve to a PNG, readable without colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), squeeze=False)
    for axis, (name, (steps, values)) in zip(axes[0], curves.items(), strict=True):
        axis.plot(steps, values, color="#0072B2", linewidth=1.6, marker="o" if len(steps) < 4 else None)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0, top=1.02 if max(values, default=0) <= 1 else None)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def answers_table(rows: Sequence[tuple[str, str, bool, str, bool]], title: str) -> Table:
    """Before/after answers side by side: (question, before, right before, after, right after)."""
    table = Table(title=title, show_lines=True, title_justify="left")
    for name in ("question", "before", "after"):
        table.add_column(name, overflow="fold")
    for question, before, before_ok, after, after_ok in rows:
        table.add_row(Text(question), marked(before, before_ok), marked(after, after_ok))
    return table


def marked(answer: str, right: bool) -> Text:
    """An answer with a tick or a cross; model text is never read as markup, and control characters are shown."""
    mark = Text("✓ ", style="green") if right else Text("✗ ", style="red")
    return mark + Text(printable(answer))


def printable(text: str) -> str:
    """Model text made safe for a terminal: control characters become visible escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def console(json: bool = False) -> Console:
    """Where people read; with --json everything human goes to stderr."""
    return Console(stderr=json, highlight=False)


def duration(seconds: float) -> str:
    """`75` → `1m15s`."""
    whole = int(round(seconds))
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60:02d}s"
