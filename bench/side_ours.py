"""Our side of a comparison: the algorithms' own loops, one step a turn.

    python -m bench.side_ours JOB.json

runs `posttrain.algos.grpo.run` (or sft's or dpo's) as the command line does. Left out is what the peer does not do
either: examinations before and after, the store's commit after each step, and checkpoints.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bench.turns import Turns, reward
from posttrain import config
from posttrain.algos import dpo, grpo, sft
from posttrain.data.mixing import Mixture
from posttrain.models.load import Policy, load_policy
from posttrain.rollout.build import make_collector, speak
from posttrain.rollout.generator import Generator, OnDone, OnToken, Request
from posttrain.rollout.prefetch import Ahead
from posttrain.store.run import Run
from posttrain.train.interrupt import Interrupt
from posttrain.types import Completion, Message, Sample, SamplingParams, Task, Verdict

Job = dict[str, Any]
FOR_EVER = 1_000_000  # steps; the harness ends the process


class NoStore:
    """What a run writes its steps to, without writing: its folder is empty, so there is nothing to resume from."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def write(self, *_: Any) -> None:
        """Keeps nothing: the peer writes nothing either."""


@dataclass
class Forced:
    """A generator whose completions all have the lengths they are given, row after row, and stop nowhere else.

    The model is left without stop tokens, and each request carries its completions' limits.
    """

    generator: Any
    lengths: tuple[int, ...]
    written: int = 0  # tokens of the last call

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        left = iter(self.lengths)
        limited = [replace(r, limits=tuple(next(left) for _ in r.seeds)) for r in requests]
        groups = self.generator.generate(limited, params, on_token, on_done)
        got = [len(c.tokens) for group in groups for c in group]
        if got != [*self.lengths]:
            raise SystemExit(f"the generator wrote {got} tokens where {[*self.lengths]} were asked for.")
        self.written = sum(got)
        return groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)


def recipe_of(job: Job, algorithm: str, **more: Any) -> Any:
    """The recipe of a job: TRL's defaults where it has some, then the side's own settings."""
    common = {
        "model.path": job["folder"],
        "train.lr": job["lr"],
        "train.steps": FOR_EVER,
        "train.threads": job["threads"],
        "run.checkpoint_every": FOR_EVER,
    }
    return config.resolve(algorithm, {}, common | more | job["settings"])


def loaded(recipe: Any, turns: Turns) -> Policy:
    policy = load_policy(recipe.model)
    turns.loaded()
    return policy


def on_step(turns: Turns, facts: Callable[[Mapping[str, float]], Mapping[str, Any]]) -> Callable[..., None]:
    """What an algorithm calls after each step: ends the turn and waits for the next."""

    def call(step: int, values: Mapping[str, float]) -> None:
        if step:
            turns.done(**facts(values))
        turns.wait()

    return call


def forced(job: Job, recipe: Any, policy: Policy) -> tuple[Any, Forced, list[Task]]:
    """A collector of answers of given lengths to the job's prompts, and the prompts as tasks."""
    chat = speak(policy, "plain")
    policy.stop_ids = ()

    def verify(_: Task, text: str) -> Verdict:
        return Verdict(reward(text), False)

    collector = make_collector(policy, chat, verify, recipe)
    generator = Forced(collector.generator, tuple(job["lengths"]))
    tasks = [Task(str(i), "bench", (Message("user", text),), "") for i, text in enumerate(job["prompts"])]
    return replace(collector, generator=cast(Generator, generator)), generator, tasks


def grpo_recipe(job: Job) -> Any:
    return recipe_of(
        job,
        "grpo",
        **{
            "algo.preset": "grpo-trl",
            "algo.prompts": len(job["prompts"]),
            "algo.group_size": job["group"],
            "rollout.max_tokens": max(job["lengths"]),
            "data.format": "plain",
            "data.max_prompt_tokens": FOR_EVER,
        },
    )


def run_grpo(job: Job, turns: Turns, folder: str) -> None:
    recipe = grpo_recipe(job)
    policy = loaded(recipe, turns)
    collector, generator, tasks = forced(job, recipe, policy)
    tell = on_step(turns, lambda values: {"tokens": generator.written, "loss": values["loss"]})
    examine = cast(Any, lambda step: ({}, []))
    with Ahead[grpo.Sampled](recipe.algo.overlap) as ahead:
        grpo.run(recipe, policy, collector, tasks, examine, ahead, cast(Run, NoStore(folder)), tell, Interrupt())


def run_generate(job: Job, turns: Turns, folder: str) -> None:
    """Sampling alone, with the log-probabilities that training needs."""
    recipe = grpo_recipe(job)
    policy = loaded(recipe, turns)
    collector, generator, tasks = forced(job, recipe, policy)
    group = job["group"]
    prompts = [collector.encode(task) for task in tasks]
    step = 0
    while True:
        turns.wait()
        requests = [
            Request(prompt, tuple(range(step + i * group, step + (i + 1) * group))) for i, prompt in enumerate(prompts)
        ]
        generator.generate(requests, collector.params)
        step += len(prompts) * group
        turns.done(tokens=generator.written)


def sample(tokens: Sequence[int], trained: Sequence[bool]) -> Sample:
    blank = np.zeros(len(tokens), np.float32)
    return Sample(np.array(tokens, np.int32), np.array(trained, bool), blank, blank + 1)


def run_sft(job: Job, turns: Turns, folder: str) -> None:
    rows = [sample(row["ids"], row["trained"]) for row in job["rows"]]
    recipe = recipe_of(job, "sft", **{"algo.batch_rows": len(rows)})
    policy = loaded(recipe, turns)
    count = sum(len(row.tokens) for row in rows)
    tell = on_step(turns, lambda values: {"tokens": count, "loss": values["loss"]})
    mixture = Mixture([len(rows)], [1.0], 0)
    sft.run(recipe, policy, mixture, {"rows": rows}, {}, cast(Run, NoStore(folder)), tell, Interrupt())


def run_dpo(job: Job, turns: Turns, folder: str) -> None:
    rows: list[Sample] = []
    for pair in job["pairs"]:
        for side in ("chosen", "rejected"):
            start, ids = len(pair["prompt"]), pair["prompt"] + pair[side]
            rows.append(sample(ids, [t >= start for t in range(len(ids))]))
    recipe = recipe_of(job, "dpo", **{"algo.batch_pairs": len(job["pairs"])})
    policy = loaded(recipe, turns)
    train, test, _ = dpo.with_reference(dpo.Feedback(rows, 2), dpo.Feedback([], 2), recipe, policy)
    count = sum(len(row.tokens) for row in rows)
    tell = on_step(turns, lambda values: {"tokens": count, "loss": values["loss"]})
    dpo.run(recipe, policy, train, test, None, cast(Run, NoStore(folder)), tell, Interrupt())


KINDS = {"grpo": run_grpo, "generate": run_generate, "sft": run_sft, "dpo": run_dpo}


def main(path: Path) -> None:
    turns = Turns()
    job: Job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        KINDS[job["kind"]](job, turns, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
