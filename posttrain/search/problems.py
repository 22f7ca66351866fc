"""Loads a model and its tasks for evaluations and searches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from posttrain.cluster.launch import Cluster
from posttrain.config import EvalRecipe
from posttrain.data.chat import ChatFormat
from posttrain.data.tasks.load import TaskSets, chosen, is_generated
from posttrain.models.load import Policy, chat_format_of
from posttrain.models.opening import open_policy
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import Collector
from posttrain.rollout.tasks import env_tasks
from posttrain.search.solve import Problems, Progress, solve
from posttrain.train import device
from posttrain.train.job import Workers
from posttrain.types import Task

T = TypeVar("T")
Split = Literal["held-out", "train"]


def search_recipe(
    model: str,
    recipe: EvalRecipe,
    out: Path | None = None,
    reward: Any = None,
    progress: Progress | None = None,
    split: Split = "held-out",
    run: Callable[[Problems, Path | None, Progress | None], T] = solve,
) -> T:
    """`posttrain.search` for a resolved recipe; `run` is what is done with the problems, by default one search."""
    with Cluster(recipe, reward) as workers:
        policy, chat, sets, collector = _opened(model, recipe, reward, split == "train", workers)
        tasks = side(sets, recipe, split)
        return run(Problems(model, policy, chat, collector, recipe, tasks, sets.hash, sets.notes), out, progress)


def held_out(model: str, recipe: EvalRecipe, reward: Any, train: bool, workers: Workers) -> tuple[TaskSets, Collector]:
    """The tasks of a recipe, and a collector that samples the model at `eval.temperature`; `train` loads both sides."""
    return _opened(model, recipe, reward, train, workers)[2:]


def side(sets: TaskSets, recipe: EvalRecipe, split: Split) -> list[Task]:
    """The held-out tasks, or `eval.problems` of the training tasks."""
    if split == "held-out":
        return sets.test
    return chosen(sets.train, recipe.eval.problems, is_generated(recipe.data.tasks))


def _opened(
    model: str, recipe: EvalRecipe, reward: Any, train: bool, workers: Workers
) -> tuple[Policy, ChatFormat, TaskSets, Collector]:
    device.set_threads(recipe.train.threads)
    policy = open_policy(model, recipe.model, device.resolve(recipe.train.device))
    chat = chat_format_of(policy, model, recipe.data.format, recipe.data.template_kwargs)
    sets, verify, env = env_tasks(recipe, chat, None, reward, train)
    collector = make_collector(policy, chat, verify, recipe, env, workers)
    at = replace(collector.params, temperature=recipe.eval.temperature)
    return policy, chat, sets, replace(collector, params=at)
