"""Particle filtering: completions advance step by step and are resampled by their scores (arXiv 2502.01618).

The target is the policy's distribution times the score, so the score of an unfinished completion is its potential: a
particle's weight grows by the ratio of its new score to the one before. Particles are resampled only when the effective
sample size is low; with a constant score they never are, and remain independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

from posttrain import rng
from posttrain.config.search import SearchConfig, rounds
from posttrain.search.tree import Asks, Node, Tree

LEAST = 1e-6  # a score that counts as impossible


def run(tree: Tree, cfg: SearchConfig) -> Asks[None]:
    """Rounds of `width` particles."""
    for number, width in enumerate(rounds(cfg)):
        yield from particles(tree, width, cfg.resample_below, cfg.share_temperature, number)


def particles(tree: Tree, width: int, resample_below: float, temperature: float, number: int) -> Asks[None]:
    """Advances all particles by one step, weights and resamples them, until all have ended."""
    nodes = yield from tree.grow([tree.root] * width)
    logs, before = [0.0] * width, [0.0] * width
    for step in count():
        yield from tree.score(nodes)
        potentials = [potential(node, temperature) for node in nodes]
        logs = [log + new - old for log, new, old in zip(logs, potentials, before, strict=True)]
        before = potentials
        if all(node.ended for node in nodes):
            return
        weights = normalised(logs)
        if ess(weights) < resample_below * width:
            place = float(rng.uniforms(rng.key("particles", tree.seed, tree.task.id, number, step), 1)[0])
            kept = systematic(weights, place)
            nodes, before, logs = [nodes[i] for i in kept], [before[i] for i in kept], [0.0] * width
        live = [i for i, node in enumerate(nodes) if not node.ended]
        grown = yield from tree.grow([nodes[i] for i in live])
        for i, node in zip(live, grown, strict=True):
            nodes[i] = node


def potential(node: Node, temperature: float) -> float:
    """log score / T, the log of an unnormalised target; a score at or below 0 counts as LEAST."""
    score = LEAST if node.score is None else max(node.score, LEAST)
    return 0.0 if math.isinf(temperature) else math.log(score) / temperature


def normalised(logs: Sequence[float]) -> list[float]:
    """Weights that sum to 1 from their logarithms."""
    top = max(logs)
    weights = [math.exp(log - top) for log in logs]
    return [weight / sum(weights) for weight in weights]


def ess(weights: Sequence[float]) -> float:
    """Effective sample size 1 / Σ w² of weights that sum to 1."""
    return 1 / sum(weight * weight for weight in weights)


def systematic(weights: Sequence[float], place: float) -> list[int]:
    """Systematic resampling: index i occurs ⌊N·wᵢ⌋ or ⌈N·wᵢ⌉ times. `place` in [0, 1) is the only random number."""
    number, total = len(weights), 0.0
    out: list[int] = []
    for i, weight in enumerate(weights):
        total += weight * number
        while len(out) < number and len(out) + place < total:
            out.append(i)
    return out + [number - 1] * (number - len(out))  # rounding at the end of the sum
