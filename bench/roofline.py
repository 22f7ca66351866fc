"""Utilisation of the training pass: its FLOP/s against the fastest matrix product measured on this machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.duel import Sides
from bench.rows import LR
from posttrain.models.shapes import ModelShape

PRODUCTS = ((2048, 2048, 2048), (2048, 576, 1536), (2048, 1536, 576), (4096, 1024, 4096), (1024, 576, 49_152))
BAR = 0.5


@dataclass(frozen=True)
class Machine:
    """Measured limits: matrix products in FLOP/s by dtype, the best of several shapes, and memory copy in bytes/s."""

    products: dict[str, float]
    shapes: dict[str, tuple[int, int, int]]
    copy: float

    @property
    def peak(self) -> float:
        return max(self.products.values())


@dataclass(frozen=True)
class Pass:
    """One training step: its FLOP, the minimum bytes its matrix products move, and its seconds."""

    tokens: int
    flops: float
    moved: float
    seconds: float
    machine: Machine

    @property
    def rate(self) -> float:
        return self.flops / self.seconds

    @property
    def share(self) -> float:
        """Fraction of the fastest matrix product, of either dtype."""
        return self.rate / self.machine.peak

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP per byte."""
        return self.flops / self.moved

    @property
    def roof(self) -> float:
        """Roofline limit in FLOP/s: peak compute or memory-bound, whichever is lower."""
        return min(self.machine.peak, self.intensity * self.machine.copy)

    @property
    def met(self) -> bool:
        return self.share >= BAR

    def lines(self) -> str:
        """The measurement as a Markdown table."""
        rows = [
            f"fastest {dtype} product, {' × '.join(map(str, self.machine.shapes[dtype]))} | {rate / 1e9:,.0f} GFLOP/s"
            for dtype, rate in self.machine.products.items()
        ]
        rows += [
            f"memory copy, read and write | {self.machine.copy / 1e9:.1f} GB/s",
            f"a step of {self.tokens:,} tokens | {self.seconds:.2f} s, {self.tokens / self.seconds:,.0f} tokens/s",
            f"arithmetic of the step | {self.flops / 1e12:.2f} TFLOP, {self.rate / 1e9:,.0f} GFLOP/s",
            f"arithmetic intensity | {self.intensity:,.0f} FLOP/B",
            f"roofline limit | {self.roof / 1e9:,.0f} GFLOP/s",
            f"share of fastest product (target ≥ {BAR:.0%}) | {self.share:.0%}, {'met' if self.met else '**missed**'}",
        ]
        return "\n".join(["| training pass at 135M | |", "|---|--:|", *(f"| {row} |" for row in rows)])

    def record(self) -> dict[str, Any]:
        """Everything that was measured, as JSON-compatible data."""
        return asdict(self) | {"share": self.share, "intensity": self.intensity, "roof": self.roof, "met": self.met}


def best_of(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """The shortest time of a call that is repeated for about this many seconds."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_machine(threads: int) -> Machine:
    """Measures matrix products of a few large shapes in fp32 and bf16, and a copy of 256 MiB."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    products: dict[str, float] = {}
    shapes: dict[str, tuple[int, int, int]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for m, k, n in PRODUCTS:
            a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            rate = 2 * m * k * n / best_of(lambda a=a, b=b: torch.nn.functional.linear(a, b))
            if rate > products.get(name, 0):
                products[name], shapes[name] = rate, (m, k, n)
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best_of(lambda: target.copy_(source))
    torch.set_num_threads(before)
    return Machine(products, shapes, copy)


def products(shape: ModelShape, tokens: int, trained: int) -> list[tuple[int, int, int, int]]:
    """(count, rows, in, out) of a forward pass's products with weights; the head runs on trained tokens only."""
    attention, keys = shape.attention, shape.kv_heads * shape.head_dim
    layer = [(1, shape.width, attention), (1, attention, shape.width), (2, shape.width, keys)]
    layer += [(2, shape.width, shape.ffn), (1, shape.ffn, shape.width)]
    body = [(count * shape.layers, tokens, inner, out) for count, inner, out in layer]
    return [*body, (1, trained, shape.width, shape.vocab)]


def arithmetic(shape: ModelShape, rows: int, length: int) -> tuple[float, float]:
    """(FLOP, bytes) of forward and backward over `rows` rows in which every token but the first is trained.

    Each product with weights counts three times: forward, gradient of its input, gradient of its weights. So does
    causal attention, whose scores and averages cost half of length² each. Recomputation is not counted. Bytes are those
    of fp32 operands and results, each moved once.
    """
    tokens, trained = rows * length, rows * (length - 1)
    weights = products(shape, tokens, trained)
    flops = sum(3 * count * 2 * m * k * n for count, m, k, n in weights)
    flops += 3 * shape.layers * rows * 2 * length**2 * shape.attention
    moved = sum(3 * count * 4 * (m * k + k * n + m * n) for count, m, k, n in weights)
    return float(flops), float(moved)


def measure(sides: Sides, shape: ModelShape, folder: str, rows: int = 8, length: int = 256, steps: int = 2) -> Pass:
    """A supervised fine-tuning step in fp32: the fastest of `steps` after one warm-up step."""
    draw = random.Random(0)
    made = [
        {"ids": [draw.randrange(3, shape.vocab) for _ in range(length)], "trained": [t > 0 for t in range(length)]}
        for _ in range(rows)
    ]
    flops, moved = arithmetic(shape, rows, length)
    machine = measure_machine(sides.threads)
    with sides.start("ours", {"kind": "sft", "folder": folder, "lr": LR, "rows": made}, {}) as side:
        side.step(keep=False)
        seconds = min(side.step() for _ in range(steps))
    return Pass(rows * length, flops, moved, seconds, machine)
