"""Time saved by overlap: rewards computed during sampling, and sampling one step ahead of the learner.

    python -m bench.overlap [--part rewards|ahead] [--steps 5] [--rounds 1] [--only "wait 5 ms,cheap"]

Every row is a GRPO run on abacus with 8 tasks × 8 completions per step. Variants alternate (A B A B) in one process.
The time of a step is the median over all steps except the first and the last, which has no next step to overlap with.
The reward `wait` sleeps, like a network call or a subprocess; `work` computes in Python for the same time and competes
with the sampler for the CPU. `weights` is the start of a digest of the trained weights: rows with the same reward and
the same lag must have the same digest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain import api, config
from posttrain.store.run import Run

Reward = Callable[..., float]


def waiting(milliseconds: float) -> Reward:
    """A reward that sleeps."""

    def reward(completion: str, answer: str) -> float:
        time.sleep(milliseconds / 1e3)
        return float(completion.strip().endswith(answer))

    return reward


def working(milliseconds: float) -> Reward:
    """A reward that computes in Python for this long, holding the GIL."""

    def reward(completion: str, answer: str) -> float:
        end = time.thread_time() + milliseconds / 1e3
        while time.thread_time() < end:
            sum(range(200))
        return float(completion.strip().endswith(answer))

    return reward


def measure(reward: Reward, steps: int, **settings: Any) -> tuple[list[float], str, float]:
    """Seconds of each step except the first and last, a digest of the final weights, and the mean seconds hidden."""
    with tempfile.TemporaryDirectory() as folder:
        small = {
            "data.tasks": "arithmetic",
            "data.count": 256,
            "algo.prompts": 8,
            "algo.group_size": 8,
            "rollout.slots": 64,
            "rollout.max_tokens": 64,
            "eval.problems": 1,
            "train.steps": steps,
            "run.checkpoint_every": steps,
            "run.out": str(Path(folder) / "run"),
        }
        result = api.start("grpo", config.resolve("grpo", {}, {**small, **settings}), reward=reward)
        assert result.summary
        with Run.read(result.folder) as run:
            found = {name: [v for _, n, v in sorted(run.timings()) if n == name][1:-1] for _, name, _ in run.timings()}
        return found["seconds"], result.summary["weights"], statistics.mean(found["seconds_hidden"])


def row(name: str, reward: Reward, variants: Sequence[tuple[str, dict[str, Any]]], steps: int, rounds: int) -> None:
    """Prints the median step time of each variant and its ratio to the first variant's."""
    seconds: dict[str, list[float]] = {label: [] for label, _ in variants}
    weights: dict[str, set[str]] = {label: set() for label, _ in variants}
    hidden: dict[str, list[float]] = {label: [] for label, _ in variants}
    for _ in range(rounds):
        for label, settings in variants:
            times, digest, saved = measure(reward, steps, **settings)
            seconds[label] += times
            weights[label].add(digest)
            hidden[label].append(saved)
    first = statistics.median(seconds[variants[0][0]])
    for label, _ in variants:
        middle = statistics.median(seconds[label])
        repeats = "yes" if len(weights[label]) == 1 else "NO"
        print(
            f"| {name} | {label} | {middle:.2f} | {middle / first:.2f} | {statistics.mean(hidden[label]):.2f} | "
            f"{next(iter(weights[label]))[:8]} | {repeats} |",
            flush=True,
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=["rewards", "ahead", "both"], default="both")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="rewards to measure, separated by commas (default: all)")
    args = parser.parse_args()
    print(f"{os.cpu_count()} processors, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| reward | variant | seconds per step | ratio | hidden | weights | reproducible |")
    print("|---|---|--:|--:|--:|---|---|")
    rewards: dict[str, Reward] = {"cheap": cheap}
    rewards |= {f"wait {ms} ms": waiting(ms) for ms in (5, 20, 50)} | {f"work {ms} ms": working(ms) for ms in (5, 20)}
    measure(cheap, 3)  # one-time work of the process, before anything is timed
    for name, reward in rewards.items():
        if args.only and name not in args.only.split(","):
            continue
        if args.part != "ahead":
            variants = [("after sampling", {"rollout.reward_workers": 0})]
            variants += [(f"{n} workers" if n > 1 else "1 worker", {"rollout.reward_workers": n}) for n in (1, 8)]
            row(name, reward, variants, args.steps, args.rounds)
        if args.part != "rewards":
            variants = [("sequential", {}), ("one step ahead", {"algo.ahead": 1})]
            row(name, reward, variants, args.steps, args.rounds)


def cheap(completion: str, answer: str) -> float:
    """A reward that compares two strings."""
    return float(completion.strip().endswith(answer))


if __name__ == "__main__":
    main()
