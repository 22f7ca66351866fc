"""Rewards that users write: `def reward(completion, answer, **task) -> float`, from a file or given from Python.

A reward is called with the names it asks for: `completion` (also as `text`), `answer`, `prompt`, `messages`,
`task_id`, `task` (the Task) and every column of the task's `meta`. What it returns must be one finite number or a
Verdict; anything else is an error that names the function, the task and the value, and never becomes a reward.
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
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.config import nearest
from posttrain.rewards import combine, judge
from posttrain.rewards.verifiers import VERIFIERS, Verifier
from posttrain.types import ConfigError, RolloutError, Task, Verdict

RewardFn = Callable[..., Any]


def load_function(spec: str, what: str = "reward") -> RewardFn:
    """What `FILE.py:NAME` names: a function or class. Raises ConfigError naming the file, name or line at fault."""
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        raise ConfigError(f"{what} {spec!r} is not FILE.py:FUNCTION, e.g. {what}s.py:mine.")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"{what} file {file} does not exist. The path is taken from where the command runs.")
    module_name = f"posttrain_{what}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{what} file {file} cannot be imported as Python.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickles in the file look their module up by name
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ConfigError(
            f"{what} file {_place(error, path)}: {type(error).__name__}: {error}. Fix the file."
        ) from error
    if not hasattr(module, name):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{what} file {file} has no function {name!r}{nearest(name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{name} in {file} is {type(function).__name__}, expected a function.")
    return function


def reward_from(
    reward: str | RewardFn,
    auto: Callable[[Task], Verifier] | None = None,
    load: Callable[[str], Verifier | None] = lambda name: None,
) -> Verifier:
    """A verifier from `reward.name` or from a Python function.

    A text is a name in VERIFIERS, `FILE.py:FUNCTION`, `judge:FILE.toml`, one that `load` knows, or `auto`: then each
    task is judged by `auto(task)`. Or it is put together from those (posttrain/rewards/combine.py). Raises ConfigError
    for an unknown name or a function whose arguments cannot be read.
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
    """The verifier of one name, with the columns that the leaf sets."""
    verify = load(leaf.name) or _named(leaf.name, auto)
    return _with_columns(verify, dict(leaf.settings)) if leaf.settings else verify


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


def _with_columns(verify: Verifier, columns: Mapping[str, Any]) -> Verifier:
    def told(task: Task) -> Task:
        return replace(task, meta={**task.meta, **columns})

    def verify_told(task: Task, text: str) -> Verdict:
        return verify(told(task), text)

    if hasattr(verify, "score_all"):
        together: Any = verify
        vars(verify_told)["score_all"] = lambda pairs: together.score_all([(told(task), text) for task, text in pairs])
    return verify_told


def _combined(tree: combine.Node, verifiers: Mapping[combine.Leaf, Verifier]) -> Verifier:
    """One verifier that asks all whom a task concerns; it judges many replies in one go where one of them does."""

    def verify(task: Task, text: str) -> Verdict:
        asked = {leaf.key: ask(task, text) for leaf, ask in verifiers.items() if leaf.concerns(task)}
        return combine.joined(tree, asked)

    def together(pairs: Sequence[tuple[Task, str]]) -> list[Verdict | RolloutError]:
        found: list[dict[Any, Verdict]] = [{} for _ in pairs]
        whys: list[list[str]] = [[] for _ in pairs]
        for leaf, ask in verifiers.items():
            mine = [i for i, (task, _) in enumerate(pairs) if leaf.concerns(task)]
            for i, (verdict, why) in zip(mine, score_all(ask, [pairs[i] for i in mine]), strict=True):
                if verdict is None:
                    whys[i].append(str(why))
                else:
                    found[i][leaf.key] = verdict
        return [_one(tree, verdicts, why) for verdicts, why in zip(found, whys, strict=True)]

    if any(hasattr(ask, "score_all") for ask in verifiers.values()):
        vars(verify)["score_all"] = together
    return verify


def _one(tree: combine.Node, verdicts: Mapping[Any, Verdict], whys: Sequence[str]) -> Verdict | RolloutError:
    if whys:
        return RolloutError(whys[0], boundary="reward")
    try:
        return combine.joined(tree, verdicts)
    except RolloutError as error:
        return error


def score_safely(verify: Verifier, task: Task, text: str) -> tuple[Verdict | None, str | None]:
    """(verdict, None), or (None, why it could not be judged). Only KeyboardInterrupt and its like pass through.

    Outside the main thread a reward that sets a signal handler, as most time limits do, gets an error from Python. Some
    catch it and answer with a number, so a reward that has tried has not judged, whatever it returned.
    """
    if threading.current_thread() is threading.main_thread():
        return _score(verify, task, text)
    _notice_signals()
    _tried.handler = False
    judged = _score(verify, task, text)
    if _tried.handler:
        return None, (
            f"reward {_name(verify)} sets a signal handler (a time limit?), which works in the main thread only. Set "
            "rollout.reward_workers = 0 and leave algo.overlap off, or limit its time in another way."
        )
    return judged


