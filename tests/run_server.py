"""Whole training runs, started in a forked process so that they can be killed and resumed by the dozen.

The server imports torch once and forks a fresh process for each life of a run. It reads one JSON request per line,
`{"folder", "model", "data", "algorithm", "failpoint", "kill_after", "signal"}`, and answers with how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch

from posttrain import algos, api, config
from posttrain.config import DataConfig, ModelConfig, RolloutConfig
from posttrain.data.tasks.load import load_tasks
from posttrain.models.kernels.build import library
from posttrain.models.load import load_policy
from posttrain.rollout.build import make_generator
from posttrain.rollout.generator import Request
from posttrain.store import failpoints
from posttrain.store.run import Run
from posttrain.types import ResumeError, SamplingParams, Task

STEPS = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "algo.prompts": 3,
        "algo.group_size": 4,
        "algo.minibatches": 2,
        "algo.kl_coef": 0.01,
        "eval.problems": 4,
        "eval.every": 3,
        "train.lr": 1e-2,
    },
    "grpo+lag": {  # a sampler with older weights, refilled groups, a running baseline, everything that is state
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "algo.prompts": 3,
        "algo.group_size": 2,
        "algo.epochs": 2,
        "algo.baseline": "ema",
        "algo.max_lag": 2,
        "algo.is_cap": 2.0,
        "algo.max_resamples": 2,
        "algo.entropy_coef": 0.01,
        "eval.problems": 4,
        "train.lr": 1e-2,
    },
    "grpo+world": {  # several turns, an edited history, credit by turn, a curriculum
        "data.count": 40,
        "env.name": str(Path(__file__).parent / "echo.py") + ":Echo",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "algo.prompts": 3,
        "algo.group_size": 3,
        "algo.credit": "turn",
        "algo.curriculum": "pass-rate",
        "eval.problems": 4,
        "train.lr": 1e-2,
    },
    "grpo+ahead": {  # answers written two steps ahead, greedy ones beside them, of tasks chosen by what was known then
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "rollout.reward_workers": 2,
        "algo.prompts": 6,  # a random model seldom writes a vowel: with 3, neither of two steps may have an update
        "algo.group_size": 2,
        "algo.baseline": "greedy",
        "algo.ahead": 2,
        "algo.curriculum": "pass-rate",
        "algo.max_resamples": 1,
        "eval.problems": 4,
        "eval.every": 3,
        "train.lr": 1e-2,
    },
    "ppo": {  # a separate critic, an adaptive KL coefficient, demonstrations: each with a state of its own
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "algo.prompts": 8,
        "algo.epochs": 2,
        "algo.minibatches": 2,
        "algo.kl_controller": "adaptive",
        "algo.kl_horizon": 50.0,
        "algo.critic_warmup": 1,
        "algo.whiten_returns": True,
        "algo.ptx_coef": 0.1,
        "algo.ptx_data": "sums",
        "algo.ptx_rows": 3,
        "eval.problems": 4,
        "train.lr": 1e-2,
    },
    "ppo+shared": {
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "algo.prompts": 8,
        "algo.epochs": 3,
        "algo.target_kl": 0.01,
        "algo.critic": "shared",
        "algo.critic_warmup": 1,
        "algo.whiten_returns": True,
        "algo.entropy_coef": 0.01,
        "eval.problems": 4,
        "train.lr": 1e-2,
    },
    "sft": {"algo.batch_rows": 4, "train.lr": 1e-2, "train.schedule": "cosine", "train.warmup_steps": 2},
    "sft+mixture": {"algo.batch_rows": 5, "algo.neftune_alpha": 5.0, "data.count": 24, "train.lr": 1e-2},
    "reward": {"algo.heads": 2, "algo.batch_pairs": 4, "data.holdout": 0.4, "train.lr": 1e-2},
    "prm": {"algo.batch_rows": 4, "data.holdout": 0.4, "train.lr": 1e-2},
    "dpo": {
        "algo.batch_pairs": 4,
        "algo.beta_schedule": "cosine",
        "algo.beta_end": 0.5,
        "data.holdout": 0.4,
        "eval.every": 3,
        "train.lr": 1e-2,
    },
    "dpo+kto": {"algo.loss": "kto", "algo.batch_pairs": 6, "data.holdout": 0.4, "train.lr": 1e-2},
    "online-dpo": {
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "algo.prompts": 3,
        "algo.group_size": 4,
        "eval.problems": 4,
        "eval.every": 3,
        "train.lr": 1e-2,
    },
    "raft": {  # every round starts again from the first model, on a pool that only the checkpoint remembers
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "algo.prompts": 3,
        "algo.group_size": 4,
        "algo.batch_rows": 2,
        "algo.epochs": 2,
        "algo.restart": True,
        "algo.pool": "all",
        "eval.problems": 4,
        "train.lr": 1e-2,
        "train.schedule": "cosine",
    },
    "distill": {
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
        "rollout.max_tokens": 8,
        "rollout.slots": 32,
        "algo.teacher": "sft-whole",  # the run of that name beside this one
        "algo.prompts": 3,
        "eval.problems": 4,
        "train.lr": 1e-2,
    },
}
REWARD = str(Path(__file__).parent / "vowels.py") + ":vowels"


def small(algorithm: str) -> dict[str, Any]:
    """Settings with which any algorithm makes a whole run in a second or two, from what it declares about itself."""
    recipe = config.RECIPES[algorithm]()
    sampled = {"data.tasks": "sums", "data.count": 64, "reward.name": REWARD}
    sizes = {
        "rollout": {"max_tokens": 8, "slots": 32},
        "algo": {"prompts": 3, "group_size": 4, "batch_rows": 4, "batch_pairs": 4, "teacher": "sft-whole"},
        "eval": {"problems": 4, "every": 3},
        "train": {"lr": 1e-2},
    }
    known = config.as_dict(recipe)
    found = sampled if recipe.facts().samples == "every step" else {"data.holdout": 0.4}
    return found | {f"{s}.{k}": v for s, keys in sizes.items() for k, v in keys.items() if k in known.get(s, {})}


def settings_of(name: str) -> dict[str, Any]:
    """The settings of an algorithm, or of a variant of one, written algorithm+variant."""
    return SETTINGS[name] if name in SETTINGS else small(name)


def data_of(name: str) -> str | None:
    """The file that an offline algorithm reads, in the test's folder, and what is mixed in."""
    if name in MIXTURES:
        return MIXTURES[name]
    recipe = config.RECIPES[name.split("+")[0]]()
    files = {"conversations": "rows.jsonl", "pairs": "pairs.jsonl", "solutions": "pairs.jsonl"}
    return files.get(recipe.facts().data)


