"""Loads single-turn tasks: built-in problems, files, hub datasets and lists from Python."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from posttrain.config import DataConfig, nearest
from posttrain.data.messages import as_json, from_json
from posttrain.data.mixing import Mixture, parse_mixture
from posttrain.data.row_messages import unused_note
from posttrain.data.sources import (
    Row,
    data_hash,
    drop_leaks,
    duplicates,
    is_file_name,
    is_hub_id,
    read_rows,
    row_to_task,
    split_holdout,
    usable,
    with_instruction,
    with_system,
)
from posttrain.data.tasks import bfcl, reasoning_gym
from posttrain.data.tasks.abacus import GENERATORS, HARMLESS, Problem, Split, stream
from posttrain.data.tasks.one_liners import ONE_LINERS, one_liners
from posttrain.data.tasks.products import CALLS, LARGE, calculator_calls, large_products
from posttrain.rng import permutation
from posttrain.types import ConfigError, DataError, Json, Message, Task

NUMBERS = ("addition", LARGE, CALLS)
"""Built-in tasks whose answer is a number, also for models other than abacus."""
PROGRAMS = (ONE_LINERS,)
"""Built-in tasks whose answer is a program, executed in the sandbox."""
BUILT_IN = (*GENERATORS, *NUMBERS, *PROGRAMS)
"""Names of built-in tasks for `data.tasks`, in addition to files and hub ids."""
PATIENCE = 1000
"""Draws in a row without a new problem after which a built-in task counts as exhausted."""
HELD_OUT = 512
"""Maximum size of a built-in task's test split, which is the same for every seed, so that runs are comparable."""


@dataclass(frozen=True)
class TaskSets:
    """Training and test tasks; `notes` report what was left out, `hash` identifies the content."""

    train: list[Task]
    test: list[Task]
    notes: list[str]
    hash: str


def load_tasks(cfg: DataConfig, seed: int, given: Sequence[Task] | None = None, needs_answer: bool = True) -> TaskSets:
    """Loads the tasks of `data.tasks`, or uses the `given` ones, and splits off or loads held-out tasks.

    A training task whose prompt is also in the evaluation set is dropped, so that the evaluation set stays complete.
    Raises ConfigError for an unknown name and DataError for unusable rows. `needs_answer=False` allows rows without an
    answer, for rewards that do not use it.
    """
    notes: list[str] = []
    if given is not None:
        train = [_framed(task, cfg) for task in given]
        _require_distinct_ids(train)
    elif is_generated(cfg.tasks):
        train = [_framed(task, cfg) for task in _generated(cfg.tasks, cfg.count, seed, "train", notes)]
    else:
        train = _from_source(cfg.tasks, cfg, needs_answer, notes)
    if not train:
        raise DataError(f"there are no tasks to train on (data.tasks={cfg.tasks!r}, data.count={cfg.count}).")
    if copies := duplicates(train):
        notes.append(f"{copies} training tasks repeat the prompt of another task; they are kept.")
    if is_generated(cfg.eval_tasks) or (not cfg.eval_tasks and given is None and is_generated(cfg.tasks)):
        test = [_framed(task, cfg) for task in _generated(cfg.eval_tasks or cfg.tasks, HELD_OUT, 0, "test", [])]
    elif cfg.eval_tasks:
        test = _from_source(cfg.eval_tasks, cfg, needs_answer, notes)
    else:
        train, test = split_holdout(train, cfg.holdout, seed)
    train, dropped = drop_leaks(train, test)
    if dropped:
        notes.append(f"{dropped} training tasks that are also in the evaluation set were dropped.")
    content = data_hash(Row(task.id, _as_values(task)) for task in (*train, *test))
    return TaskSets(train, test, notes, content)


def is_generated(name: str) -> bool:
    """Whether `data.tasks` names generated problems, of which any number can be drawn.

    A mixture, such as `arithmetic*2 + instructions + safety`, must consist of generated tasks only; otherwise raises
    ConfigError.
    """
    parts = [part for part, _ in _parts(name)]
    others = [part for part in parts if part not in BUILT_IN and not part.startswith(reasoning_gym.PREFIX)]
    if others and len(others) < len(parts):
        near = nearest(others[0], [*BUILT_IN])
        raise ConfigError(f"{name!r} mixes built-in tasks with {others[0]!r}{near} Only sft can mix in files.")
    return not others


def held_out(tasks: Sequence[Task], cfg: DataConfig, seed: int) -> TaskSets:
    """Splits an environment's own tasks; the share `data.holdout` is held out for evaluation.

    The prompt of such a task does not contain its hidden state, so tasks with equal prompts on both sides are counted,
    but kept.
    """
    tasks = [_framed(task, cfg) for task in tasks]
    _require_distinct_ids(tasks)
    cut = round(len(tasks) * cfg.holdout)
    order = [int(i) for i in permutation(len(tasks), seed)]
    test, train = ([tasks[i] for i in sorted(part)] for part in (order[:cut], order[cut:]))
    if not train:
        raise DataError(
            f"the environment has {len(tasks)} tasks, of which {cut} are held out, so none is left to train on. Give "
            "more tasks or lower data.holdout."
        )
    known = {(task.messages, repr(task.answer)) for task in test}
    same = sum((task.messages, repr(task.answer)) in known for task in train)
    notes = [f"{same} of {len(train)} training tasks are also among those held out."] if same else []
    return TaskSets(train, test, notes, data_hash(Row(task.id, _as_values(task)) for task in (*train, *test)))


def gold_reply(task: Task) -> str:
    """A reply with the gold answer; for a request, whose gold answer is `decline` or `help`, a reply that does so."""
    if task.meta.get("skill") in ("safety", "requests") and task.env in GENERATORS:
        if task.answer == "decline":
            return "Sorry, I can't help with that."
        return task.meta["reply"] if "reply" in task.meta else HARMLESS[task.meta["act"]]
    return str(task.answer)


