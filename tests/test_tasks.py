"""Task sets: built-in, from files and from Python; held out honestly, judged by their own verifier, kept in files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import DataConfig
from posttrain.data.sources import content_key
from posttrain.data.tasks.load import BUILT_IN, gold_reply, load_tasks, read_tasks, write_tasks
from posttrain.rewards.auto import validate, verifier_for
from posttrain.rewards.verifiers import exact, math, numeric
from posttrain.types import ConfigError, DataError, Message, Task, Verdict
from tests.conftest import shared


def auto(task: Task, text: str) -> Verdict:
    return verifier_for(task)(task, text)


def ask(text: str, answer: Any = "1", name: str = "") -> Task:
    return Task(name or f"mine:{text}", "mine", (Message("user", text),), answer)


def asked(tasks: Sequence[Task]) -> set[str]:
    return {content_key(t) for t in tasks}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_tasks_judge_themselves_and_hold_out_honestly(name: str) -> None:
    sets = load_tasks(DataConfig(tasks=name, count=60), seed=1)
    assert sets.train and sets.test and not asked(sets.train) & asked(sets.test)
    assert len({t.id for t in sets.train}) == len(sets.train)
    validate(sets.train + sets.test, auto)


def test_the_same_seed_gives_the_same_tasks_and_every_seed_the_same_test() -> None:
    first, again, other = (load_tasks(DataConfig(tasks="sums", count=50), seed) for seed in (3, 3, 4))
    assert first == again and first.hash == again.hash
    assert first.train != other.train and first.test == other.test and first.hash != other.hash


def test_a_built_in_task_with_too_few_problems_gives_all_and_says_so() -> None:
    sets = load_tasks(DataConfig(tasks="spell", count=4096), seed=0)
    assert len(sets.train) > 50
    assert sets.notes == [f"spell has only {len(sets.train)} training problems; 4096 were requested."]


def test_a_mixture_of_built_in_tasks_deals_by_weight_and_each_part_keeps_its_own_checker() -> None:
    sets = load_tasks(DataConfig(tasks="arithmetic*2 + instructions + safety", count=400), seed=1)
    assert Counter(task.env for task in sets.train) == {"arithmetic": 200, "instructions": 100, "safety": 100}
    assert sets == load_tasks(DataConfig(tasks="arithmetic*2 + instructions + safety", count=400), seed=1)
    assert not sets.notes and not asked(sets.train) & asked(sets.test)
    for part in (sets.train, sets.test):
        assert Counter(task.env for task in part[:8]) == {"arithmetic": 4, "instructions": 2, "safety": 2}
    validate(sets.train + sets.test, auto)
    alone = load_tasks(DataConfig(tasks="arithmetic", count=200), seed=1).train
    assert [task for task in sets.train if task.env == "arithmetic"] == alone


@given(st.integers(0, 60), st.lists(st.sampled_from([1, 2, 3, 0.5]), min_size=2, max_size=2))
def test_every_beginning_of_a_mixture_holds_each_part_to_within_one_task(count: int, weights: list[float]) -> None:
    spec = f"sums*{weights[0]} + products*{weights[1]}"
    train = load_tasks(DataConfig(tasks=spec, eval_tasks="refuse", count=max(1, count)), 0).train
    for end in range(len(train) + 1):
        assert abs(sum(t.env == "sums" for t in train[:end]) - end * weights[0] / sum(weights)) < 1


def test_a_part_of_a_mixture_that_runs_out_gives_all_it_has_and_the_others_go_on() -> None:
    sets = load_tasks(DataConfig(tasks="sums + addition", count=400), seed=0)
    assert Counter(task.env for task in sets.train) == {"sums": 200, "addition": 80}
    assert sets.notes == ["addition has only 80 training problems; 200 were requested."]


def test_a_mixture_with_a_part_that_is_not_built_in_names_the_part_and_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'safty'. Did you mean 'safety'\? A file or owner/name works"):
        load_tasks(DataConfig(tasks="sums*2 + safty"), 0)
    with pytest.raises(ConfigError, match="weight of sums is 0"):
        load_tasks(DataConfig(tasks="sums*0 + safety"), 0)


def test_addition_is_all_hundred_pairs_split_eighty_to_twenty() -> None:
    sets = load_tasks(DataConfig(tasks="addition"), seed=0)
    assert (len(sets.train), len(sets.test)) == (80, 20)
    assert len(asked(sets.train + sets.test)) == 100
    held = {tuple(t.meta["numbers"]) for t in sets.test}
    assert held == {(b, a) for a, b in held}
    task = sets.train[0]
    a, b = task.meta["numbers"]
    assert task.prompt == f"What is {a} + {b}?" and task.answer == str(a + b)
    assert auto(task, f"{a} + {b} = {a + b}.").passed


def test_system_and_instruction_frame_every_task() -> None:
    cfg = DataConfig(tasks="sums", count=3, system="Be brief.", instruction="Only the number.")
    for task in (sets := load_tasks(cfg, 0)).train + sets.test:
        assert task.messages[0] == Message("system", "Be brief.")
        assert task.prompt.endswith("?\n\nOnly the number.")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("additon", r"unknown task 'additon'. Did you mean 'addition'\?"),
        ("countdwn", r"Did you mean 'countdown'\?"),
        ("zzz", "unknown task 'zzz'; known: addition, "),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_tasks(DataConfig(tasks=name), 0)
    with pytest.raises(ConfigError, match=says):
        load_tasks(DataConfig(tasks="sums", eval_tasks=name, count=5), 0)


def test_no_tasks_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no tasks to train on"):
        load_tasks(DataConfig(), 0, given=[])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_file_is_held_out_by_content_and_its_copies_are_counted(tmp_path: Path) -> None:
    rows = [{"question": f"q{i % 40}", "answer": str(i % 40)} for i in range(50)]
    cfg = DataConfig(tasks=write_rows(tmp_path / "mine.jsonl", rows), holdout=0.25, count=0)
    sets = load_tasks(cfg, 0)
    assert len(sets.train) + len(sets.test) == 50 and len(asked(sets.test)) == 10
    assert not asked(sets.train) & asked(sets.test)
    assert sets.notes == ["10 training tasks repeat the prompt of another task; they are kept."]
    assert sets.train[0].id.startswith("mine.jsonl:") and sets.train[0].env == "mine.jsonl"
    assert len(load_tasks(DataConfig(tasks=cfg.tasks, count=7), 0).train) == 6


def test_a_question_in_both_files_leaves_training(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(5)])
    test = write_rows(tmp_path / "test.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(3, 9)])
    sets = load_tasks(DataConfig(tasks=train, eval_tasks=test), 0)
    assert (len(sets.train), len(sets.test)) == (3, 6)
    assert sets.notes == ["2 training tasks that are also in the evaluation set were dropped."]
    with pytest.raises(DataError, match="all 5 training prompts are also in the evaluation"):
        load_tasks(DataConfig(tasks=train, eval_tasks=train), 0)


def test_rows_without_answers_are_for_rewards_that_need_none(tmp_path: Path) -> None:
    cfg = DataConfig(tasks=write_rows(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), holdout=0.5)
    assert load_tasks(cfg, 0, needs_answer=False).train[0].answer is None
    with pytest.raises(DataError, match="a.jsonl:1: no column holds an answer"):
        load_tasks(cfg, 0)


def test_tasks_from_python_are_split_like_a_file() -> None:
    given = [ask(f"q{i}") for i in range(20)]
    sets = load_tasks(DataConfig(holdout=0.2), 0, given)
    assert (len(sets.train), len(sets.test)) == (16, 4)
    assert sorted(t.id for t in sets.train + sets.test) == sorted(t.id for t in given)
    with pytest.raises(DataError, match="two tasks have the id 'same'"):
        load_tasks(DataConfig(), 0, [ask("a", name="same"), ask("b", name="same")])


def test_gsm8k_trains_and_evaluates_on_its_own_splits() -> None:
    cfg = DataConfig(
        tasks=str(shared("data", "gsm8k", "train.jsonl")),
        eval_tasks=str(shared("data", "gsm8k", "test.jsonl")),
        count=0,
    )
    sets = load_tasks(cfg, 0)
    assert (len(sets.train), len(sets.test)) == (7473, 1319)
    validate(sets.train + sets.test, auto)


@pytest.mark.parametrize(
    ("answer", "verifier"), [("72", math), (4.5, math), (r"\frac{1}{2}", math), ("Paris", exact), ("B", exact)]
)
def test_auto_reads_numbers_and_formulas_as_mathematics_and_words_as_words(answer: Any, verifier: Any) -> None:
    assert verifier_for(ask("q", answer)) is verifier


def test_auto_uses_the_skill_checkers_only_for_real_abacus_problems() -> None:
    assert verifier_for(Task("sums:1", "sums", (Message("user", "q"),), "5")) is math
    assert verifier_for(load_tasks(DataConfig(tasks="addition"), 0).train[0]) is numeric


def test_tasks_that_cannot_be_judged_are_listed_before_training() -> None:
    good = [ask("a", "72"), ask("b", "Paris")]
    validate(good, auto)
    bad = [ask(f"x{i}", "<think>never closed") for i in range(25)]
    with pytest.raises(DataError) as caught:
        validate(good + bad, auto)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[0].startswith("mine:x0: its gold answer '<think>never closed' does not pass")
    assert lines[-1].startswith("25 of 27 tasks cannot be used (the first 20 are shown).")
    with pytest.raises(DataError, match="mine:a: an empty reply passes"):
        validate(good, lambda task, text: Verdict(1.0, True))
    with pytest.raises(DataError, match="mine:n: its gold answer 'None' does not pass .*has no gold answer"):
        validate([ask("n", None)], auto)


def test_safety_problems_have_a_gold_reply_in_words() -> None:
    sets = load_tasks(DataConfig(tasks="safety", count=20), 0)
    assert all(gold_reply(t) not in ("decline", "help") and auto(t, gold_reply(t)).passed for t in sets.train)


plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé\n🙂"{'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), st.text("aé\r\n🙂 ")), max_size=3
).map(lambda found: (*found, Message("user", "q")))


@given(st.lists(st.tuples(messages, plain_json, st.dictionaries(st.text("ab"), plain_json, max_size=2)), min_size=1))
def test_written_tasks_come_back_equal(tmp_path_factory: pytest.TempPathFactory, contents: list[Any]) -> None:
    tasks = [Task(f"t:{i}", "e", m, answer, meta) for i, (m, answer, meta) in enumerate(contents)]
    path = tmp_path_factory.getbasetemp() / "tasks.jsonl"
    write_tasks(path, tasks)
    assert read_tasks(path) == tasks


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((1, 2), "'mine:q' would not read back equal"),
        ({1: 2}, "'mine:q' would not read back equal"),
        (float("nan"), "'mine:q' cannot be written as JSON"),
        (object(), "'mine:q' cannot be written as JSON"),
        ("\ud800", "'mine:q' cannot be written as JSON"),
    ],
)
def test_tasks_that_json_would_change_are_not_written(tmp_path: Path, answer: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        write_tasks(tmp_path / "t.jsonl", [ask("q", answer)])
    assert not (tmp_path / "t.jsonl").exists()


def test_a_file_that_is_not_written_tasks_is_refused_by_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"question": "q", "answer": "1"}])
    with pytest.raises(DataError, match="t.jsonl:1: not a task written by write_tasks: 'messages'"):
        read_tasks(path)
