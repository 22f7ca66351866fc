"""User-defined reward functions: `def reward(completion, answer, **task) -> float`, from a file or passed from Python.

A reward function is called with the arguments it names: `completion` (also as `text`), `answer`, `prompt`, `messages`,
`task_id`, `task` (the Task) and every column of its row, the answer's under its own name too. A column with the name of
a built-in argument is refused before step 0 if the function asks for it (rewards/arguments.py). It must return one
finite number or a Verdict; anything else is an error that names the function, the task and the value, and never becomes
a reward.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.config import nearest
from posttrain.rewards import combine, judge
from posttrain.rewards.arguments import available, check_of, column_check, with_check
from posttrain.rewards.judging import BatchVerifier, Verifier
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
    reward: str | RewardFn,
    auto: Callable[[Task], Verifier] | None = None,
    load: Callable[[str], Verifier | None] = lambda name: None,
) -> Verifier:
    """Creates a verifier from `reward.name` or from a Python function.

    A string is a name in VERIFIERS, `FILE.py:FUNCTION`, `judge:FILE.toml`, a name that `load` knows, `auto` (each task
    is scored by `auto(task)`), or an expression of these (posttrain/rewards/combine.py). Raises ConfigError for an
    unknown name or a function whose signature cannot be inspected.
    """
    if callable(reward):
        return reward if reward in VERIFIERS.values() else _adapt(reward)
    tree = combine.parse(reward)
    if isinstance(tree, combine.Leaf) and not tree.only:
        return leaf_verifier(tree, auto, load)
    verifiers: dict[combine.Leaf, Verifier] = {}
    for leaf in combine.leaves(tree):
        try:
            verifiers[leaf] = leaf_verifier(leaf, auto, load)
        except ConfigError as error:
            raise ConfigError(f"reward {reward!r}, character {leaf.position}: {error}") from None
    return _combined(tree, verifiers)


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
        return Batched(verify_extended, lambda pairs: batch([(extended(task), text) for task, text in pairs]))
    check = check_of(verify)
    return with_check(verify_extended, lambda task: check(extended(task))) if check else verify_extended


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
    return with_check(Batched(verify, score_batch) if batched else verify, check)


def _joined(tree: combine.Node, verdicts: Mapping[Any, Verdict], errors: Sequence[str]) -> Verdict | RolloutError:
    if errors:
        return RolloutError(errors[0], boundary="reward")
    try:
        return combine.joined(tree, verdicts)
    except RolloutError as error:
        return error


def score_safely(verify: Verifier, task: Task, text: str) -> tuple[Verdict | None, str | None]:
    """Scores one completion: (verdict, None), or (None, error message). Only KeyboardInterrupt and the like propagate.

    Outside the main thread, a reward that sets a signal handler, as most time limits do, gets an error from Python.
    Some catch it and return a number, so a reward that tried to set one counts as failed, whatever it returned.
    """
    if threading.current_thread() is threading.main_thread():
        return _score(verify, task, text)
    _watch_signal_handlers()
    _thread_state.set_handler = False
    result = _score(verify, task, text)
    if _thread_state.set_handler:
        return None, (
            f"reward {_name(verify)} sets a signal handler (for a time limit?), which works in the main thread only. "
            "Set rollout.reward_workers = 0 and leave algo.overlap off, or limit its time in another way."
        )
    return result


def _score(verify: Verifier, task: Task, text: str) -> tuple[Verdict | None, str | None]:
    try:
        verdict = verify(task, text)
    except RolloutError as error:
        return None, str(error)
    except Exception as error:  # a reward may raise anything; it must neither become a number nor end the run
        return None, _error_text(_name(verify), task, error)
    if not isinstance(verdict, Verdict):
        return None, f"{_name(verify)} returned {_describe(verdict)} for task {task.id!r}, expected a Verdict."
    return verdict, None


_thread_state = threading.local()


@cache
def _watch_signal_handlers() -> None:
    """Patches `signal.signal` to record in `_thread_state` that a thread has called it."""
    original = signal.signal

    def recording(signalnum: Any, handler: Any) -> Any:
        _thread_state.set_handler = True
        return original(signalnum, handler)

    signal.signal = recording


def score_all(verify: Verifier, pairs: Sequence[tuple[Task, str]]) -> list[tuple[Verdict | None, str | None]]:
    """`score_safely` for every pair; in one call if the verifier has a method `score_all(pairs) -> verdicts`.

    That method returns a RolloutError in place of a verdict for a completion that it could not score.
    """
    if not isinstance(verify, BatchVerifier):
        return [score_safely(verify, task, text) for task, text in pairs]
    try:
        verdicts = verify.score_all(pairs)
    except RolloutError as error:
        return [(None, str(error))] * len(pairs)
    return [(None, str(item)) if isinstance(item, RolloutError) else (item, None) for item in verdicts]


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
        f"reward {name} returned {_describe(single)} for task {task.id!r}, expected one finite number.",
        boundary="reward",
    )


def _adapt(function: RewardFn) -> Verifier:
    name = _name(function)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise ConfigError(
            f"cannot inspect the arguments of reward {name}. Wrap it: def reward(completion, answer, **task): ..."
        ) from None

    def verify(task: Task, text: str) -> Verdict:
        positional, named = _arguments(parameters, available(task, text), name, task)
        try:
            value = function(*positional, **named)
        except Exception as error:
            raise RolloutError(_error_text(name, task, error), boundary="reward") from error
        return to_verdict(value, name, task)

    verify.__name__ = name
    return with_check(verify, column_check(name, parameters))


def _arguments(
    parameters: list[inspect.Parameter], available: Mapping[str, object], name: str, task: Task
) -> tuple[list[object], dict[str, object]]:
    """Arguments for a call of a reward function.

    If its first parameter has an unknown name (`def f(reply, gold)`), arguments are matched by position instead.
    """
    positional: list[object] = []
    named: dict[str, object] = {}
    by_order = ["completion", "answer"] if parameters and parameters[0].name not in available else []
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            continue
        if p.kind is p.VAR_KEYWORD:
            taken = {q.name for q in parameters}
            hidden = {"text", "task"} if by_order or "completion" in taken else {"task"}
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


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _describe(value: Any) -> str:
    size = getattr(value, "shape", None)
    if isinstance(value, list | tuple | set | dict) or size is not None:
        count = math.prod(size) if size is not None else len(value)
        return f"{count} value{'s' * (count != 1)} ({type(value).__name__})"
    if isinstance(value, float) or value is None:
        return str(value)
    text = repr(value)
    return f"{text[:60]}{'…' * (len(text) > 60)} ({type(value).__name__})"


def _error_text(name: str, task: Task, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
    return f"reward {name} raised {type(error).__name__} for task {task.id!r}{where}: {error}"


def _location(error: BaseException, path: Path) -> str:
    """`file:line` of the last line of the user's file in an import error's traceback."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)
