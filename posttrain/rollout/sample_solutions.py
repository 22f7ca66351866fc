"""Solutions with labelled steps: read from a file, or sampled from the model and labelled by completing them.

The label of a sampled step is the share of completions from there that reach a right answer (Math-Shepherd, arXiv
2312.08935, section 3.3): an estimate of its value under the model that completes, not of its correctness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from posttrain.config.prm import PRMConfig
from posttrain.data.chat import ChatFormat
from posttrain.data.files import writable
from posttrain.data.preferences import (
    STEP_COLUMNS,
    read_solutions,
    row_to_judgement,
    row_to_outcome,
    row_to_solution,
    write_solutions,
)
from posttrain.data.sources import (
    Row,
    content_key,
    data_hash,
    is_file_name,
    is_hub_id,
    read_rows,
    split_by_key,
    usable,
)
from posttrain.data.steps import split_steps, step_ends
from posttrain.data.tasks.load import BUILT_IN
from posttrain.rewards.functions import score_all
from posttrain.rollout.build import Setup, judged_tasks, make_collector, opened
from posttrain.rollout.collector import Collector
from posttrain.rollout.generator import Request, attempt_seed
from posttrain.store import samples as sampled
from posttrain.types import DataError, Message, Solution, Task

TRAIN_FILE, TEST_FILE = "solutions.jsonl", "held-out-solutions.jsonl"
"""Where a run folder keeps the solutions it sampled."""


@dataclass(frozen=True)
class Graded:
    """A whole solution, of which the first `known` steps have labels, and whether its final answer is right."""

    solution: Solution
    known: int
    right: bool


@dataclass(frozen=True)
class SolutionSets:
    """Solutions to learn from and held-out ones; `notes` say what was left out, `hash` names the content."""

    train: list[Graded]
    test: list[Graded]
    notes: list[str]
    hash: str


def load_solutions(setup: Setup) -> SolutionSets:
    """The solutions of a recipe with sections data, algo (config/prm.py), reward, rollout and eval.

    `data.tasks` names a file or hub set of solutions, or tasks: then the starting model solves each and its steps are
    labelled by rollouts. Those are kept in the run folder, so that a resumed run reads what it started with. Raises
    DataError where no solution is left.
    """
    cfg = setup.recipe.data
    if setup.given is None and cfg.tasks not in BUILT_IN and (is_file_name(cfg.tasks) or is_hub_id(cfg.tasks)):
        first = read_rows(cfg.tasks, 1)[0].values
        if any(first.get(column) is not None for column in STEP_COLUMNS) or "label" in first:
            return _from_rows(setup)
    return _sampled(setup)


def graded(row: Row, cfg: PRMConfig, system: str = "", instruction: str = "") -> Graded:
    """The solution a row describes; for `outcome` its steps joined into one whose label is the outcome.

    Where a row does not say whether its final answer is right, it is taken to be where no step is labelled wrong.
    """
    steps = any(row.values.get(column) is not None for column in STEP_COLUMNS)
    says = "final_answer_correct" in row.values or {"answer", "target"} <= row.values.keys()
    if cfg.level == "outcome" and (says or not steps):
        found = row_to_outcome(row, system, instruction, cfg.separator) if steps else row_to_judgement(row)
        label = float(found.desirable)
        return Graded(Solution(found.id, found.prompt, (found.answer,), (label,)), 1, found.desirable)
    whole = row_to_solution(row, system, instruction, "wrong")
    known = len(row_to_solution(row, system, instruction, cfg.after_mistake).steps)
    right = row_to_outcome(row).desirable if says else min(whole.labels) >= 0.5
    if cfg.level == "outcome":
        whole = Solution(whole.id, whole.prompt, (cfg.separator.join(whole.steps),), (float(right),))
        known = 1
    return Graded(whole, known, right)


def _from_rows(setup: Setup) -> SolutionSets:
    cfg, algo = setup.recipe.data, setup.recipe.algo
    rows = read_rows(cfg.tasks, cfg.count)
    held = read_rows(cfg.eval_tasks, cfg.count) if cfg.eval_tasks else []
    notes: list[str] = []
    train, test = (
        usable(part, lambda row: graded(row, algo, cfg.system, cfg.instruction), cfg, notes) for part in (rows, held)
    )
    if held:
        asked = {content_key(one.solution) for one in test}
        kept = [one for one in train if content_key(one.solution) not in asked]
        notes.append(
            f"{len(train) - len(kept)} training solutions whose prompt {cfg.eval_tasks} also has were dropped."
        )
        train = kept
    else:
        names = [content_key(one.solution) for one in train]
        train, test = split_by_key(train, names, cfg.holdout, setup.recipe.run.seed)
    if not train:
        raise DataError(f"{cfg.tasks}: no solution is left to train on after holding out {len(test)}.")
    inside = sum(algo.separator in step for one in train for step in one.solution.steps) * (algo.level == "step")
    if inside:
        notes.append(
            f"{inside} labelled steps hold algo.separator={algo.separator!r} themselves; an answer that is scored "
            "later is cut there, too."
        )
    notes.append(f"{len(train)} solutions to train on, {len(test)} held out.")
    return SolutionSets(train, test, notes, data_hash([*rows, *held]))


def _sampled(setup: Setup) -> SolutionSets:
    """Solutions of the starting model, read back where this run has sampled them before."""
    recipe, folder = setup.recipe, setup.folder
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    notes = list(sets.notes)
    if kept := sampled.read(folder, (TRAIN_FILE, TEST_FILE), read_solutions):
        train, test = kept
    else:
        collector = make_collector(setup.policy, setup.chat, verify, recipe)
        found: list[list[Solution]] = []
        for name, tasks in (("training", sets.train), ("held-out", sets.test)):
            solutions, answers = sample_solutions(collector, setup.chat, tasks, recipe.algo)
            found.append(solutions)
            steps = sum(len(one.steps) for one in solutions)
            notes.append(
                f"{len(solutions)} {name} solutions with {steps} labelled steps, of {answers} sampled; the others have "
                "one step only, repeat another, were cut, are not text or could not be scored."
            )
        train, test = found
        if not train:
            raise DataError(
                f"no sampled answer to {recipe.data.tasks} has two steps or more (algo.separator="
                f"{recipe.algo.separator!r}). Set the separator this model writes, or algo.opening."
            )
        sampled.keep(folder, (TRAIN_FILE, TEST_FILE), train, test, write_solutions)
    content = data_hash(Row(one.id, asdict(one)) for one in (*train, *test))
    whole = data_hash([Row("", {"tasks": sets.hash, "solutions": content})])
    learn, hold = ([Graded(one, len(one.steps), one.labels[-1] >= 0.5) for one in part] for part in (train, test))
    return SolutionSets(learn, hold, notes, whole)


def sample_solutions(
    collector: Collector, chat: ChatFormat, tasks: Sequence[Task], cfg: PRMConfig
) -> tuple[list[Solution], int]:
    """Labelled solutions of the generator's model to each task, and how many answers were sampled for them.

    An answer's last step is labelled by the answer itself; every other step by `cfg.completions` completions.
    """
    solve = opened(collector, chat, cfg.opening)
    requests = [Request(solve.encode(task), _seeds(collector, "solve", task.id, cfg.solutions)) for task in tasks]
    groups = collector.generator.generate(requests, collector.params)
    answers = [
        (task, solve.decode(c.tokens[:-1]))
        for task, group in zip(tasks, groups, strict=True)
        for c in group
        if c.stop == "stop"
    ]
    distinct = list({(task.id, text): (task, text) for task, text in answers}.values())
    right = [verdict and verdict.passed for verdict, _ in score_all(collector.verify, distinct)]
    kept = [
        (f"{task.id}#{n}", task, [text] if cfg.level == "outcome" else split_steps(text, cfg.separator), bool(passed))
        for n, ((task, text), passed) in enumerate(zip(distinct, right, strict=True))
        if passed is not None
        and writable(text)
        and (cfg.level == "outcome" or len(split_steps(text, cfg.separator)) > 1)
    ]
    values = step_values(collector, chat, [(name, task, steps) for name, task, steps, _ in kept], cfg)
    solutions = [
        Solution(name, task.messages, tuple(steps), (*labels, float(passed)))
        for (name, task, steps, passed), labels in zip(kept, values, strict=True)
    ]
    return solutions, len(tasks) * cfg.solutions


def step_values(
    collector: Collector, chat: ChatFormat, solutions: Sequence[tuple[str, Task, list[str]]], cfg: PRMConfig
) -> list[list[float]]:
    """Labels of every step but the last of each (id, task, steps), estimated by completing the answer from there.

    A completion that cannot be scored is no success.
    """
    requests: list[Request] = []
    beginnings: list[tuple[Task, np.ndarray]] = []  # the part of the answer that a request continues
    for name, task, steps in solutions:
        prompt = len(chat.prompt_tokens(task.messages))
        for i, prefix in enumerate(_prefixes(chat, task, steps, cfg.separator)):
            requests.append(Request(prefix, _seeds(collector, "complete", f"{name}/{i}", cfg.completions)))
            beginnings.append((task, prefix[prompt:]))
    groups = collector.generator.generate(requests, collector.params)
    pairs = [
        (task, collector.decode(np.concatenate([begun, c.tokens[:-1] if c.stop == "stop" else c.tokens])))
        for (task, begun), group in zip(beginnings, groups, strict=True)
        for c in group
    ]
    passed = [verdict is not None and verdict.passed for verdict, _ in score_all(collector.verify, pairs)]
    shares = np.array(passed, float).reshape(-1, cfg.completions).mean(1)
    values = iter((shares > 0 if cfg.labels == "hard" else shares).tolist())
    return [[float(next(values)) for _ in steps[1:]] for _, _, steps in solutions]


def _prefixes(chat: ChatFormat, task: Task, steps: list[str], separator: str) -> list[np.ndarray]:
    """The conversation's ids up to each step but the last, with the separator after it where no token straddles."""
    ends = step_ends(steps, separator)[:-1]
    starts = np.cumsum([len(step) + len(separator) for step in steps])[:-1]
    message = Message("assistant", separator.join(steps))
    tokens, begun, ended = chat.answer_marks([*task.messages, message], [*ends, *map(int, starts)])
    return [tokens[:cut] for cut in np.maximum(begun[: len(ends)], ended[len(ends) :])]


def _seeds(collector: Collector, purpose: str, name: str, count: int) -> tuple[int, ...]:
    return tuple(attempt_seed(collector.seed, purpose, 0, name, i) for i in range(count))
