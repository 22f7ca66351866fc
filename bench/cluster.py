"""What a cluster costs and gains on this machine: a sampler of its own, a second sampler, the time to start.

    python -m bench.cluster [--part start,step,samplers] [--steps 6] [--rounds 3]

`step` runs the demo's recipe with one thread, sampled in the run's own process and by one sampler, alternately (A B A
B); the time of a step is the median over all but each run's first. `samplers` samples a step of it with one sampler and
with two, one thread each, alternately. `start` is the time from opening a cluster of 2 learners and 2 samplers until
all have loaded the model and found each other. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain import api, config
from posttrain.cluster.launch import Cluster
from posttrain.config.files import SHIPPED_RECIPES
from posttrain.models.load import load_policy
from posttrain.rollout.generator import Request
from posttrain.store.run import Run
from posttrain.train.forward import token_stats
from posttrain.types import SamplingParams


def recipe_of(**more: Any) -> Any:
    """The demo's recipe with one thread; `cluster__samplers=1` sets `cluster.samplers`."""
    algorithm, sections, _ = config.read_toml(SHIPPED_RECIPES / "demo.toml")
    settings = {"train.threads": 1} | {name.replace("__", "."): value for name, value in more.items()}
    return config.resolve(algorithm, sections, settings)


def steps_of(count: int, **more: Any) -> list[float]:
    """Seconds of each step of a run, except the first."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "run__out": f"{folder}/run",
            "run__checkpoint_every": count,
            "eval__problems": 1,
            "train__steps": count,
        }
        result = api.start("grpo", recipe_of(**fixed, **more))
        assert result.summary
        with Run.read(Path(result.folder)) as run:
            return [value for _, name, value in sorted(run.timings()) if name == "seconds"][1:]


def row(what: str, value: str, target: str, met: bool) -> bool:
    print(f"| {what} | {value} | {target} | {'yes' if met else 'NO'} | {os.getloadavg()[0]:.1f} |", flush=True)
    return met


def step(steps: int, rounds: int) -> bool:
    variants = {"in process": {}, "1 sampler": {"cluster__samplers": 1}}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, settings in variants.items():
            seconds[name] += steps_of(steps + 1, **settings)
    alone, apart = (statistics.median(seconds[name]) for name in variants)
    value = f"{apart:.2f} s against {alone:.2f} s: {apart / alone:.2f}×"
    return row("a step with 1 sampler against in process", value, "≤ 1.10×", apart <= 1.1 * alone)


def samplers(rounds: int) -> bool:
    recipe, draw = recipe_of(), np.random.default_rng(0)
    policy = load_policy(recipe.model)
    prompts = [draw.integers(3, policy.vocab, 12).astype(np.int32) for _ in range(recipe.algo.prompts)]
    requests = [Request(prompt, tuple(range(8 * i, 8 * i + 8))) for i, prompt in enumerate(prompts)]
    rates: dict[int, list[float]] = {1: [], 2: []}
    clusters = [Cluster(recipe_of(cluster__samplers=count)).__enter__() for count in rates]
    pools = [cluster.generator(policy, recipe.rollout) for cluster in clusters]
    for number in range(rounds + 1):  # the first is not timed: they start
        for pool, found in zip(pools, rates.values(), strict=True):
            began = time.monotonic()
            done = pool.generate(requests, SamplingParams(max_tokens=recipe.rollout.max_tokens))
            tokens = sum(len(completion.tokens) for answers in done for completion in answers)
            if number:
                found.append(tokens / (time.monotonic() - began))
    for cluster in clusters:
        cluster.close()
    one, two = (statistics.median(rates[count]) for count in rates)
    value = f"{two:.0f} against {one:.0f} tokens/s: {two / one:.2f}×"
    return row("2 samplers against 1, one thread each", value, "≥ 1.70×", two >= 1.7 * one)


def start() -> bool:
    recipe = recipe_of(cluster__learners=2, cluster__samplers=2, train__lanes=8)
    policy = load_policy(recipe.model)
    began = time.monotonic()
    with Cluster(recipe) as cluster:
        cluster.generator(policy, recipe.rollout)
        cluster.learner(policy, recipe.train, 1, 1.0, token_stats)
        assert cluster.crew is not None
        for actor in (*cluster.ranks, *(member.actor for member in cluster.crew.members)):
            actor.made.result()
        seconds = time.monotonic() - began
    return row("start of 2 learners and 2 samplers", f"{seconds:.1f} s", "≤ 40 s", seconds <= 40)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", default="start,step,samplers", help="parts, separated by commas")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} processors, torch {torch.__version__}")
    print("| what | measured | target | met | load average |")
    print("|---|---|---|---|--:|")
    parts: dict[str, Callable[[], bool]] = {
        "start": start,
        "step": lambda: step(args.steps, args.rounds),
        "samplers": lambda: samplers(args.rounds),
    }
    met = [parts[name]() for name in args.part.split(",")]
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
