"""Loads a recipe's tasks with their verifier or environment, and checks them before step 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from posttrain.config import EnvRecipe, Sampling
from posttrain.data.chat import ChatFormat
from posttrain.data.conversations import fit_prompts
from posttrain.data.sources import is_file_name, is_hub_id
from posttrain.data.tasks.load import TaskSets, held_out, load_tasks
from posttrain.envs import ENVS
from posttrain.envs.env import EnvFactory, load_env, own_tasks, takes
from posttrain.envs.toolbox import runs_python, tools_hash
from posttrain.envs.tools import opening_of
from posttrain.rewards import code, combine, judge
from posttrain.rewards.auto import validate, verifier_for
from posttrain.rewards.functions import leaf_verifier, reward_from
from posttrain.rewards.models import PREFIX, load_reward_model, model_folders
from posttrain.rewards.scoring import scores_groups
from posttrain.rewards.verifiers import VERIFIERS, Verifier
from posttrain.train import device
from posttrain.types import ConfigError, Task

GOLD_DECIDES = ("auto", "exact", "numeric", "math", "units", "multiple_choice", "cosine_length")
"""Rewards that compare with the gold answer; every task needs one, and it must pass."""
GOLD_MAY_BE_GIVEN = ("regex", "json_schema", "z3", "lean", "code")
"""Rewards with an optional gold answer; if a task has one, it must pass."""


def judged_tasks(
    recipe: Sampling, chat: ChatFormat, given: list[Task] | None = None, reward: Callable[..., Any] | None = None
) -> tuple[TaskSets, Verifier]:
    """Loads the tasks of a recipe and their verifier; checks that gold answers pass where the reward uses them."""
    verify = _verifier(recipe, reward)
    gold_decides = reward is None and _gold_decides(recipe)
    sets = load_tasks(recipe.data, recipe.run.seed, given, needs_answer=gold_decides)
    sets = _checked(sets, recipe, chat, reward is None)
    content = sets.hash if reward is not None else sets.hash + reward_hash(recipe.reward.name)
    return replace(sets, hash=content), verify


def _verifier(recipe: Sampling, reward: Callable[..., Any] | None) -> Verifier:
    def load(name: str) -> Verifier | None:
        if not name.startswith(PREFIX):
            return None
        return load_reward_model(name, recipe.reward, device.resolve(recipe.train.device), verifier_for)

    return reward_from(reward or recipe.reward.name, verifier_for, load, recipe.reward.weights)


def _gold_decides(recipe: Sampling) -> bool:
    return any(leaf.name in GOLD_DECIDES for leaf in combine.leaves_of(recipe.reward.name))


def check_gold(tasks: Sequence[Task], name: str) -> None:
    """Raises DataError if one of the verifiers in a reward cannot score a task it applies to."""
    for leaf in combine.leaves_of(name):
        if leaf.name in ("auto", *VERIFIERS):
            given = "where given" if leaf.name in GOLD_MAY_BE_GIVEN else "never"
            gold = "always" if leaf.name in GOLD_DECIDES else given
            concerned = [task for task in tasks if leaf.concerns(task)]
            validate(concerned, leaf_verifier(leaf, verifier_for), gold)


def _checked(
    sets: TaskSets, recipe: Sampling, chat: ChatFormat, judged: bool, env: EnvFactory | None = None
) -> TaskSets:
    """Filters and checks the task sets, with `eval.problems` held-out tasks; `judged`: the recipe's reward scores."""
    sets = fit_prompts(sets, chat, recipe.data, partial(opening_of, env))
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


def _executes(recipe: Sampling, sets: TaskSets, judged: bool, env: EnvFactory | None) -> bool:
    """Whether the run executes model-written code: in the reward `code` or the tool `python`."""
    if env is not None and takes(env, "tools") and isinstance(recipe, EnvRecipe) and runs_python(recipe.env.tools):
        return True
    leaves = combine.leaves_of(recipe.reward.name) if judged else []
    auto_leaves = [leaf for leaf in leaves if leaf.name == "auto"]
    by_auto = any(
        leaf.concerns(t) and verifier_for(t) is code.code for leaf in auto_leaves for t in sets.train + sets.test
    )
    return by_auto or any(leaf.name == "code" for leaf in leaves)


def env_tasks(
    recipe: EnvRecipe, chat: ChatFormat, given: list[Task] | None = None, reward: Callable[..., Any] | None = None
) -> tuple[TaskSets, Verifier, EnvFactory | None]:
    """`judged_tasks` and the recipe's environment, which may provide the tasks."""
    if not recipe.env.name:
        return *judged_tasks(recipe, chat, given, reward), None
    verify = _verifier(recipe, reward)
    sandbox = partial(code.use, recipe.reward.sandbox, recipe.reward.accept_arbitrary_code)
    env = load_env(recipe.env.name, ENVS, verify, recipe.env, sandbox)
    judged, tasks, seed = takes(env, "verify"), recipe.data.tasks, recipe.run.seed
    if judged and scores_groups(verify):
        raise ConfigError(
            f"the reward compares the completions of a group, but the environment {recipe.env.name!r} scores each "
            "episode by itself. Use a reward that asks for `completion`."
        )
    gold_decides = judged and reward is None and _gold_decides(recipe)
    own = own_tasks(env)
    if own is not None and given is None and not (is_file_name(tasks) or is_hub_id(tasks)):
        sets = held_out(own(recipe.data.count, seed), recipe.data, seed)
    else:
        sets = load_tasks(recipe.data, seed, given, needs_answer=gold_decides)
    sets = _checked(sets, recipe, chat, judged and reward is None, env)
    content = sets.hash + (reward_hash(recipe.reward.name) if judged and reward is None else "")
    content += tools_hash(recipe.env.tools) if takes(env, "tools") else ""
    return replace(sets, hash=content + env_hash(recipe.env.name)), verify, env


def reward_hash(name: str) -> str:
    """Hash of a reward's files, to detect changes when a run is resumed; empty for built-in verifiers."""
    return "".join(_file_hash(leaf.name) for leaf in combine.leaves_of(name))


def _file_hash(name: str) -> str:
    if name.startswith(PREFIX):
        return "+" + "+".join(device.model_hash(str(f)) for f in model_folders(name))
    if name.startswith(judge.PREFIX):
        return "+" + judge.read_judge(name).identity
    if ".py:" in name:
        return "+" + device.file_hash(name.rpartition(":")[0])
    return ""


def env_hash(name: str) -> str:
    """Hash of an environment's file, with or without an adapter prefix; empty for built-in environments."""
    adapter = name.partition(":")[0] + ":"
    spec = name.removeprefix(adapter) if adapter in ENVS else name
    file = spec if spec.endswith(".toml") else spec.rpartition(":")[0]
    return "+" + device.file_hash(file) if file.endswith((".py", ".toml")) else ""
