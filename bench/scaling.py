"""Cost of a GRPO step as a function of group size, completion length and model size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.duel import Sides
from bench.models import SHAPES, model_folder, texts
from bench.rows import LR
from posttrain.models.shapes import ModelShape

BAR = 1.05  # for the slope: 1 is linear, the rest allows for noise
GROUPS = (4, 8, 16, 32, 64)
LENGTHS = (32, 64, 128, 256, 512)
WIDTHS = ((2, 128), (4, 256), (6, 384), (8, 640), (12, 768))  # layers, width
PROMPT = 16


@dataclass(frozen=True)
class Curve:
    """Seconds per step (y) at several sizes (x)."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    @property
    def slope(self) -> float:
        """Slope of a least-squares line through the logarithms: 1 is linear, lower is better."""
        return fit(self.x, self.y)[0]

    @property
    def met(self) -> bool:
        return self.slope <= BAR

    def line(self) -> str:
        points = ", ".join(f"{x:,.0f}: {y:.2f} s" for x, y in zip(self.x, self.y, strict=True))
        return f"| {self.name} | {points} | {self.slope:.2f} | {'met' if self.met else '**missed**'} |"

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"slope": self.slope, "met": self.met}


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(slope, intercept) of log y over log x, by least squares. Raises ValueError with fewer than two sizes."""
    if len(set(x)) < 2:
        raise ValueError(f"a slope needs two sizes or more, got {sorted(set(x))}.")
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    above = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    slope = above / sum((p - mean_a) ** 2 for p in a)
    return slope, mean_b - slope * mean_a


def seconds(sides: Sides, folder: Path, prompts: int, group: int, length: int, steps: int) -> float:
    """Seconds of a GRPO step: the shortest of `steps` after one warm-up step."""
    job = {
        "kind": "grpo",
        "folder": str(folder),
        "lr": LR,
        "prompts": texts(folder, [PROMPT] * prompts),
        "group": group,
        "lengths": [length] * (prompts * group),
    }
    with sides.start("ours", job, {}) as side:
        side.step(keep=False)
        return min(side.step() for _ in range(steps))


def measure(sides: Sides, root: Path, steps: int = 3) -> list[Curve]:
    """Three curves that each vary one size: completions of one prompt, tokens of 16 completions, parameters."""
    small = model_folder(SHAPES["5M"], root)
    groups = [seconds(sides, small, 1, group, 64, steps) for group in GROUPS]
    lengths = [seconds(sides, small, 4, 4, length, steps) for length in LENGTHS]
    shapes = [
        ModelShape(layers, width, width // 64, width // 64, 64, 8 * width // 3, 2048, tied=True)
        for layers, width in WIDTHS
    ]
    sizes = [seconds(sides, model_folder(shape, root), 4, 4, 64, steps) for shape in shapes]
    return [
        Curve("answers to one prompt", tuple(map(float, GROUPS)), tuple(groups)),
        Curve("tokens of an answer", tuple(map(float, LENGTHS)), tuple(lengths)),
        Curve("parameters", tuple(float(shape.parameters) for shape in shapes), tuple(sizes)),
    ]


def markdown(curves: Sequence[Curve]) -> str:
    head = f"| seconds per step by | measured | slope (target ≤ {BAR:g}) | |\n|---|---|--:|---|"
    return "\n".join([head, *(curve.line() for curve in curves)])


def _short(x: float) -> str:
    """A number formatted for an axis label."""
    return f"{x / 1e6:.2g}M" if x >= 1e5 else f"{x:.0f}"


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Plots the curves with their fitted lines on logarithmic axes, with a marker for each, and saves the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.2), squeeze=False)
    for axis, curve, mark in zip(axes[0], curves, "os^Dv", strict=False):
        slope, intercept = fit(curve.x, curve.y)
        axis.loglog(curve.x, curve.y, mark, color="black", label="measured")
        line = [math.exp(intercept) * x**slope for x in curve.x]
        axis.loglog(curve.x, line, "--", color="0.4", label=f"slope {slope:.2f}")
        linear = [curve.y[0] * x / curve.x[0] for x in curve.x]
        axis.loglog(curve.x, linear, ":", color="0.4", label="linear")
        axis.set_xlabel(curve.name)
        axis.set_xticks(curve.x, [_short(x) for x in curve.x])
        axis.set_yticks(curve.y, [f"{y:.2g}" for y in curve.y])
        axis.minorticks_off()
        axis.grid(True, which="major", color="0.9")
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("seconds of a GRPO step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
