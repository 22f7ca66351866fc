"""Compares predicted with measured memory and time, on real runs of random models in separate processes.

    python -m bench.memory [--only 'grpo;dpo'] [--threads 2] [--parts] [--time]

For each configuration, this writes a random Llama of the named shape and a data file of exact lengths, plans the run
from its recipe alone (as `posttrain plan` does), and then runs it: two steps, with loading and saving. The peak is the
kernel's VmHWM. `--parts` also prints the peak within each phase, measured by resetting the high-water mark at the start
of each phase, which helps to find an inaccurate formula.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.turns import MIB, memory
from posttrain.models import shapes
from posttrain.models.shapes import ModelShape

SHAPES = {
    "20M": ModelShape(layers=12, width=384, heads=6, kv_heads=2, head_dim=64, ffn=1024, vocab=512, tied=True),
    "20M-50k": ModelShape(layers=6, width=256, heads=4, kv_heads=4, head_dim=64, ffn=768, vocab=50257, tied=True),
    "45M-150k": ModelShape(layers=6, width=256, heads=4, kv_heads=4, head_dim=64, ffn=768, vocab=151936, tied=True),
    "60M": ModelShape(layers=16, width=512, heads=8, kv_heads=8, head_dim=64, ffn=1536, vocab=4096, tied=False),
    "smollm2-135m": shapes.SHAPES["smollm2-135m"],
}
"""Random Llamas by name."""

RL = {"prompts": 4, "group_size": 4, "rollout.slots": 32, "eval.problems": 2}
PPO = {**RL, "prompts": 16, "group_size": 1}
PAIRS = {"batch_pairs": 4, "train.micro_batch_tokens": 1024}
SFT = {"batch_rows": 4, "train.micro_batch_tokens": 1024}

CONFIGS: dict[str, tuple[str, str, int, int, dict[str, Any]]] = {
    "sft, 135M": ("sft", "smollm2-135m", 64, 192, SFT),
    "sft, rows of 1024": ("sft", "20M", 64, 960, {**SFT, "train.micro_batch_tokens": 4096}),
    "sft, 8192 per pass": ("sft", "20M", 32, 96, {**SFT, "batch_rows": 64, "train.micro_batch_tokens": 8192}),
    "sft, checkpointing": ("sft", "60M", 64, 192, {**SFT, "model.gradient_checkpointing": True}),
    "sft, bfloat16": ("sft", "60M", 64, 192, {**SFT, "model.dtype": "bfloat16"}),
    "sft, LoRA 16": ("sft", "smollm2-135m", 64, 192, {**SFT, "model.lora_rank": 16}),
    "sft, 150k vocabulary": ("sft", "45M-150k", 64, 192, SFT),
    "reward": ("reward", "60M", 64, 192, PAIRS),
    "dpo": ("dpo", "60M", 64, 192, PAIRS),
    "dpo, no reference": ("dpo", "60M", 64, 192, {**PAIRS, "loss": "simpo", "algo.beta": 2.0}),
    "grpo": ("grpo", "60M", 64, 64, RL),
    "grpo, KL": ("grpo", "60M", 64, 64, {**RL, "kl_coef": 0.01}),
    "grpo, max_lag 1": ("grpo", "60M", 64, 64, {**RL, "max_lag": 1}),
    "grpo, 50k vocabulary": ("grpo", "20M-50k", 32, 64, {**RL, "prompts": 8}),
    "grpo, 256 slots": ("grpo", "20M", 192, 64, {**RL, "rollout.slots": 256, "train.micro_batch_tokens": 1024}),
    "grpo, 64 evaluated": ("grpo", "20M", 192, 64, {**RL, "rollout.slots": 64, "eval.problems": 64, "data.holdout": 0.8,
                                                    "train.micro_batch_tokens": 1024}),
    "grpo, prompts of 640": ("grpo", "20M", 640, 64, {**RL, "prompts": 2, "train.micro_batch_tokens": 2816}),
    "grpo, 135M": ("grpo", "smollm2-135m", 64, 32, {**RL, "prompts": 2, "train.micro_batch_tokens": 1024}),
    "ppo": ("ppo", "60M", 64, 64, PPO),
    "ppo, shared critic": ("ppo", "60M", 64, 64, {**PPO, "critic": "shared"}),
    "tiny": ("sft", "20M", 32, 96, {**SFT, "train.steps": 1}),
}  # fmt: skip
"""Name → algorithm, shape, prompt tokens, completion tokens, settings."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FRAME = 1 + len("user: ") + 1 + len("assistant: ")  # tokens the template adds around a question


