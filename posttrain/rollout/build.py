"""From a recipe to a job: the model, its chat format, judged tasks and a collector, all checked before step 0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from posttrain.config import EnvConfig, RolloutConfig
from posttrain.data import conversations as data_sets
from posttrain.data.answers import final_part, marked_answer
from posttrain.data.chat import ChatFormat
from posttrain.data.sources import is_file_name, is_hub_id
from posttrain.data.tasks import load as task_sets
from posttrain.envs import ENVS
from posttrain.envs.env import Env, load_env, own_tasks, takes
from posttrain.envs.toolbox import runs_python, tools_hash
from posttrain.envs.tools import opening_of
from posttrain.models.load import Policy
from posttrain.rewards import code, combine, judge
from posttrain.rewards.functions import leaf_verifier, reward_from
from posttrain.rewards.models import PREFIX, load_reward_model, model_folders
from posttrain.rewards.verifiers import VERIFIERS
from posttrain.rollout.collector import Collector, Verifier
from posttrain.rollout.engine import EmbeddedGenerator
from posttrain.rollout.generator import Generator
from posttrain.rollout.multi_turn import Player
from posttrain.rollout.vllm import VLLMGenerator
from posttrain.store.run import Run
from posttrain.train import device as machine
from posttrain.train.interrupt import Interrupt
from posttrain.types import ConfigError, Message, SamplingParams, Task

GOLD_DECIDES = ("auto", "exact", "numeric", "math", "units", "multiple_choice", "cosine_length")
"""Rewards that compare with the task's gold answer, so that every task must have one that passes."""
GOLD_MAY_BE_GIVEN = ("regex", "json_schema", "z3", "lean", "code")
"""Rewards that need no gold answer; a task that has one must pass with it."""

OnStep = Callable[[int, dict[str, float]], None]
"""Called after each step with its number and every metric and timing."""


@dataclass(frozen=True)
class Setup:
    """What every algorithm starts from: the resolved recipe, the model it names, and what was given from Python."""

    recipe: Any
    policy: Policy
    chat: ChatFormat
    folder: Path  # of the run; does not exist yet when the run is new
    given: list[Task] | None = None
    reward: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Job:
    """A run that is ready to start: what names its data, what to tell the user, and the call that trains.

    `run` continues from the run's newest checkpoint if it has one and returns the summary, or None when the interrupt
    asked it to stop. `policy` is what is exported when it has finished.
    """

    policy: Policy
    data_hash: str
    notes: list[str]
    run: Callable[[Run, OnStep, Interrupt], dict[str, Any] | None]


def speak(policy: Policy, form: Literal["chat", "plain"]) -> ChatFormat:
    """The policy's chat format; what ends a turn in it also ends a completion, so that what is trained stops."""
    chat = ChatFormat(policy.tokenizer, form)
    policy.stop_ids = tuple(dict.fromkeys([*policy.stop_ids, *chat.stop_ids]))
    return chat


def final_answer(text: str) -> str:
    """What two replies must share to count as the same vote: the announced answer, or else the part after thinking."""
    return marked_answer(final_part(text)) or final_part(text)


def judged_tasks(
    recipe: Any, chat: ChatFormat, given: list[Task] | None = None, reward: Callable[..., Any] | None = None
) -> tuple[task_sets.TaskSets, Verifier]:
    """The tasks of a recipe and what scores them; where a gold answer decides, each task's own must pass."""
    verify = _verifier(recipe, reward)
    gold_decides = reward is None and _gold_decides(recipe)
    sets = task_sets.load_tasks(recipe.data, recipe.run.seed, given, needs_answer=gold_decides)
    sets = _checked(sets, recipe, chat, reward is None)
    content = sets.hash if reward is not None else sets.hash + reward_hash(recipe.reward.name)
    return replace(sets, hash=content), verify


def _verifier(recipe: Any, reward: Callable[..., Any] | None) -> Verifier:
    def load(name: str) -> Verifier | None:
        if not name.startswith(PREFIX):
            return None
        device = machine.device(recipe.train.device)
        return load_reward_model(name, recipe.reward, device, task_sets.verifier_for)

    return reward_from(reward or recipe.reward.name, task_sets.verifier_for, load)


