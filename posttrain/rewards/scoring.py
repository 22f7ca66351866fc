"""Scores completions with verifiers; what fails becomes an error message, never a number."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.rewards.judging import BatchVerifier, Verifier
from posttrain.types import ConfigError, RolloutError, Task, Verdict

RAISED = (Exception, SystemExit, asyncio.CancelledError)
"""What a reward may raise to leave a completion unscored: all but Ctrl-C. `sys.exit` must not end the run as if it had
finished, nor stop the event loop of asynchronous rewards."""


class CannotScore(ConfigError):
    """A verifier that can score nothing, whatever the completion. It ends the run."""


def scores_groups(verify: Verifier) -> bool:
    """Whether a verifier compares the completions of a group with each other."""
    return bool(getattr(verify, "by_group", False))


def score_safely(verify: Verifier, task: Task, text: str) -> tuple[Verdict | None, str | None]:
    """Scores one completion: (verdict, None), or (None, error message). Propagates KeyboardInterrupt and CannotScore.

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
            f"reward {name_of(verify)} sets a signal handler (for a time limit?), which works in the main thread only. "
            "Set rollout.reward_workers = 0 and leave algo.ahead at 0, or limit its time in another way."
        )
    return result


def _score(verify: Verifier, task: Task, text: str) -> tuple[Verdict | None, str | None]:
    try:
        verdict = verify(task, text)
    except CannotScore:
        raise
    except RolloutError as error:
        return None, str(error)
    except RAISED as error:  # it must neither become a number nor end the run
        return None, error_text(name_of(verify), task, error)
    if not isinstance(verdict, Verdict):
        return None, f"{name_of(verify)} returned {describe(verdict)} for task {task.id!r}, expected a Verdict."
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


def score_groups(
    verify: Verifier, groups: Sequence[Sequence[tuple[Task, str]]]
) -> list[tuple[Verdict | None, str | None]]:
    """`score_all` for all pairs of all groups, in order; group by group if the verifier compares completions."""
    if scores_groups(verify):
        return [result for group in groups for result in score_all(verify, group)]
    return score_all(verify, [pair for group in groups for pair in group])


def name_of(function: Any) -> str:
    """The name of a function, or of an object's class."""
    return getattr(function, "__name__", type(function).__name__)


def describe(value: Any) -> str:
    """A short description of a value for an error message."""
    size = getattr(value, "shape", None)
    if isinstance(value, list | tuple | set | dict) or size is not None:
        count = math.prod(size) if size is not None else len(value)
        return f"{count} value{'s' * (count != 1)} ({type(value).__name__})"
    if isinstance(value, float) or value is None:
        return str(value)
    text = repr(value)
    return f"{text[:60]}{'…' * (len(text) > 60)} ({type(value).__name__})"


def error_text(name: str, task: Task, error: BaseException) -> str:
    """What a reward raised, with the line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else ""
    text = " ".join(str(error).split()).rstrip(".")
    return f"reward {name} raised {type(error).__name__} for task {task.id!r}{where}{text and f': {text}'}."
