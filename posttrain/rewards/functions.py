"""User-defined reward functions: `def reward(completion, answer, **task) -> float`, from a file or passed from Python.

A reward function is called with the arguments it names: `completion` (also as `text`), `answer`, `prompt`, `messages`,
`task_id`, `task` (the Task) and every column of its row, the answer's under its own name too. A column with the name of
a built-in argument is refused before step 0 if the function asks for it (rewards/arguments.py). It must return one
finite number or a Verdict; anything else is an error that names the function, the task and the value, and never becomes
a reward. A function that asks for `completions` (or `group`) is called once per group and returns one value per
completion. Functions may be asynchronous.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.config import nearest
from posttrain.rewards import combine, judge
from posttrain.rewards.arguments import available, check_of, column_check, with_check
from posttrain.rewards.calls import GROUP_ARGUMENTS, ConcurrentReward, GroupReward, is_async, waited
from posttrain.rewards.judging import BatchVerifier, Verifier
from posttrain.rewards.scoring import RAISED, describe, error_text, name_of, score_all, scores_groups
from posttrain.rewards.verifiers import VERIFIERS
from posttrain.types import ConfigError, JsonView, RolloutError, Task, Verdict

RewardFn = Callable[..., Any]


def load_function(spec: str, what: str = "reward") -> RewardFn:
    """Loads the function or class `FILE.py:NAME`. Raises ConfigError with the file, name or line at fault."""
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        raise ConfigError(f"{what} {spec!r} is not of the form FILE.py:FUNCTION, e.g. {what}s.py:mine.")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{what} file {file} does not exist. Relative paths start at the current directory.")
    module_name = f"posttrain_{what}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{what} file {file} cannot be imported as Python.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look up the file's module by name
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ConfigError(
            f"{what} file {_location(error, path)}: {type(error).__name__}: {error}. Fix the file."
        ) from error
    if not hasattr(module, name):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{what} file {file} has no function {name!r}{nearest(name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{name} in {file} is of type {type(function).__name__}, expected a function.")
    return function


def reward_from(
    reward: str | RewardFn | Sequence[str | RewardFn],
    auto: Callable[[Task], Verifier] | None = None,
    load: Callable[[str], Verifier | None] = lambda name: None,
    weights: Sequence[float] = (),
) -> Verifier:
    """Creates a verifier from `reward.name`, from a Python function, or from a list of both, which is summed.

    `weights` are those of the list's items, or of the terms of a sum.

    A string is a name in VERIFIERS, `FILE.py:FUNCTION`, `judge:FILE.toml`, a name that `load` knows, `auto` (each task
    is scored by `auto(task)`), or an expression of these (posttrain/rewards/combine.py). Raises ConfigError for an
    unknown name or a function whose signature cannot be inspected.
    """
    functions: dict[combine.Leaf, RewardFn] = {}
    if isinstance(reward, str):
        tree = combine.weighted(combine.parse(reward), weights)
    else:
        items = [reward] if callable(reward) else list(reward)
        nodes = [_node(item, i, functions) for i, item in enumerate(items)]
        tree = combine.weighted(combine.summed(nodes), weights)
    if isinstance(tree, combine.Leaf) and not tree.only:
        return _function_verifier(functions[tree]) if tree in functions else leaf_verifier(tree, auto, load)
    verifiers: dict[combine.Leaf, Verifier] = {leaf: _function_verifier(f) for leaf, f in functions.items()}
    for leaf in (leaf for leaf in combine.leaves(tree) if leaf not in functions):
        try:
            verifiers[leaf] = leaf_verifier(leaf, auto, load)
        except ConfigError as error:
            raise ConfigError(f"reward {reward!r}, character {leaf.position}: {error}") from None
    return _combined(tree, verifiers)


def _node(item: str | RewardFn, index: int, functions: dict[combine.Leaf, RewardFn]) -> combine.Node:
    """The tree of one reward of a list; a Python function is added to `functions`."""
    if isinstance(item, str):
        return combine.parse(item)
    leaf = combine.Leaf(name_of(item), (("", index),))  # two functions may have the same name
    functions[leaf] = item
    return leaf


def _function_verifier(function: RewardFn) -> Verifier:
    return function if function in VERIFIERS.values() else _adapt(function)


def leaf_verifier(
    leaf: combine.Leaf,
    auto: Callable[[Task], Verifier] | None = None,
    load: Callable[[str], Verifier | None] = lambda name: None,
) -> Verifier:
    """The verifier of one leaf, with the task columns that the leaf sets."""
    verify = load(leaf.name) or _named(leaf.name, auto)
    return _with_columns(verify, dict(leaf.settings)) if leaf.settings else verify


@dataclass(frozen=True)
class Batched:
    """A `BatchVerifier` made of two functions: one scores a single completion, the other many."""

    one: Verifier
    many: Callable[[Sequence[tuple[Task, str]]], Sequence[Verdict | RolloutError]]
    by_group: bool = False  # whether a verdict depends on the other completions of the group

    def __call__(self, task: Task, text: str, /) -> Verdict:
        return self.one(task, text)

    def score_all(self, pairs: Sequence[tuple[Task, str]], /) -> Sequence[Verdict | RolloutError]:
        return self.many(pairs)


def _named(name: str, auto: Callable[[Task], Verifier] | None) -> Verifier:
    if name == "auto" and auto is not None:
        return lambda task, text: auto(task)(task, text)
    if name in VERIFIERS:
        return VERIFIERS[name]
    if name.startswith(judge.PREFIX):
        return judge.load_judge(name)
    if ".py" in name:
        return _adapt(load_function(name))
    raise ConfigError(f"unknown reward {name!r}{nearest(name, ['auto', *VERIFIERS])} Or give FILE.py:FUNCTION.")


def _with_columns(verify: Verifier, columns: JsonView) -> Verifier:
    def extended(task: Task) -> Task:
        return replace(task, meta={**task.meta, **columns})

    def verify_extended(task: Task, text: str) -> Verdict:
        return verify(extended(task), text)

    if isinstance(verify, BatchVerifier):
        batch = verify.score_all
        many = lambda pairs: batch([(extended(task), text) for task, text in pairs])  # noqa: E731
        extension: Verifier = Batched(verify_extended, many, scores_groups(verify))
    else:
        extension = verify_extended
    check = check_of(verify)
    return with_check(extension, lambda task: check(extended(task))) if check else extension


def _combined(tree: combine.Node, verifiers: Mapping[combine.Leaf, Verifier]) -> Verifier:
    """A verifier that combines those that apply to a task; it scores in batches if any of them does."""

    def verify(task: Task, text: str) -> Verdict:
        verdicts = {leaf.key: verifier(task, text) for leaf, verifier in verifiers.items() if leaf.concerns(task)}
        return combine.joined(tree, verdicts)

    def score_batch(pairs: Sequence[tuple[Task, str]]) -> list[Verdict | RolloutError]:
        verdicts: list[dict[Any, Verdict]] = [{} for _ in pairs]
        errors: list[list[str]] = [[] for _ in pairs]
        for leaf, verifier in verifiers.items():
            indices = [i for i, (task, _) in enumerate(pairs) if leaf.concerns(task)]
            for i, (verdict, error) in zip(indices, score_all(verifier, [pairs[i] for i in indices]), strict=True):
                if verdict is None:
                    errors[i].append(str(error))
                else:
                    verdicts[i][leaf.key] = verdict
        return [_joined(tree, by_key, messages) for by_key, messages in zip(verdicts, errors, strict=True)]

    def check(task: Task) -> None:
        for leaf, verifier in verifiers.items():
            if (inner := check_of(verifier)) and leaf.concerns(task):
                inner(task)

    batched = any(isinstance(verifier, BatchVerifier) for verifier in verifiers.values())
    groups = any(map(scores_groups, verifiers.values()))
    return with_check(Batched(verify, score_batch, groups) if batched else verify, check)


def _joined(tree: combine.Node, verdicts: Mapping[Any, Verdict], errors: Sequence[str]) -> Verdict | RolloutError:
    if errors:
        return RolloutError(errors[0], boundary="reward")
    try:
        return combine.joined(tree, verdicts)
    except RolloutError as error:
        return error


def to_verdict(value: Any, name: str, task: Task) -> Verdict:
    """Converts a reward function's return value to a verdict; a number passes if it is at least 1.

    Raises RolloutError unless the value is one finite number; a bool or a 0-dimensional array counts as one.
    """
    if isinstance(value, Verdict):
        return value
    single = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if isinstance(single, numbers.Real):
        try:
            score = float(single)
        except OverflowError:
            score = math.inf
        if math.isfinite(score):
            return Verdict(score, score >= 1.0)
    raise RolloutError(
        f"reward {name} returned {describe(single)} for task {task.id!r}, expected one finite number.",
        boundary="reward",
    )


def _adapt(function: RewardFn) -> Verifier:
    name = name_of(function)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise ConfigError(
            f"cannot inspect the arguments of reward {name}. Wrap it: def reward(completion, answer, **task): ..."
        ) from None

    check = column_check(name, parameters)
    if any(p.name in GROUP_ARGUMENTS for p in parameters):
        if single := [p.name for p in parameters if p.name in ("completion", "text")]:
            raise ConfigError(
                f"reward {name} asks for {single[0]!r}, one completion, and for all of a group. Keep one of the two."
            )
        return with_check(GroupReward(name, partial(_score_group, function, parameters)), check)

    def call(task: Task, text: str) -> Any:
        positional, named = _arguments(parameters, available(task, text), name, task)
        with _explained(name, task):
            return function(*positional, **named)

    async def score(task: Task, text: str) -> Verdict:
        pending = call(task, text)
        with _explained(name, task):
            value = await pending
        return to_verdict(value, name, task)

    def verify(task: Task, text: str) -> Verdict:
        return to_verdict(call(task, text), name, task)

    verify.__name__ = name
    return with_check(ConcurrentReward(name, score) if is_async(function) else verify, check)


@contextmanager
def _explained(name: str, task: Task) -> Iterator[None]:
    """Turns an exception of a reward function into a RolloutError that names the function, the task and the line."""
    try:
        yield
    except RAISED as error:
        raise RolloutError(error_text(name, task, error), boundary="reward") from error


def _score_group(
    function: RewardFn, parameters: list[inspect.Parameter], task: Task, texts: list[str]
) -> list[Verdict]:
    """Calls a group reward. Raises RolloutError unless it returns one value for each of the completions."""
    name, clash = name_of(function), [word for word in GROUP_ARGUMENTS if word in task.meta]
    if clash:
        raise RolloutError(
            f"reward {name} compares the completions of a group, but the tasks have a column {clash[0]!r}. Rename it.",
            boundary="reward",
        )
    given = {k: v for k, v in available(task, "").items() if k not in ("completion", "text")}
    positional, named = _arguments(parameters, given | dict.fromkeys(GROUP_ARGUMENTS, texts), name, task)
    with _explained(name, task):
        values = function(*positional, **named)
        values = waited(values) if inspect.iscoroutine(values) else values
        values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(texts):
        raise RolloutError(
            f"reward {name} returned {describe(values)} for task {task.id!r}, expected one number for each of its "
            f"{len(texts)} completions.",
            boundary="reward",
        )
    return [to_verdict(value, name, task) for value in values]


def _arguments(
    parameters: list[inspect.Parameter], available: Mapping[str, object], name: str, task: Task
) -> tuple[list[object], dict[str, object]]:
    """Arguments for a call of a reward function.

    If its first parameter has an unknown name (`def f(reply, gold)`), arguments are matched by position instead, unless
    it is called for a group.
    """
    positional: list[object] = []
    named: dict[str, object] = {}
    first = parameters[0].name if parameters else "completion"
    by_order = ["completion", "answer"] if "completion" in available and first not in available else []
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            continue
        if p.kind is p.VAR_KEYWORD:
            taken = {q.name for q in parameters}
            hidden = {"text", "task"} if by_order or "completion" in taken else {"task"}
            hidden |= set(GROUP_ARGUMENTS) if taken & set(GROUP_ARGUMENTS) else set()
            columns = {k: task.meta[k] for k in hidden if k in task.meta}  # the row's own, not the built-in ones
            named |= {k: v for k, v in {**available, **columns}.items() if k not in taken | (hidden - columns.keys())}
            continue
        if p.name in available:
            value = available[p.name]
            if p.name in by_order:
                by_order.remove(p.name)
        elif by_order and p.kind is not p.KEYWORD_ONLY and p.default is p.empty:
            value = available[by_order.pop(0)]
        elif p.default is not p.empty:
            continue
        else:
            raise RolloutError(
                f"reward {name} has the argument {p.name!r}, which task {task.id!r} does not provide; available are "
                f"{', '.join(sorted(available))}. Rename the argument or add the column.",
                boundary="reward",
            )
        if p.kind is p.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[p.name] = value
    return positional, named


def _location(error: BaseException, path: Path) -> str:
    """`file:line` of the last line of the user's file in an import error's traceback."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)