def _gold_decides(recipe: Any) -> bool:
    return any(leaf.name in GOLD_DECIDES for leaf in combine.leaves_of(recipe.reward.name))


def check_gold(tasks: Sequence[Task], name: str) -> None:
    """Raises DataError where a verifier that a reward is put together from cannot judge a task."""
    for leaf in combine.leaves_of(name):
        if leaf.name in ("auto", *VERIFIERS):
            given = "where given" if leaf.name in GOLD_MAY_BE_GIVEN else "never"
            gold = "always" if leaf.name in GOLD_DECIDES else given
            mine = [task for task in tasks if leaf.concerns(task)]
            task_sets.validate(mine, leaf_verifier(leaf, task_sets.verifier_for), gold)


def _checked(
    sets: task_sets.TaskSets, recipe: Any, chat: ChatFormat, judged: bool, env: Env | None = None
) -> task_sets.TaskSets:
    """The sets that fit the recipe, `eval.problems` of them to evaluate on; `judged` by what its reward names."""
    sets = data_sets.fit_prompts(sets, chat, recipe.data, partial(opening_of, env))
    if not sets.test:
        raise ConfigError("no held-out tasks are left to evaluate on; set data.eval_tasks or raise data.holdout.")
    executed = _executes(recipe, sets, judged, env)
    if executed:
        code.use(recipe.reward.sandbox, recipe.reward.accept_arbitrary_code)
    if judged:
        check_gold(sets.train + sets.test, recipe.reward.name)
    if len(sets.test) < recipe.eval.problems:
        note = f"{len(sets.test)} held-out tasks exist; eval.problems={recipe.eval.problems} evaluates all of them."
        sets = replace(sets, notes=[*sets.notes, note])
    if executed and recipe.reward.sandbox == "none":
        note = 'Model-written code runs WITHOUT ISOLATION, as reward.sandbox = "none" asks.'
        sets = replace(sets, notes=[*sets.notes, note])
    return replace(sets, test=sets.test[: recipe.eval.problems])


def _executes(recipe: Any, sets: task_sets.TaskSets, judged: bool, env: Env | None) -> bool:
    """Whether code that the model writes is executed: by the reward `code`, or by the tool `python`."""
    if env is not None and takes(env, "tools") and runs_python(recipe.env.tools):
        return True
    leaves = combine.leaves_of(recipe.reward.name) if judged else []
    own = [leaf for leaf in leaves if leaf.name == "auto"]
    by_auto = any(
        leaf.concerns(t) and task_sets.verifier_for(t) is code.code for leaf in own for t in sets.train + sets.test
    )
    return by_auto or any(leaf.name == "code" for leaf in leaves)


def world_tasks(
    recipe: Any, chat: ChatFormat, given: list[Task] | None = None, reward: Callable[..., Any] | None = None
) -> tuple[task_sets.TaskSets, Verifier, Env | None]:
    """`judged_tasks`, and the environment that the recipe names. One with tasks of its own brings them."""
    if not recipe.env.name:
        return *judged_tasks(recipe, chat, given, reward), None
    verify = _verifier(recipe, reward)
    sandbox = partial(code.use, recipe.reward.sandbox, recipe.reward.accept_arbitrary_code)
    env = load_env(recipe.env.name, ENVS, verify, recipe.env, sandbox)
    judged, tasks, seed = takes(env, "verify"), recipe.data.tasks, recipe.run.seed
    gold_decides = judged and reward is None and _gold_decides(recipe)
    own = own_tasks(env)
    if own is not None and given is None and not (is_file_name(tasks) or is_hub_id(tasks)):
        sets = task_sets.held_out(own(recipe.data.count, seed), recipe.data, seed)
    else:
        sets = task_sets.load_tasks(recipe.data, seed, given, needs_answer=gold_decides)
    sets = _checked(sets, recipe, chat, judged and reward is None, env)
    content = sets.hash + (reward_hash(recipe.reward.name) if judged and reward is None else "")
    content += tools_hash(recipe.env.tools) if takes(env, "tools") else ""
    return replace(sets, hash=content + env_hash(recipe.env.name)), verify, env


