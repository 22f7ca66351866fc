"""Loads a recipe's tasks with their verifier or environment, and checks them before step 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config import EnvRecipe, Sampling
from posttrain.data.chat import ChatFormat
from posttrain.data.conversations import fit_prompts
from posttrain.data.mixing import parts_of
from posttrain.data.sources import is_file_name, is_hub_id
from posttrain.data.tasks.load import TaskSets, chosen, held_out, load_evaluation, load_tasks
from posttrain.envs import ENVS
from posttrain.envs.env import EnvFactory, load_env, own_tasks, takes
from posttrain.envs.toolbox import runs_python, tools_hash
from posttrain.envs.tools import opening_of
from posttrain.rewards import code, combine, judge
from posttrain.rewards.arguments import check_columns
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
    recipe: Sampling,
    chat: ChatFormat,
    given: list[Task] | None = None,
    reward: Callable[..., Any] | None = None,
    train: bool = True,
) -> tuple[TaskSets, Verifier]:
    """Loads the tasks of a recipe and their verifier; checks that gold answers pass where the reward uses them.

    Without `train`, only the tasks of `data.eval_tasks` are loaded, if it is set.
    """
    verify, notes = make_verifier(recipe, reward)
    sets = _loaded(recipe, given, reward is None, train)
    sets = replace(sets, notes=[*sets.notes, *notes])
    sets = _checked(sets, recipe, chat, verify, reward is None)
    content = sets.hash if reward is not None else sets.hash + reward_hash(recipe.reward.name)
    return replace(sets, hash=content), verify


def make_verifier(recipe: Sampling, reward: Callable[..., Any] | None) -> tuple[Verifier, list[str]]:
    """The verifier of a recipe, and notes on its reward models."""
    notes: list[str] = []

    def load(name: str) -> Verifier | None:
        if not name.startswith(PREFIX):
            return None
        model = load_reward_model(name, recipe.reward, device.resolve(recipe.train.device), verifier_for)
        notes.extend(note for member in model.members for note in member.policy.notes_as(f"reward {name}"))
        return model

    return reward_from(reward or recipe.reward.name, verifier_for, load, recipe.reward.weights), notes


def _loaded(recipe: Sampling, given: list[Task] | None, judged: bool, train: bool) -> TaskSets:
    """The tasks of a recipe; rows need an answer if a reward that compares with it applies to their source."""
    leaves = [leaf for leaf in combine.leaves_of(recipe.reward.name) if leaf.name in GOLD_DECIDES] if judged else []

    def needs_answer(source: str) -> bool:
        return any(not leaf.only or leaf.only in (source, Path(source).name) for leaf in leaves)

    if recipe.data.eval_tasks and not train:
        return load_evaluation(recipe.data, needs_answer)
    return load_tasks(recipe.data, recipe.run.seed, given, needs_answer)


def check_gold(tasks: Sequence[Task], name: str) -> None:
    """Raises DataError if one of the verifiers in a reward cannot score a task it applies to."""
    for leaf in combine.leaves_of(name):
        if leaf.name in ("auto", *VERIFIERS):
            given = "where given" if leaf.name in GOLD_MAY_BE_GIVEN else "never"
            gold = "always" if leaf.name in GOLD_DECIDES else given
            concerned = [task for task in tasks if leaf.concerns(task)]
            validate(concerned, leaf_verifier(leaf, verifier_for), gold, leaf.name)


def _checked(
    sets: TaskSets, recipe: Sampling, chat: ChatFormat, verify: Verifier, judged: bool, env: EnvFactory | None = None
) -> TaskSets:
    """Filters and checks the task sets, with `eval.problems` held-out tasks; `judged`: the recipe's reward scores."""
    sets = fit_prompts(sets, chat, recipe.data, partial(opening_of, env))
    if not sets.test:
        raise ConfigError("no held-out tasks are left to evaluate on; set data.eval_tasks or raise data.holdout.")
    executed = _executes(recipe, sets, judged, env)
    if executed:
        code.use(recipe.reward.sandbox, recipe.reward.accept_arbitrary_code)
    check_columns(verify, sets.train + sets.test)
    if judged:
        check_gold(sets.train + sets.test, recipe.reward.name)
    test = chosen(sets.test, recipe.eval.problems, sets.shuffled)
    if sets.train and not sets.shuffled:
        note = f"{len(sets.train)} tasks to train on, {len(sets.test)} held out."
        sets = replace(sets, notes=[note, *sets.notes])
    if len(sets.test) < recipe.eval.problems:
        note = f"{len(sets.test)} held-out tasks exist; eval.problems={recipe.eval.problems} evaluates all of them."
        sets = replace(sets, notes=[*sets.notes, note])
    elif len(test) < len(sets.test) and not sets.shuffled:
        note = (
            f"{len(test)} of {len(sets.test)} held-out tasks are evaluated, drawn at random but the same in every run; "
            f"{len(sets.test) - len(test)} are left out (eval.problems={recipe.eval.problems}; 0 evaluates all)."
        )
        sets = replace(sets, notes=[*sets.notes, note])
    if executed and recipe.reward.sandbox == "none":
        note = 'Model-written code runs WITHOUT ISOLATION, as reward.sandbox = "none" asks.'
        sets = replace(sets, notes=[*sets.notes, note])
    return replace(sets, test=test)


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
    recipe: EnvRecipe,
    chat: ChatFormat,
    given: list[Task] | None = None,
    reward: Callable[..., Any] | None = None,
    train: bool = True,
) -> tuple[TaskSets, Verifier, EnvFactory | None]:
    """`judged_tasks` and the recipe's environment, which may provide the tasks."""
    if not recipe.env.name:
        return *judged_tasks(recipe, chat, given, reward, train), None
    verify, notes = make_verifier(recipe, reward)
    sandbox = partial(code.use, recipe.reward.sandbox, recipe.reward.accept_arbitrary_code)
    env = load_env(recipe.env.name, ENVS, verify, recipe.env, sandbox)
    judged, seed = takes(env, "verify"), recipe.run.seed
    if judged and scores_groups(verify):
        raise ConfigError(
            f"the reward compares the completions of a group, but the environment {recipe.env.name!r} scores each "
            "episode by itself. Use a reward that asks for `completion`."
        )
    own = own_tasks(env)
    stored = any(is_file_name(name) or is_hub_id(name) for name, _ in parts_of(recipe.data.tasks))
    if own is not None and given is None and not stored:
        # the tasks of someone else's environment may be in an order, e.g. of difficulty
        sets = held_out(own(recipe.data.generated, seed), recipe.data, seed, shuffled=":" not in recipe.env.name)
    else:
        sets = _loaded(recipe, given, judged and reward is None, train)
    sets = replace(sets, notes=[*sets.notes, *notes])
    sets = _checked(sets, recipe, chat, verify, judged and reward is None, env)
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