def _score(verify: Verifier, task: Task, text: str) -> tuple[Verdict | None, str | None]:
    try:
        verdict = verify(task, text)
    except RolloutError as error:
        return None, str(error)
    except Exception as error:  # a reward may raise anything; none of it may become a number or end the run
        return None, _raised(_name(verify), task, error)
    if not isinstance(verdict, Verdict):
        return None, f"{_name(verify)} returned {_show(verdict)} for task {task.id!r}, expected a Verdict."
    return verdict, None


_tried = threading.local()


@cache
def _notice_signals() -> None:
    """From here on each thread remembers in `_tried` that it has called `signal.signal`."""
    set_handler = signal.signal

    def noticed(signalnum: Any, handler: Any) -> Any:
        _tried.handler = True
        return set_handler(signalnum, handler)

    signal.signal = noticed


def score_all(verify: Verifier, pairs: Sequence[tuple[Task, str]]) -> list[tuple[Verdict | None, str | None]]:
    """`score_safely` of every pair. A verifier with a method `score_all(pairs) -> verdicts` judges them in one go.

    Among its verdicts a RolloutError stands for an answer that it could not judge.
    """
    together = getattr(verify, "score_all", None)
    if together is None:
        return [score_safely(verify, task, text) for task, text in pairs]
    try:
        verdicts = together(pairs)
    except RolloutError as error:
        return [(None, str(error))] * len(pairs)
    return [(None, str(found)) if isinstance(found, RolloutError) else (found, None) for found in verdicts]


def to_verdict(value: Any, name: str, task: Task) -> Verdict:
    """A reward function's value as a verdict; a number passes from 1 upwards.

    Raises RolloutError where the value is not one finite number (a bool, or an array without axes, is one).
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
        f"reward {name} returned {_show(single)} for task {task.id!r}, expected one finite number.", boundary="reward"
    )


def _adapt(function: RewardFn) -> Verifier:
    name = _name(function)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise ConfigError(
            f"the arguments of reward {name} cannot be read. Wrap it: def reward(completion, answer, **task): ..."
        ) from None

    def verify(task: Task, text: str) -> Verdict:
        positional, named = _arguments(parameters, _offered(task, text), name, task)
        try:
            value = function(*positional, **named)
        except Exception as error:
            raise RolloutError(_raised(name, task, error), boundary="reward") from error
        return to_verdict(value, name, task)

    verify.__name__ = name
    return verify


def _offered(task: Task, text: str) -> dict[str, Any]:
    """Everything a reward may ask for; the task's own columns come first, so that they cannot hide the rest."""
    return {
        **task.meta,
        "completion": text,
        "text": text,
        "answer": task.answer,
        "prompt": task.prompt,
        "messages": task.messages,
        "task_id": task.id,
        "task": task,
    }


def _arguments(
    parameters: list[inspect.Parameter], offered: Mapping[str, Any], name: str, task: Task
) -> tuple[list[Any], dict[str, Any]]:
    """What to call a reward with. Where its first name is its own (`def f(reply, gold)`), order decides instead."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    by_order = ["completion", "answer"] if parameters and parameters[0].name not in offered else []
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            continue
        if p.kind is p.VAR_KEYWORD:
            taken = {q.name for q in parameters}
            hidden = {"text", "task"} if by_order or "completion" in taken else {"task"}
            named |= {k: v for k, v in offered.items() if k not in taken | hidden}
            continue
        if p.name in offered:
            value = offered[p.name]
            if p.name in by_order:
                by_order.remove(p.name)
        elif by_order and p.kind is not p.KEYWORD_ONLY and p.default is p.empty:
            value = offered[by_order.pop(0)]
        elif p.default is not p.empty:
            continue
        else:
            raise RolloutError(
                f"reward {name} asks for {p.name!r}, which task {task.id!r} does not have; it has "
                f"{', '.join(sorted(offered))}. Rename the argument or add the column.",
                boundary="reward",
            )
        if p.kind is p.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[p.name] = value
    return positional, named


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _show(value: Any) -> str:
    size = getattr(value, "shape", None)
    if isinstance(value, list | tuple | set | dict) or size is not None:
        count = math.prod(size) if size is not None else len(value)
        return f"{count} value{'s' * (count != 1)} ({type(value).__name__})"
    if isinstance(value, float) or value is None:
        return str(value)
    text = repr(value)
    return f"{text[:60]}{'…' * (len(text) > 60)} ({type(value).__name__})"


def _raised(name: str, task: Task, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
    return f"reward {name} raised {type(error).__name__} for task {task.id!r}{where}: {error}"


def _place(error: BaseException, path: Path) -> str:
    """`file:line` of the last line in the user's file that an import error came through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)