def make_model(folder: Path, shape: str) -> None:
    """Writes a random Llama with a byte-level tokenizer: a character is a token, and completions rarely stop early."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from posttrain.models.load import llama_config

    special = ["<pad>", "<bos>", "<eos>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*special, *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    names: Any = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names).save_pretrained(folder)
    torch.manual_seed(0)
    ids: Any = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(llama_config(SHAPES[shape], max_position_embeddings=2048, **ids)).save_pretrained(folder)


ROWS = 80  # more than any batch, so that no batch contains a row twice


def make_data(path: Path, algorithm: str, prompt: int, answer: int) -> None:
    """Writes ROWS rows with prompts of `prompt` tokens and completions of `answer` tokens, stop token included."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(ROWS):
            asked, said = (text.ljust(n, "x") for text, n in ((f"{i} ", prompt - FRAME), (f"{i} ", answer - 1)))
            row = {"prompt": asked}
            if algorithm == "sft":
                row["completion"] = said
            elif algorithm in ("dpo", "reward"):
                row |= {"chosen": said, "rejected": said[::-1]}
            else:
                row["answer"] = str(i)
            file.write(json.dumps(row) + "\n")


def settings(name: str, root: Path, threads: int) -> tuple[str, dict[str, Any]]:
    """Algorithm and setting overrides of a configuration whose files are in `root`."""
    algorithm, _, prompt, answer, more = CONFIGS[name]
    out: dict[str, Any] = {"model.path": str(root / "model"), "data.tasks": str(root / "data.jsonl")}
    out |= {"run.out": str(root / "run"), "train.steps": 2, "train.threads": threads, "data.max_prompt_tokens": prompt}
    if algorithm == "sft":
        out["algo.max_tokens"] = prompt + answer
    elif algorithm in ("dpo", "reward"):
        out["pairs.max_tokens"] = prompt + answer
    else:
        out["rollout.max_tokens"] = answer
    return algorithm, {**out, **more}


def spread(completion: str) -> float:
    """A reward that differs between completions of a random model."""
    return float(sum(map(ord, completion)) % 7)