def reward_hash(name: str) -> str:
    """What a reward's own files hold, so that a changed one is noticed when a run is resumed; empty for verifiers."""
    return "".join(_file_hash(leaf.name) for leaf in combine.leaves_of(name))


def _file_hash(name: str) -> str:
    if name.startswith(PREFIX):
        return "+" + "+".join(machine.model_hash(str(f)) for f in model_folders(name))
    if name.startswith(judge.PREFIX):
        return "+" + judge.read_judge(name).identity
    if ".py:" in name:
        return "+" + machine.file_hash(name.rpartition(":")[0])
    return ""


def env_hash(name: str) -> str:
    """The same of an environment's file, also where an adapter's name stands before it; empty for built-in ones."""
    adapter = name.partition(":")[0] + ":"
    spec = name.removeprefix(adapter) if adapter in ENVS else name
    file = spec if spec.endswith(".toml") else spec.rpartition(":")[0]
    return "+" + machine.file_hash(file) if file.endswith((".py", ".toml")) else ""


def make_generator(policy: Policy, rollout: RolloutConfig) -> Generator:
    """The engine that a recipe names, on this policy. Raises ConfigError where it cannot run here."""
    if rollout.engine == "vllm":
        return VLLMGenerator(policy, rollout.slots, rollout.vllm_memory)
    return EmbeddedGenerator(policy, rollout.slots, torch.bfloat16 if rollout.dtype == "bfloat16" else None)


def make_collector(
    policy: Policy, chat: ChatFormat, verify: Verifier, recipe: Any, env: Env | None = None
) -> Collector:
    """Engine, chat format and verifier, or environment, put together for a recipe."""
    rollout = recipe.rollout

    def encode(task: Task) -> np.ndarray:
        return chat.prompt_tokens(task.messages)

    def decode(tokens: np.ndarray) -> str:
        return policy.tokenizer.decode(tokens, skip_special_tokens=True)

    context = getattr(policy.config, "max_position_embeddings", None) or sys.maxsize
    return Collector(
        generator=make_generator(policy, rollout),
        encode=encode,
        decode=decode,
        verify=verify,
        params=SamplingParams(temperature=rollout.temperature, max_tokens=rollout.max_tokens),
        seed=recipe.run.seed,
        workers=rollout.reward_workers,
        player=env and _player(env, chat, decode, recipe.env, context),
    )


def _player(env: Env, chat: ChatFormat, decode: Callable[[np.ndarray], str], limits: EnvConfig, context: int) -> Player:
    """The player of an environment. What a tool says is the user's where the chat template knows no tool."""
    known = chat.format == "plain" or chat.knows("tool")

    def spoken(messages: Sequence[Message]) -> tuple[Message, ...]:
        if known:
            return tuple(messages)
        runs = [(tool, list(run)) for tool, run in groupby(messages, lambda m: m.role == "tool")]
        said = [[Message("user", "\n".join(m.content for m in run))] if tool else run for tool, run in runs]
        return tuple(message for run in said for message in run)

    def encode(task: Task) -> np.ndarray:
        return chat.prompt_tokens(spoken(task.messages))

    def follow(messages: Sequence[Message]) -> np.ndarray:
        return chat.continuation_tokens(spoken(messages))

    return Player(env, encode, follow, decode, limits, context)


def opened(collector: Collector, chat: ChatFormat, opening: str) -> Collector:
    """The same collector with every answer beginning with a given text, which the model only continues."""
    if not opening:
        return collector

    def encode(task: Task) -> np.ndarray:
        tokens, begun, _ = chat.answer_marks([*task.messages, Message("assistant", opening)], [len(opening)])
        return tokens[: begun[0]]

    return replace(collector, encode=encode, decode=lambda tokens: opening + collector.decode(tokens))
