"""What it costs to continue completions whose keys and values are kept, against sampling in one go and against prefill.

    python -m bench.prefixes [--only abacus|SmolLM2-135M] [--rounds 5] [--threads 1]

`steps`: 16 sequences of 16 pieces of 16 tokens, each piece continuing the last, against 16 sequences of 256 tokens in one
go; the target is a ratio of at most 1.25. `prefixes`: 16 different prefixes of 256 tokens continued by 16 tokens, with
kept keys and values against prefilling prompt and prefix, as a request without pieces does; the target is at least 3
times the speed. Variants alternate, and figures are medians. SmolLM2-135M is its shape with random weights. It exits
with code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from bench.environment import ROOT
from bench.models import SHAPES, model_folder
from posttrain.config import ModelConfig
from posttrain.models.load import Policy, load_policy
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.generator import Request
from posttrain.types import SamplingParams

WIDTH, PIECES, PIECE, PROMPT = 16, 16, 16, 32
MODELS = ("abacus", "SmolLM2-135M")
SLOWER, FASTER = 1.25, 3.0  # the targets


def policy_of(name: str) -> Policy:
    """A model without stop tokens, so that all completions have the same length."""
    path = name if name == "abacus" else str(model_folder(SHAPES[name], ROOT / "build" / "bench" / "models"))
    return replace(load_policy(ModelConfig(path=path)), stop_ids=())


def start(policy: Policy, keep: bool) -> list[Request]:
    """16 completions of one prompt, a request each."""
    prompt = np.random.default_rng(0).integers(3, policy.vocab, PROMPT)
    return [Request(prompt, (seed,), keep=keep) for seed in range(WIDTH)]


def continued(generator: EmbeddedGenerator, requests: list[Request]) -> list[Request]:
    """Samples a piece of each request and returns the requests that continue them."""
    groups = generator.generate(requests, SamplingParams(max_tokens=PIECE))
    out: list[Request] = []
    for request, (completion,) in zip(requests, groups, strict=True):
        prefix = np.concatenate([request.prefix, completion.tokens])
        out.append(replace(request, prefix=prefix, pieces=(*request.pieces, len(completion.tokens))))
    return out


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def compare(policy: Policy, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of both parts' variants."""
    generator = EmbeddedGenerator(policy)
    whole = SamplingParams(max_tokens=PIECES * PIECE)
    times: dict[str, list[float]] = {name: [] for name in ("one go", "steps", "prefill", "kept")}

    def steps() -> list[Request]:
        generator.prefixes.clear()
        requests = start(policy, keep=True)
        for _ in range(PIECES):
            requests = continued(generator, requests)
        return requests

    ends = steps()
    bare = [replace(request, pieces=(), keep=False) for request in ends]
    piece = SamplingParams(max_tokens=PIECE)
    for turn in range(rounds + 1):  # the first warms up
        found = {
            "one go": seconds(lambda: generator.generate(start(policy, keep=False), whole)),
            "steps": seconds(steps),
            "prefill": seconds(lambda: generator.generate(bare, piece)),
            "kept": seconds(lambda: generator.generate([replace(r, seeds=(r.seeds[0] + 1000,)) for r in ends], piece)),
        }
        for name, took in found.items() if turn else ():
            times[name].append(took)
    medians = {name: statistics.median(took) for name, took in times.items()}
    return {n: medians[n] for n in ("one go", "steps")}, {n: medians[n] for n in ("prefill", "kept")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    met = True
    for name in [given.only] if given.only else MODELS:
        stepwise, prefixes = compare(policy_of(name), given.rounds)
        slower = stepwise["steps"] / stepwise["one go"]
        faster = prefixes["prefill"] / prefixes["kept"]
        met &= slower <= SLOWER and faster >= FASTER
        for part, figures in (("steps", stepwise), ("prefixes", prefixes)):
            print(f"{name}, {part}: " + ", ".join(f"{n} {s:.3f} s" for n, s in figures.items()))
        print(f"{name}: {slower:.2f} times one go (target ≤ {SLOWER:g}), {faster:.1f} times as fast as prefill "
              f"(target ≥ {FASTER:g})")  # fmt: skip
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