def write_tasks(path: str | Path, tasks: Sequence[Task]) -> None:
    """Writes tasks as JSON Lines that `read_tasks` reads back unchanged. Raises DataError if JSON cannot hold one."""
    lines: list[str] = []
    for task in tasks:
        values = _as_values(task)
        try:
            line = json.dumps(values, ensure_ascii=False, allow_nan=False)
            line.encode("utf-8")
            same = json.loads(line) == values
        except (TypeError, ValueError) as error:
            raise DataError(f"task {task.id!r} cannot be written as JSON: {error}.") from None
        if not same:
            raise DataError(
                f"task {task.id!r} would not read back equal from JSON (it has a tuple, or keys that are not strings). "
                "Use lists and string keys in answer and meta."
            )
        lines.append(line + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")


def read_tasks(path: str | Path) -> list[Task]:
    """Reads tasks written by `write_tasks`. Raises DataError naming `file:line`."""
    tasks: list[Task] = []
    for row in read_rows(str(path)):
        v = row.values
        try:
            messages = tuple(from_json(m) for m in v["messages"])
            tasks.append(Task(v["id"], v["env"], messages, v["answer"], v["meta"]))
        except (KeyError, TypeError, DataError) as error:
            raise DataError(f"{row.where}: not a task written by write_tasks: {error}.") from None
    return tasks


def _as_values(task: Task) -> Json:
    messages = [as_json(m) for m in task.messages]
    return {"id": task.id, "env": task.env, "messages": messages, "answer": task.answer, "meta": dict(task.meta)}


def _framed(task: Task, cfg: DataConfig) -> Task:
    messages = with_system(f"task {task.id}", with_instruction(task.messages, cfg.instruction), cfg.system)
    return task if messages == task.messages else replace(task, messages=messages)


def _require_distinct_ids(tasks: Sequence[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise DataError(f"two tasks have the id {task.id!r}. Ids must be unique, because they seed the sampling.")
        seen.add(task.id)


def _from_source(source: str, cfg: DataConfig, needs_answer: bool, notes: list[str]) -> list[Task]:
    if not is_file_name(source) and not is_hub_id(source):
        raise ConfigError(f"unknown task {source!r}{nearest(source, [*BUILT_IN])} A file or owner/name works too.")
    env = Path(source).name if is_file_name(source) else source
    rows = read_rows(source, cfg.count)
    if bfcl.is_bfcl(rows[0]):
        return usable(rows, bfcl.reader(source, cfg.system, cfg.instruction), cfg, notes)
    notes += unused_note(source, rows, lambda values: {*values})
    return usable(rows, lambda row: row_to_task(row, env, cfg.system, cfg.instruction, needs_answer), cfg, notes)


def _parts(name: str) -> list[tuple[str, float]]:
    """The tasks of a mixture with their weights; any other name is a single part."""
    return parse_mixture(name) if " + " in name or "*" in name else [(name, 1.0)]


def _generated(name: str, count: int, seed: int, split: Split, notes: list[str]) -> list[Task]:
    """`count` problems of a built-in task or of a mixture, interleaved by weight in a fixed order.

    A part with too few problems gives all it has, with a note, and the other parts are not increased.
    """
    parts = _parts(name)
    mixture = Mixture([max(1, count)] * len(parts), [weight for _, weight in parts], 0)
    found: list[list[Task]] = []
    for (part, _), share in zip(parts, mixture.drawn(count), strict=True):
        found.append(_built_in(part, share, seed, split))
        if len(found[-1]) < share:
            notes.append(f"{part} has only {len(found[-1])} training problems; {share} were requested.")
    left = [iter(tasks) for tasks in found]
    turns = (next(left[source], None) for source, _ in mixture.draw(0, count))
    return [task for task in turns if task is not None]


def _built_in(name: str, count: int, seed: int, split: Split) -> list[Task]:
    if name.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.gym_tasks(name, count, seed, split)
    if name in (*NUMBERS, *PROGRAMS):
        made = {LARGE: large_products, CALLS: calculator_calls, ONE_LINERS: one_liners}.get(name, _addition)
        return made(count, seed, split)
    return [*_of_abacus(name, count, seed, split)]


@lru_cache(maxsize=16)
def _of_abacus(name: str, count: int, seed: int, split: Split) -> tuple[Task, ...]:
    """Problems of one kind; cached, because the stages of a pipeline use the same ones."""
    found: dict[str, Problem] = {}
    stale = 0
    for problem in stream(name, random.Random(f"{name}/{split}/{seed}"), split):
        if len(found) >= count or stale == PATIENCE:
            break
        stale = stale + 1 if problem.id in found else 0
        found.setdefault(problem.id, problem)
    return tuple(Task(p.id, name, (Message("user", p.prompt),), p.answer, p.meta) for p in found.values())


def _addition(count: int, seed: int, split: Split) -> list[Task]:
    """One-digit sums for pretrained models: 80 training and 20 held-out pairs; a + b and b + a on the same side."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    # Ten of the 45 unordered pairs of different digits give twenty questions.
    unordered = [(a, b) for a, b in pairs if a < b]
    held = {unordered[i] for i in permutation(len(unordered), "addition")[:10]}
    mine = [(a, b) for a, b in pairs if ((min(a, b), max(a, b)) in held) == (split == "test")]
    chosen = [mine[i] for i in permutation(len(mine), "addition", seed, split)[:count]]
    return [
        Task(
            f"addition:{a}+{b}", "addition", (Message("user", f"What is {a} + {b}?"),), str(a + b), {"numbers": [a, b]}
        )
        for a, b in chosen
    ]
