"""Runs a verifier again for its explanation, which a run does not store.

Only verifiers that read text are run: viewing a page must not start a reward that runs programs, loads models or calls
a judge. torch is imported when the first completion is judged.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TypedDict

from posttrain import config
from posttrain.store.run import EpisodeRow, Run
from posttrain.types import ConfigError, Task

EXECUTES = ("code", "z3", "lean")
"""Verifiers that run programs."""


class Regraded(TypedDict):
    """A verifier's result, the task's answer, and an error instead of a score if it could not be judged."""

    detail: str
    score: float | None
    passed: bool
    answer: str
    error: str | None


def judge_again(folder: Path, row: EpisodeRow) -> Regraded:
    """The verifier's current result for a stored completion.

    Raises ConfigError with the reason if the verifier cannot be run here.
    """
    from posttrain.rewards.auto import verifier_for
    from posttrain.rewards.combine import leaves_of
    from posttrain.rewards.functions import reward_from
    from posttrain.rewards.scoring import score_safely
    from posttrain.rewards.verifiers import VERIFIERS

    with Run.read(folder) as run:
        header = run.header
    name = str(header.get("recipe", {}).get("reward", {}).get("name", ""))
    if not name:
        raise _refused("its run has no reward")
    if "reward" in header.get("given", []):
        raise _refused("its reward was a Python function, which the run does not keep")
    if header["recipe"].get("env", {}).get("name"):
        raise _refused("it comes from an environment, which cannot be replayed from the text")
    used = {leaf.name for leaf in leaves_of(name)}
    if not used <= {"auto", *VERIFIERS}:
        raise _refused(f"the reward {name!r} runs code, loads a model or calls a judge")
    task = _tasks(folder, (folder / "run.json").stat().st_mtime_ns).get(row.task_id)
    if task is None:
        raise _refused(f"the run's tasks no longer contain {row.task_id!r}")
    if used & {*EXECUTES} or ("auto" in used and verifier_for(task) is VERIFIERS["code"]):
        raise _refused("its verifier runs programs, which viewing a page must not do")
    weights = header["recipe"]["reward"].get("weights", ())
    verdict, error = score_safely(reward_from(name, verifier_for, weights=weights), task, row.text)
    if verdict is None:
        return {"detail": "", "score": None, "passed": False, "answer": _shown(task), "error": error}
    return {
        "detail": verdict.detail,
        "score": verdict.score,
        "passed": verdict.passed,
        "answer": _shown(task),
        "error": None,
    }


def _refused(why: str) -> ConfigError:
    return ConfigError(f"This completion cannot be judged again here: {why}.")


def _shown(task: Task) -> str:
    return "" if task.answer is None else str(task.answer)


@lru_cache(maxsize=2)
def _tasks(folder: Path, stamp: int) -> dict[str, Task]:
    """A run's tasks by id; `stamp` changes if another run replaces the folder."""
    from posttrain.data.tasks.load import is_hub_id, load_tasks, read_tasks

    with Run.read(folder) as run:
        header = run.header
    recipe = config.stored(header["algorithm"], header["recipe"])
    if is_hub_id(recipe.data.tasks) or is_hub_id(recipe.data.eval_tasks):
        raise _refused(f"its tasks, {recipe.data.tasks!r}, are not on this machine")
    given = read_tasks(folder / "tasks.jsonl") if "tasks" in header.get("given", []) else None
    sets = load_tasks(recipe.data, recipe.run.seed, given, needs_answer=False)
    return {task.id: task for task in (*sets.test, *sets.train)}