MIXTURES = {"sft+mixture": "rows.jsonl*2 + sums*1"}
SHARED: dict[str, Any] = {
    "train.steps": STEPS,
    "train.threads": 1,
    "run.checkpoint_every": 2,
    "train.micro_batch_tokens": 128,
}


def register_copy(name: str, of: str) -> None:
    """Makes an algorithm known under a second name, as a new file in algos/ and one in config/ would."""
    cls = config.RECIPES[of]
    config.RECIPES[name] = dataclass(frozen=True)(type("CopiedRecipe", (cls,), {"__doc__": cls.__doc__}))
    sys.modules[f"posttrain.algos.{name.replace('-', '_')}"] = cast(ModuleType, algos.load(of))


def live(request: dict[str, Any]) -> None:
    """One life: starts the run, or resumes it where the folder has one."""
    folder = Path(request["folder"])
    if copy := request.get("copy"):
        register_copy(*copy)
    os.environ[failpoints.VARIABLE] = request.get("failpoint") or ""
    os.environ["POSTTRAIN_CACHE"] = f"{folder}.cache"
    if (folder / "run.json").exists():
        result = api.resume(folder)
    else:
        settings = {"model.path": request["model"], "run.out": str(folder)}
        if request.get("data"):
            settings["data.tasks"] = request["data"]
        name = request["algorithm"]  # a variant is written algorithm+variant
        merged = {**SHARED, **settings_of(name), **settings, **request.get("settings", {})}
        if "algo.teacher" in merged:
            merged["algo.teacher"] = str(folder.parent / merged["algo.teacher"])
        result = api.start(name.split("+")[0], config.resolve(name.split("+")[0], {}, merged))
    Path(f"{folder}.hits").write_text(json.dumps(failpoints.hits))
    os._exit(0 if result.summary else 40 + result.stopped_by)


def steps_of(folder: Path) -> int:
    """The last step that a run has stored, −1 before there is any."""
    try:
        with Run.read(folder) as run:
            step = run.last_step()
    except ResumeError:  # not made yet
        return -1
    return -1 if step is None else step


def serve() -> None:
    """Answers requests until the input closes."""
    torch.set_num_threads(1)
    assert Task  # the imports above are the expensive part; every child inherits them
    library()  # and the kernels, which each child would compile into its own cache
    load_tasks(DataConfig(tasks="sums", count=64), 0)  # and the problems that most lives are about
    warm: set[str] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["model"] not in warm:  # transformers' own tables, and the row counts that are measured once
            generator = make_generator(load_policy(ModelConfig(path=request["model"])), RolloutConfig(slots=32))
            generator.generate([Request(np.zeros(1, np.int32), (0,))], SamplingParams(max_tokens=2))
            warm.add(request["model"])
        child = os.fork()
        if child == 0:
            try:
                live(request)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if request.get("kill_at_step") is not None:
            while steps_of(Path(request["folder"])) < request["kill_at_step"]:
                time.sleep(0.02)
            os.kill(child, request.get("signal", signal.SIGKILL))
        elif request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            os.kill(child, request.get("signal", signal.SIGKILL))
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)


if __name__ == "__main__":
    serve()
