"""Loads labelled solutions: from a file or hub dataset, or sampled from the model and labelled with rollouts.

The label of a sampled step is the share of completions from there that reach a correct answer (Math-Shepherd, arXiv
2312.08935, section 3.3), which estimates the value of the step under the completing model, not its correctness. Or the
first mistake of a wrong solution is found by binary search (OmegaPRM, arXiv 2406.06592, section 3.2), or a program
checks the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from posttrain.config.prm import Labels, PRMConfig, PRMRecipe
from posttrain.data.chat import ChatFormat
from posttrain.data.files import writable
from posttrain.data.messages import without_prefill
from posttrain.data.pairs import stored_rows
from posttrain.data.preferences import (
    read_solutions,
    write_solutions,
)
from posttrain.data.solutions import Graded, SolutionSets, has_solutions, read_solution_sets
from posttrain.data.sources import Row, data_hash
from posttrain.data.steps import split_steps, step_ends
from posttrain.data.tasks.load import TaskSets
from posttrain.rewards.scoring import score_all
from posttrain.rewards.step_checks import first_mistake, has_check
from posttrain.rollout.build import make_collector, with_opening
from posttrain.rollout.collector import Collector
from posttrain.rollout.generator import Request, completion_seed
from posttrain.rollout.tasks import judged_tasks
from posttrain.store import samples as sampled
from posttrain.train.job import Setup
from posttrain.types import DataError, Message, Solution, Task

TRAIN_FILE, TEST_FILE = "solutions.jsonl", "held-out-solutions.jsonl"
"""Files in the run folder with the sampled solutions."""


def load_solutions(setup: Setup[PRMRecipe]) -> SolutionSets:
    """Loads the solutions of a recipe with sections data, algo (config/prm.py), reward, rollout and eval.

    `data.tasks` names a file or hub dataset of solutions, or tasks. For tasks, the starting model samples solutions and
    their steps are labelled with rollouts; both are saved in the run folder for resuming. Raises DataError if there are
    no solutions.
    """
    cfg = setup.recipe.data
    notes: list[str] = []
    rows = stored_rows(cfg, notes) if setup.given is None else []
    if rows and has_solutions(rows):
        if setup.recipe.algo.held_out_labels:
            raise DataError(
                f"algo.held_out_labels={setup.recipe.algo.held_out_labels!r} has no effect, because {cfg.tasks} has "
                "labelled solutions. Leave it empty; data.eval_tasks can name a file of held-out solutions."
            )
        sets = read_solution_sets(rows, cfg, setup.recipe.algo, setup.recipe.run.seed)
        return replace(sets, notes=[*notes, *sets.notes])
    return _sampled(setup)


def _sampled(setup: Setup[PRMRecipe]) -> SolutionSets:
    """Solutions of the starting model; read from the run folder if this run has sampled them before."""
    recipe, folder = setup.recipe, setup.folder
    sets, verify = judged_tasks(recipe, setup.chat, setup.given, setup.reward)
    notes = list(sets.notes)
    _require_checks(recipe.algo, sets)
    if kept := sampled.read(folder, (TRAIN_FILE, TEST_FILE), read_solutions):
        train, test = kept
    else:
        collector = make_collector(setup.policy, setup.chat, verify, recipe, workers=setup.workers)
        parts: list[list[Solution]] = []
        for name, tasks in (("training", sets.train), ("held-out", sets.test)):
            algo = recipe.algo
            if name == "held-out" and algo.held_out_labels:
                algo = replace(algo, labels=algo.held_out_labels)
            solutions, answers = sample_solutions(collector, setup.chat, tasks, algo)
            parts.append(solutions)
            steps = sum(len(one.steps) for one in solutions)
            notes.append(
                f"{len(solutions)} {name} solutions with {steps} labelled steps, of {answers} sampled; the others have "
                "one step only, repeat another, were cut, are not text or could not be scored."
            )
        train, test = parts
        if not train:
            raise DataError(
                f"no sampled answer to {recipe.data.tasks} has two steps or more (algo.separator="
                f"{recipe.algo.separator!r}). Set the separator this model writes, or algo.opening."
            )
        sampled.keep(folder, (TRAIN_FILE, TEST_FILE), train, test, write_solutions)
    content = data_hash(Row(one.id, asdict(one)) for one in (*train, *test))
    whole = data_hash([Row("", {"tasks": sets.hash, "solutions": content})])
    learn = [graded_sample(one, recipe.algo, recipe.algo.labels) for one in train]
    hold = [graded_sample(one, recipe.algo, recipe.algo.held_out_labels or recipe.algo.labels) for one in test]
    return SolutionSets(learn, hold, notes, whole)


def graded_sample(one: Solution, cfg: PRMConfig, labels: Labels) -> Graded:
    """A sampled solution; labels that mark a first mistake say nothing about the steps after it."""
    known = len(one.steps)
    if labels in ("first-mistake", "program") and cfg.after_mistake == "drop" and 0.0 in one.labels:
        known = one.labels.index(0.0) + 1
    return Graded(one, known, one.labels[-1] >= 0.5)


def _require_checks(cfg: PRMConfig, sets: TaskSets) -> None:
    """Raises DataError if labels are to come from the step-checking program and a task has no step check."""
    parts = {"labels": sets.train, "held_out_labels": sets.test}
    wanted = {name: getattr(cfg, name) or cfg.labels for name in parts}
    unknown = [t for name, tasks in parts.items() if wanted[name] == "program" for t in tasks if not has_check(t)]
    if unknown:
        names = ", ".join(f"algo.{name}" for name, value in wanted.items() if value == "program")
        raise DataError(
            f"{names} = 'program' needs tasks whose steps a program can check: built-in sums, products and countdowns. "
            f"{len(unknown)} tasks are others, such as {unknown[0].id!r}. Set it to 'first-mistake'."
        )


def sample_solutions(
    collector: Collector, chat: ChatFormat, tasks: Sequence[Task], cfg: PRMConfig
) -> tuple[list[Solution], int]:
    """Samples and labels solutions to each task; also returns how many completions were sampled.

    The last step is labelled with the verdict on the solution, every other step as `cfg.labels` says.
    """
    solve = with_opening(collector, chat, cfg.opening)
    requests = [Request(solve.encode(task), _seeds(collector, "solve", task.id, cfg.solutions)) for task in tasks]
    groups = collector.generator.generate(requests, collector.params)
    answers = [
        (task, solve.text(task, c))
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
    if cfg.labels == "first-mistake":
        values = first_mistakes(collector, chat, kept, cfg)
    elif cfg.labels == "program":
        values = [checked_steps(task, steps, cfg.separator)[:-1] for _, task, steps, _ in kept]
    else:
        values = step_values(collector, chat, [(name, task, steps) for name, task, steps, _ in kept], cfg)
    solutions = [
        Solution(name, without_prefill(task.messages), tuple(steps), (*labels, float(passed)))
        for (name, task, steps, passed), labels in zip(kept, values, strict=True)
    ]
    return solutions, len(tasks) * cfg.solutions


def step_values(
    collector: Collector, chat: ChatFormat, solutions: Sequence[tuple[str, Task, list[str]]], cfg: PRMConfig
) -> list[list[float]]:
    """Labels of all steps but the last of each (id, task, steps), estimated by completing the solution from there."""
    cuts = [
        (f"{name}/{i}", task, prefix)
        for name, task, steps in solutions
        for i, prefix in enumerate(_prefixes(chat, task, steps, cfg.separator))
    ]
    shares = np.array(shares_right(collector, chat, cuts, cfg.completions))
    values = iter((shares > 0 if cfg.labels == "hard" else shares).tolist())
    return [[float(next(values)) for _ in steps[1:]] for _, _, steps in solutions]


def first_mistakes(
    collector: Collector, chat: ChatFormat, solutions: Sequence[tuple[str, Task, list[str], bool]], cfg: PRMConfig
) -> list[list[float]]:
    """Labels of all steps but the last of each (id, task, steps, right): 1 before the first mistake, then 0.

    A right solution has no mistake. In a wrong one, a step is before the first mistake if any of `cfg.completions`
    completions from there is right; binary search completes only about log2(steps) of its steps.
    """
    prefixes = [[] if right else _prefixes(chat, task, steps, cfg.separator) for _, task, steps, right in solutions]
    good = [len(steps) if right else 0 for _, _, steps, right in solutions]  # steps known to be before the mistake
    bad = [len(steps) + right for _, _, steps, right in solutions]  # the first known to be at or after it, from 1
    while asked := [(n, (good[n] + bad[n]) // 2) for n in range(len(solutions)) if bad[n] - good[n] > 1]:
        cuts = [(f"{solutions[n][0]}/{at - 1}", solutions[n][1], prefixes[n][at - 1]) for n, at in asked]
        for (n, at), share in zip(asked, shares_right(collector, chat, cuts, cfg.completions), strict=True):
            (good if share > 0 else bad)[n] = at
    return [[float(i < good[n]) for i in range(len(steps) - 1)] for n, (_, _, steps, _) in enumerate(solutions)]


def checked_steps(task: Task, steps: Sequence[str], separator: str) -> list[float]:
    """1 for each step before the first mistake that the step-checking program finds, then 0."""
    wrong = first_mistake(task, separator.join(steps))
    return [float(wrong is None or end < wrong) for end in step_ends(steps, separator)]


def shares_right(
    collector: Collector, chat: ChatFormat, cuts: Sequence[tuple[str, Task, np.ndarray]], count: int
) -> list[float]:
    """The share of `count` completions that end right, for each (name, task, token ids to continue).

    The name seeds the sampling. A completion that cannot be scored counts as wrong.
    """
    requests = [Request(prefix, _seeds(collector, "complete", name, count)) for name, _, prefix in cuts]
    groups = collector.generator.generate(requests, collector.params)
    pairs = [
        (task, collector.text(task, c, begun))
        for (_, task, prefix), group in zip(cuts, groups, strict=True)
        for begun in [prefix[len(chat.prompt_tokens(task.messages)) :]]
        for c in group
    ]
    passed = [verdict is not None and verdict.passed for verdict, _ in score_all(collector.verify, pairs)]
    return np.array(passed, float).reshape(-1, count).mean(1).tolist()


def _prefixes(chat: ChatFormat, task: Task, steps: list[str], separator: str) -> list[np.ndarray]:
    """Token ids up to the end of each step but the last, including the separator if no token crosses its end."""
    ends = step_ends(steps, separator)[:-1]
    starts = np.cumsum([len(step) + len(separator) for step in steps])[:-1]
    message = Message("assistant", separator.join(steps))
    tokens, begun, ended = chat.answer_marks([*without_prefill(task.messages), message], [*ends, *map(int, starts)])
    return [tokens[:cut] for cut in np.maximum(begun[: len(ends)], ended[len(ends) :])]


def _seeds(collector: Collector, purpose: str, name: str, count: int) -> tuple[int, ...]:
    return tuple(completion_seed(collector.seed, purpose, 0, name, i) for i in range(count))
