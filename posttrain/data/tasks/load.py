"""Loads single-turn tasks: built-in problems, files, hub datasets and lists from Python."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from posttrain.config import DataConfig, nearest
from posttrain.data.messages import as_json, from_json
from posttrain.data.mixing import Mixture, parts_of
from posttrain.data.reading import read_source, unread_note
from posttrain.data.sources import (
    Row,
    content_key,
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
from posttrain.rng import key, permutation
from posttrain.types import ConfigError, DataError, Json, Message, Task

NUMBERS = ("addition", LARGE, CALLS)
"""Built-in tasks whose answer is a number, also for models other than abacus."""
PROGRAMS = (ONE_LINERS,)
"""Built-in tasks whose answer is a program, executed in the sandbox."""
BUILT_IN = (*GENERATORS, *NUMBERS, *PROGRAMS)
"""Names of built-in tasks for `data.tasks`, in addition to files and hub ids."""
PATIENCE = 1000
"""Draws in a row without a new problem after which a built-in task counts as exhausted."""
MOST_SOURCES = 20
"""Most values of a column `data_source` by which metrics are reported; a column with more is an id, not a source."""
HELD_OUT = 512
"""Maximum size of a built-in task's test split, which is the same for every seed, so that runs are comparable."""


@dataclass(frozen=True)
class TaskSets:
    """Training and test tasks; `notes` report what was left out, `hash` identifies the content.

    `shuffled`: the test tasks are in random order, so any first few are a fair sample of them.
    """

    train: list[Task]
    test: list[Task]
    notes: list[str]
    hash: str
    shuffled: bool = False


Needs = bool | Callable[[str], bool]
"""Whether rows need an answer, for all sources or by the source's name."""


def load_tasks(cfg: DataConfig, seed: int, given: Sequence[Task] | None = None, needs_answer: Needs = True) -> TaskSets:
    """Loads the tasks of `data.tasks`, or uses the `given` ones, and splits off or loads held-out tasks.

    A training task whose prompt is also in the evaluation set is dropped, so that the evaluation set stays complete.
    Raises ConfigError for an unknown name and DataError for unusable rows. `needs_answer=False` allows rows without an
    answer, for rewards that do not use it.
    """
    notes: list[str] = []
    shuffled = is_generated(cfg.eval_tasks) if cfg.eval_tasks else given is None and is_generated(cfg.tasks)
    test: list[Task] = []
    if given is not None:
        train = [_framed(task, cfg) for task in given]
        _require_distinct_ids(train)
    elif is_generated(cfg.tasks):
        train = [_framed(task, cfg) for task in _generated(cfg.tasks, cfg.generated, seed, "train", notes)]
    else:
        train, test = _sources(cfg, seed, needs_answer, notes)
    if not train:
        raise DataError(f"there are no tasks to train on (data.tasks={cfg.tasks!r}, data.count={cfg.count}).")
    if copies := duplicates([*train, *test]):
        notes.append(f"{copies} training tasks repeat the prompt of another task; they are kept.")
    if cfg.eval_tasks:
        test = _evaluation(cfg, needs_answer, notes)
    elif shuffled:
        test = [_framed(task, cfg) for task in _generated(cfg.tasks, HELD_OUT, 0, "test", [])]
    elif given is not None:
        train, test = split_holdout(train, cfg.holdout, seed)
    train, dropped = drop_leaks(train, test)
    if dropped:
        notes.append(f"{dropped} training tasks that are also in the evaluation set were dropped.")
    return TaskSets(train, test, notes, _hash(train, test), shuffled)


def load_evaluation(cfg: DataConfig, needs_answer: Needs = True) -> TaskSets:
    """Loads all tasks of `data.eval_tasks`, and none to train on. Raises as `load_tasks` does."""
    notes: list[str] = []
    test = _evaluation(cfg, needs_answer, notes)
    return TaskSets([], test, notes, _hash([], test), is_generated(cfg.eval_tasks))


def chosen(tasks: Sequence[Task], count: int, shuffled: bool = False) -> list[Task]:
    """`count` of the tasks (0: all), in their order: the first of shuffled ones, else drawn by the hash of the prompt.

    The draw does not depend on a run's seed or on the order of the tasks, so runs are evaluated on the same tasks, and
    a file that is sorted by subject gives some tasks of each.
    """
    if not count or count >= len(tasks):
        return list(tasks)
    if shuffled:
        return list(tasks[:count])
    ranked = sorted(range(len(tasks)), key=lambda i: key("chosen", content_key(tasks[i])))
    return [tasks[i] for i in sorted(ranked[:count])]


def is_generated(name: str) -> bool:
    """Whether `data.tasks` names generated problems only, of which any number can be drawn."""
    return all(part in BUILT_IN or part.startswith(reasoning_gym.PREFIX) for part, _ in parts_of(name))


def held_out(tasks: Sequence[Task], cfg: DataConfig, seed: int, shuffled: bool = True) -> TaskSets:
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
    return TaskSets(train, test, notes, _hash(train, test), shuffled)


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


