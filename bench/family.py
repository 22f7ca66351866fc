"""Compares every preset of the GRPO family on one task with the same number of sampled completions.

    python -m bench.family [--steps 20] [--lr 1e-4] [--presets rloo,dapo]

Each run samples 256 completions per step from abacus on `arithmetic` (32 tasks × 8, or 256 × 1 for presets without
groups) and is evaluated on the same 512 held-out problems at temperature 1. The sizes are the same for all presets;
everything else is the preset's. Accuracy has a 95 % interval over problems, for one seed: differences between presets
at one learning rate show how they behave here, not which is best.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain import api, config
from posttrain.store.run import Run

ANSWERS = 256


def settings(preset: str, steps: int, lr: float, out: Path) -> dict[str, Any]:
    """Setting overrides for one run: the preset's choices at the common size."""
    group = 1 if config.resolve("grpo", {"algo": {"preset": preset}}).algo.group_size == 1 else 8
    return {
        "algo.preset": preset,
        "algo.prompts": ANSWERS // group,
        "algo.group_size": group,
        "algo.minibatches": min(4, config.resolve("grpo", {"algo": {"preset": preset}}).algo.minibatches),
        "algo.max_resamples": 2 if preset == "dapo" else 0,
        "data.tasks": "arithmetic",
        "rollout.slots": ANSWERS,
        "rollout.max_tokens": 96,
        "eval.problems": 512,
        "train.steps": steps,
        "train.lr": lr,
        "run.out": str(out),
    }


def main() -> None:
    """Runs the presets one after another and prints one row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--presets", default=",".join(config.PRESETS["grpo"]))
    args = parser.parse_args()
    print("| preset | accuracy before | after | 95 % | thinks | length | clipped | completions | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for preset in args.presets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            result = api.start(
                "grpo", config.resolve("grpo", {}, settings(preset, args.steps, args.lr, Path(folder) / "run"))
            )
            seconds = time.monotonic() - start
            with Run.read(result.folder) as run:
                clipped = run.curve("clipped")[1]
                groups = sum(run.curve("groups")[1])
                group_size = run.header["recipe"]["algo"]["group_size"]
        assert result.summary
        before, after = result.summary["before"], result.summary["after"]
        cells = (
            f"`{preset}`",
            f"{before['eval/accuracy']:.1%}",
            f"{after['eval/accuracy']:.1%}",
            f"{after['eval/accuracy_low']:.1%} – {after['eval/accuracy_high']:.1%}",
            f"{after['eval/think_share']:.0%}",
            f"{after['eval/length']:.1f}",
            f"{sum(clipped) / max(1, len(clipped)):.1%}",
            f"{groups * group_size:.0f}",
            f"{seconds:.0f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