class Phases:
    """Peak memory within each named phase, in bytes."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.stack = ["elsewhere"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attributes the block's peak memory to `name`, then returns to the enclosing phase."""
        self._book()
        self.stack.append(name)
        try:
            yield
        finally:
            self._book()
            self.stack.pop()

    def _book(self) -> None:
        name = self.stack[-1]
        self.peaks[name] = max(self.peaks.get(name, 0), memory("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current resident memory

    def within(self, owner: Any, function: str, name: str) -> None:
        """Attributes every call of `owner.function` to the phase `name`."""
        inner = getattr(owner, function)

        def outer(*args: Any, **more: Any) -> Any:
            with self.phase(name):
                return inner(*args, **more)

        setattr(owner, function, outer)


def worker(name: str, root: Path, threads: int) -> None:
    """Executes the run and prints its memory and timings as JSON on the last line."""
    from posttrain import api, config
    from posttrain.rollout.engines.embedded import EmbeddedGenerator
    from posttrain.store import checkpoint
    from posttrain.store.run import Run
    from posttrain.train import forward
    from posttrain.train.learners.local import LocalLearner

    baseline = memory("VmRSS")
    phases = Phases()
    phases.within(api, "load_policy", "loading")
    phases.within(EmbeddedGenerator, "generate", "sampling")
    phases.within(forward, "outputs", "scoring")
    phases.within(LocalLearner, "forward_backward", "training pass")
    phases.within(LocalLearner, "step", "update")
    phases.within(checkpoint, "save", "saving")
    phases.within(api, "export", "saving")
    algorithm, overrides = settings(name, root, threads)
    recipe = config.resolve(algorithm, {}, overrides)
    with phases.phase("elsewhere"):
        result = api.start(algorithm, recipe, reward=spread if hasattr(recipe, "reward") else None)
    with Run.read(result.folder) as run:
        times = {name: value for step, name, value in run.timings() if step == 2}  # the first is warm-up
    print(json.dumps({"baseline": baseline, "peaks": phases.peaks, "times": times}))


def child(*arguments: str) -> str:
    """Runs this module in a separate process and returns its output."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "POSTTRAIN_CACHE": tempfile.mkdtemp(prefix="posttrain-cache-")},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def compare(name: str, threads: int, probe: bool = False) -> dict[str, Any]:
    """Plans a configuration in this process and runs it in another. Returns bytes, and seconds of the second step."""
    from posttrain import config
    from posttrain.models.kernels.build import library
    from posttrain.planner import estimate, speed
    from posttrain.planner import memory as planner

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        algorithm, named, prompt, answer, _ = CONFIGS[name]
        make_model(root / "model", named)
        make_data(root / "data.jsonl", algorithm, prompt, answer)
        algorithm, overrides = settings(name, root, threads)
        recipe = config.resolve(algorithm, {}, overrides)
        shape, rows = shapes.shape_of(root / "model"), estimate.measured_rows(recipe)[0]
        found = json.loads(child("--worker", name, "--root", folder, "--threads", str(threads)).splitlines()[-1])
        where = planner.Where(fused=library() is not None, baseline=found["baseline"])
        plan = planner.plan_memory(recipe, shape, rows, where)
        seconds = sum(speed.step_seconds(recipe, shape, rows, "cpu").values()) if probe else None
    return {
        "name": name,
        "predicted": plan.peak,
        "measured": max(found["peaks"].values()),
        "baseline": found["baseline"],
        "parts": {**plan.held, **plan.phases[plan.peak_phase]},
        "phases": {
            phase: (plan.of(phase) if phase in plan.phases else 0, seen) for phase, seen in found["peaks"].items()
        },
        "seconds": (seconds, found["times"].get("seconds")),
    }


def line(row: dict[str, Any]) -> str:
    """A table row in MiB: totals, error, and the error of the part above the process itself."""
    predicted, measured, base = row["predicted"], row["measured"], row["baseline"]
    sizes = f"{predicted / MIB:,.0f} | {measured / MIB:,.0f} | {predicted / measured - 1:+.0%}"
    above = f"{(predicted - base) / (measured - base) - 1:+.0%}"
    expected, took = row["seconds"]
    time = f"{expected:.1f} | {took:.1f} | {expected / took - 1:+.0%}" if expected and took else " | | "
    return f"| {row['name']} | {sizes} | {above} | {time} |"


def main() -> None:
    """Prints one line per configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="names, separated by semicolons")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", action="store_true", help="also print every phase and part, predicted and measured")
    parser.add_argument("--time", action="store_true", help="also predict and measure the seconds of a step")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=Path(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.root, args.threads)
        return
    wanted = args.only.split(";") if args.only else [name for name in CONFIGS if name != "tiny"]
    if odd := [name for name in wanted if name not in CONFIGS]:
        raise SystemExit(f"unknown configuration {odd[0]!r}; known: {'; '.join(CONFIGS)}")
    print("| run | predicted MiB | measured | error | above the process | predicted s | measured | error |")
    print("|---|---|---|---|---|---|---|---|")
    for name in wanted:
        row = compare(name, args.threads, args.time)
        print(line(row), flush=True)
        if args.parts:
            for phase, (expected, seen) in row["phases"].items():
                print(f"  {phase}: {expected / MIB:,.0f} predicted, {seen / MIB:,.0f} measured")
            print("  " + ", ".join(f"{part} {size / MIB:,.0f}" for part, size in row["parts"].items() if size))


if __name__ == "__main__":
    main()