def _hash(train: Sequence[Task], test: Sequence[Task]) -> str:
    return data_hash(Row(task.id, _as_values(task)) for task in (*train, *test))


def _framed(task: Task, cfg: DataConfig) -> Task:
    messages = with_system(f"task {task.id}", with_instruction(task.messages, cfg.instruction), cfg.system)
    return task if messages == task.messages else replace(task, messages=messages)


def _require_distinct_ids(tasks: Sequence[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.id in seen:
            raise DataError(f"two tasks have the id {task.id!r}. Ids must be unique, because they seed the sampling.")
        seen.add(task.id)


def _sources(cfg: DataConfig, seed: int, needs_answer: Needs, notes: list[str]) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks of a file, a hub dataset, or a mixture of them with generated tasks.

    Each file holds out its own share unless `data.eval_tasks` is given; a generated task has its test split.
    """
    train: list[Task] = []
    test: list[Task] = []
    share = 0.0 if cfg.eval_tasks else cfg.holdout
    for part, tasks in _by_source(cfg.tasks, cfg, seed, needs_answer, notes):
        if is_generated(part):
            train += tasks
            held = [] if cfg.eval_tasks else _generated(part, HELD_OUT, 0, "test", [])
            test += [replace(_framed(task, cfg), source=part) for task in held]
            continue
        try:
            kept, held = split_holdout(tasks, share, seed)
        except DataError as error:
            raise DataError(f"{part}: {error}") from None
        train += kept
        test += held
    return train, test


def _evaluation(cfg: DataConfig, needs_answer: Needs, notes: list[str]) -> list[Task]:
    """All tasks of `data.eval_tasks`: every row of a file, the test split of a built-in task."""
    if is_generated(cfg.eval_tasks):
        return [_framed(task, cfg) for task in _generated(cfg.eval_tasks, HELD_OUT, 0, "test", [])]
    parts = _by_source(cfg.eval_tasks, cfg, None, needs_answer, notes)
    return [task for _, tasks in parts for task in tasks]


def _by_source(
    names: str, cfg: DataConfig, seed: int | None, needs_answer: Needs, notes: list[str]
) -> list[tuple[str, list[Task]]]:
    """(source, its tasks) for each part of a mixture, with ids that differ between sources.

    A generated part gives its training problems for `seed`, or its test split for None.
    """
    parts = [part for part, _ in parts_of(names)]
    files = [Path(part).name for part in parts if is_file_name(part)]
    out: list[tuple[str, list[Task]]] = []
    for part in parts:
        if is_generated(part):
            made = (cfg.generated, seed, "train") if seed is not None else (HELD_OUT, 0, "test")
            tasks = [_framed(task, cfg) for task in _generated(part, *made, notes)]
        else:
            short = Path(part).name
            env = short if is_file_name(part) and files.count(short) == 1 else part
            tasks = _from_source(part, env, cfg, needs_answer, notes)
        out.append((part, [replace(task, source=part) for task in tasks] if len(parts) > 1 else tasks))
    if len(parts) > 1:
        _require_distinct_ids([task for _, tasks in out for task in tasks])
    return out


def _from_source(source: str, env: str, cfg: DataConfig, needs_answer: Needs, notes: list[str]) -> list[Task]:
    if not is_file_name(source) and not is_hub_id(source):
        raise ConfigError(f"unknown task {source!r}{nearest(source, [*BUILT_IN])} A file or owner/name works too.")
    rows = read_source(source, cfg, notes)
    if bfcl.is_bfcl(rows[0]):
        return usable(rows, bfcl.reader(source, cfg.system, cfg.instruction), cfg, notes)
    needed = needs_answer if isinstance(needs_answer, bool) else needs_answer(source)

    def parse(row: Row) -> Task:
        return row_to_task(row, env, cfg.system, cfg.instruction, needed)

    tasks = usable(rows, parse, cfg, notes)
    notes += unread_note(source, rows, lambda row: seen_of(parse(row)), others="rewards")
    named = {name for task in tasks if isinstance(name := task.meta.get("data_source"), str)}
    if not 1 < len(named) <= MOST_SOURCES:
        return tasks
    return [replace(task, source=str(task.meta.get("data_source", source))) for task in tasks]


def seen_of(task: Task) -> tuple[object, object]:
    """What training sees of a task beside rewards: its messages and its answer."""
    return task.messages, task.answer


def _generated(name: str, count: int, seed: int, split: Split, notes: list[str]) -> list[Task]:
    """`count` problems of a built-in task or of a mixture, interleaved by weight in a fixed order.

    A part with too few problems gives all it has, with a note, and the other parts are not increased.
    """
    parts = parts_of(name)
    mixture = Mixture([max(1, count)] * len(parts), [weight for _, weight in parts], 0)
    found: list[list[Task]] = []
    for (part, _), share in zip(parts, mixture.drawn(count), strict=True):
        found.append(_built_in(part, share, seed, split))
        if len(parts) > 1:
            found[-1] = [replace(task, source=part) for task in found[-1]]
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
