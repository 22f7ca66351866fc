"""Which rows of a user's files are used: all of them, in which order, in which shares, and which are evaluated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import posttrain as pt
from posttrain import api, config, rng
from posttrain.cli.main import main
from posttrain.config import DataConfig, EvalRecipe
from posttrain.data.chat import ChatFormat
from posttrain.data.conversations import fit_prompts, load_conversations
from posttrain.data.lengths import prompt_lengths
from posttrain.data.mixing import Mixture, task_order
from posttrain.data.pairs import read_compared, stored_rows
from posttrain.data.preferences import row_to_preference
from posttrain.data.reading import evaluation_settings, read_source, unread_columns
from posttrain.data.sources import Row, row_to_conversation, row_to_task
from posttrain.data.tasks.load import TaskSets, chosen, load_evaluation, load_tasks
from posttrain.models.weights import ABACUS
from posttrain.rollout.tasks import judged_tasks
from posttrain.store.run import Run
from posttrain.types import ConfigError, DataError, Message, Task


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(AutoTokenizer.from_pretrained(ABACUS))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int, plus: int = 1, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"What is {i}+{plus}?", "answer": str(i + plus), **more} for i in range(count)]


def tasks(count: int, name: str = "f", source: str = "") -> list[Task]:
    return [Task(f"{name}:{i}", name, (Message("user", f"{name} {i}"),), "1", source=source) for i in range(count)]


# --- all rows ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_whole_by_every_algorithm(tmp_path: Path, chat: ChatFormat) -> None:
    questions = write(tmp_path / "q.jsonl", sums(4500))
    pairs = write(
        tmp_path / "p.jsonl",
        [{"prompt": row["question"], "chosen": row["answer"], "rejected": "no"} for row in sums(4500)],
    )
    sets = load_tasks(DataConfig(tasks=questions), 0)
    assert len(sets.train) + len(sets.test) == 4500 and sets.notes == []
    shown = load_conversations(DataConfig(tasks=questions), 0)
    assert len(shown.train) + len(shown.test) == 4500
    cfg, notes = DataConfig(tasks=pairs), list[str]()
    train, test, *_ = read_compared(stored_rows(cfg, notes), cfg, 0, chat, row_to_preference, "pairs")
    assert len(train) + len(test) == 4500 and not notes


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_maximum_is_kept_and_says_how_many_rows_were_not_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    rows = sums(10)
    text = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".json": json.dumps(rows),
        ".csv": "question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows),
    }[suffix]
    path.write_text(text)
    notes: list[str] = []
    assert [r.values["answer"] for r in read_source(str(path), DataConfig(count=3), notes)] == ["1", "2", "3"]
    assert notes == [f"{path}: the first 3 of 10 rows were read (data.count=3; 0 reads all)."]
    for count in (0, 10, 11):
        assert len(read_source(str(path), DataConfig(count=count), again := [])) == 10 and not again


def test_a_built_in_task_still_generates_4096_problems_unless_told_otherwise() -> None:
    assert len(load_tasks(DataConfig(tasks="sums"), 0).train) == 4096
    assert len(load_tasks(DataConfig(tasks="sums", count=7), 0).train) == 7


def test_a_run_folder_of_before_reads_as_many_rows_as_it_did(tmp_path: Path) -> None:
    old = config.as_dict(config.resolve("grpo", {}, {"data.tasks": write(tmp_path / "a.jsonl", sums(5000))}))
    old["data"]["count"] = 4096  # the default of before
    del old["data"]["shuffle"]
    sets = load_tasks(config.stored("grpo", old).data, 0)
    assert len(sets.train) + len(sets.test) == 4096 and "4096 of 5000" in sets.notes[0]


# --- which are evaluated ----------------------------------------------------------------------------------------------


@given(st.permutations(range(40)), st.integers(0, 45))
def test_a_subset_is_drawn_by_content_and_kept_in_order(order: list[int], count: int) -> None:
    whole = tasks(40)
    found = chosen([whole[i] for i in order], count)
    assert len(found) == (min(count, 40) or 40)
    assert {t.id for t in found} == {t.id for t in chosen(whole, count)}
    assert [order.index(int(t.id[2:])) for t in found] == sorted(order.index(int(t.id[2:])) for t in found)


def test_a_sorted_file_gives_some_of_each_part_and_built_in_tasks_their_first(tmp_path: Path) -> None:
    rows = sums(300, 1) + sums(300, 100)
    found = chosen(load_evaluation(DataConfig(eval_tasks=write(tmp_path / "t.jsonl", rows))).test, 256)
    easy = sum("+1?" in task.prompt for task in found)
    assert 95 < easy < 161  # four standard deviations around 128
    sets = load_tasks(DataConfig(tasks="sums", count=5), 0)
    assert sets.shuffled and chosen(sets.test, 9, sets.shuffled) == sets.test[:9]


SETTINGS: list[tuple[dict[str, str], str, dict[str, Any]]] = [
    (
        {"tasks": "t.jsonl"},
        "",
        {"data.tasks": "t.jsonl", "data.eval_tasks": "t.jsonl", "eval.problems": 0, "data.count": 0},
    ),
    ({"data.tasks": "t.jsonl", "eval.problems": "9"}, "", {"data.eval_tasks": "t.jsonl", "eval.problems": "9"}),
    ({"data.tasks": "t.jsonl"}, "t.jsonl", {"data.tasks": "t.jsonl"}),
    ({"data.tasks": "sums"}, "t.jsonl", {"data.tasks": "sums", "data.eval_tasks": "sums"}),
    (
        {"data.tasks": "t.jsonl", "data.eval_tasks": "u.jsonl"},
        "",
        {"data.tasks": "t.jsonl", "data.eval_tasks": "u.jsonl"},
    ),
    ({"eval.samples": "2"}, "t.jsonl", {"eval.samples": "2"}),
]


@pytest.mark.parametrize(("overrides", "trained_on", "expected"), SETTINGS)
def test_tasks_given_to_an_evaluation_are_evaluated_whole(
    overrides: dict[str, str], trained_on: str, expected: dict[str, Any]
) -> None:
    found = evaluation_settings(overrides, trained_on)
    assert expected.items() <= found.items()
    assert ("data.eval_tasks" in found) == ("data.eval_tasks" in expected)


@pytest.mark.parametrize(
    "option", [["--tasks", "{}"], ["--data.eval_tasks", "{}"], ["--tasks", "{}", "--data.eval_tasks", "{}"]]
)
@pytest.mark.parametrize("reward", ["auto", "ifeval"])
def test_the_command_evaluates_all_rows_of_a_file_with_any_reward(
    tmp_path: Path, option: list[str], reward: str
) -> None:
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rows = sums(12) if reward == "auto" else [{"prompt": f"Write {i + 2} words.", **rule} for i in range(12)]
    words = [text.format(write(tmp_path / "t.jsonl", rows)) for text in option]
    done = CliRunner().invoke(main, ["eval", "abacus", *words, "--reward", reward, "--max-tokens", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks"] == 12


def test_an_evaluation_says_how_many_tasks_it_leaves_out(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", sums(30))
    report, _ = pt.evaluate("abacus", file, eval__problems=10, rollout__max_tokens=4)
    assert report.tasks == 10 and "10 of 30 held-out tasks are evaluated" in report.notes[0]
    assert "20 are left out" in report.notes[0]


# --- order and mixtures -----------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(0, 99), st.integers(0, 40))
def test_without_shuffling_rows_are_drawn_in_order_again_and_again(count: int, start: int, take: int) -> None:
    assert rng.draw_order(count, start, take, 0, shuffle=False) == [n % count for n in range(start, start + take)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 50), st.integers(0, 50))
def test_an_unshuffled_mixture_reads_each_source_in_order(sizes: list[int], start: int, take: int) -> None:
    mixture = Mixture(sizes, [1.0] * len(sizes), 3, shuffle=False)
    whole = mixture.draw(0, start + take)
    assert mixture.draw(start, take) == whole[start:]
    for source, size in enumerate(sizes):
        rows = [row for s, row in whole if s == source]
        assert rows == [n % size for n in range(len(rows))]


def test_a_mixture_of_files_and_tasks_gives_each_its_share_and_keeps_it_apart(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one, two = write(tmp_path / "a.jsonl", sums(30)), write(tmp_path / "b" / "a.jsonl", sums(10, 50))
    spec = f"{one}*2 + {two}*1 + sums*1"
    sets = load_tasks(cfg := DataConfig(tasks=spec, count=0), 0)
    assert len({task.id for task in sets.train + sets.test}) == len(sets.train) + len(sets.test)
    assert {task.source for task in sets.train} == {task.source for task in sets.test} == {one, two, "sums"}
    assert Counter(t.source for t in sets.test)[one] == 3 and Counter(t.source for t in sets.test)[two] == 1
    order = task_order(sets.train, cfg, 0)
    drawn = [sets.train[i] for i in order(0, 400)]
    assert Counter(task.source for task in drawn) == {one: 200, two: 100, "sums": 100}
    assert order(37, 50) == order(0, 400)[37:87]
    kept = task_order(sets.train, DataConfig(tasks=spec, shuffle=False), 0)(0, 400)
    mine = [sets.train[i].id for i in kept if sets.train[i].source == one]
    assert mine[:27] == [task.id for task in sets.train if task.source == one]


def test_generated_tasks_alone_are_drawn_as_before() -> None:
    cfg = DataConfig(tasks="sums*2 + safety", count=60)
    train = load_tasks(cfg, 0).train
    assert task_order(train, cfg, 5)(7, 90) == rng.draw_order(len(train), 7, 90, 5)


def test_each_source_has_its_own_reward_and_needs_an_answer_only_for_that(tmp_path: Path, chat: ChatFormat) -> None:
    asked = write(tmp_path / "a.jsonl", sums(12))
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    told = write(tmp_path / "b.jsonl", [{"prompt": f"Write {i + 2} words.", **rule} for i in range(12)])
    settings = {
        "data.tasks": f"{asked} + {told}",
        "eval.problems": 2,
        "reward.name": "math@'a.jsonl' + ifeval@'b.jsonl'",
    }
    sets, verify = judged_tasks(config.resolve_as(EvalRecipe, {}, settings), chat)
    one, other = (next(t for t in sets.train if t.env == name) for name in ("a.jsonl", "b.jsonl"))
    assert verify(one, str(one.answer)).passed and not verify(one, "x").passed
    assert verify(other, "two words").passed and not verify(other, "two, words").passed
    with pytest.raises(DataError, match="no column holds an answer"):
        judged_tasks(config.resolve_as(EvalRecipe, {}, settings | {"reward.name": "math"}), chat)


def test_a_source_of_a_row_is_the_name_in_its_column(tmp_path: Path, chat: ChatFormat) -> None:
    rows = [
        {
            "data_source": name,
            "prompt": [{"role": "user", "content": f"{name} {i}"}],
            "reward_model": {"ground_truth": "1"},
        }
        for name in ("gsm", "arc")
        for i in range(6)
    ]
    settings = {"data.tasks": write(tmp_path / "v.jsonl", rows), "reward.name": "math@gsm + exact@arc"}
    sets, verify = judged_tasks(config.resolve_as(EvalRecipe, {}, settings), chat)
    for task in sets.train:
        assert verify(task, "1").parts.keys() == {"math" if task.meta["data_source"] == "gsm" else "exact"}
        assert task.source == task.meta["data_source"]


def test_a_run_on_two_files_reports_each_and_resumes(tmp_path: Path) -> None:
    spec = f"{write(tmp_path / 'a.jsonl', sums(20))}*3 + {write(tmp_path / 'b.jsonl', sums(20, 50))}"
    settings: dict[str, Any] = {"train__steps": 2, "algo__prompts": 4, "algo__group_size": 2, "rollout__max_tokens": 4}
    for algorithm in ("grpo", "online-dpo"):
        out = tmp_path / algorithm
        api.train(algorithm, "abacus", spec, lambda completion: float(len(completion)), out, **settings)
        with Run.read(out) as run:
            for name in ("a.jsonl", "b.jsonl"):
                for metric in ("reward", "accuracy"):
                    assert len(run.curve(f"{metric}/{tmp_path / name}")[0]) == 2
                    assert len(run.curve(f"eval/{metric}/{tmp_path / name}")[0]) == 2
            rows = [row.task_id.partition(":")[0] for row in run.episodes("train", 1)]
            assert Counter(rows) == {"a.jsonl": 6, "b.jsonl": 2}


def test_weights_of_files_of_preferences_are_refused_and_several_files_joined(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "chosen": "a", "rejected": "b"} for i in range(3)])
        for name in "xy"
    ]
    assert len(stored_rows(DataConfig(tasks=" + ".join(files)), [])) == 6
    with pytest.raises(ConfigError, match="different weights"):
        stored_rows(DataConfig(tasks=f"{files[0]}*2 + {files[1]}"), [])


def test_a_curriculum_contradicts_a_fixed_order() -> None:
    with pytest.raises(ConfigError, match="contradicts data.shuffle=false"):
        config.resolve("grpo", {}, {"algo.curriculum": "pass-rate", "data.shuffle": "false"})


# --- what nothing reads -----------------------------------------------------------------------------------------------


def test_columns_and_message_fields_that_nothing_reads_are_named(tmp_path: Path) -> None:
    def messages(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"q{i}", "mood": "glad"}, {"role": "assistant", "content": "a"}]

    rows: list[dict[str, Any]] = [{"id": i, "prompt": "p", "messages": messages(i)} for i in range(4)]
    found = unread_columns([Row("", row) for row in rows], row_to_conversation)
    assert found == {"id": 4, "prompt": 4, "messages.mood": 4}
    bad = [Row("", {"id": 1, "text": [5], "odd": 1})] * 5
    assert unread_columns([*bad, *(Row("", row) for row in rows)], row_to_conversation) == found
    notes = load_conversations(DataConfig(tasks=write(tmp_path / "a.jsonl", rows), holdout=0), 0).notes
    assert any(
        "nothing reads column 'id' (4 rows), column 'prompt' (4 rows), message field 'mood' (4 rows)." in note
        for note in notes
    )
    sets = load_tasks(DataConfig(tasks=write(tmp_path / "b.jsonl", sums(4, passage="Once."))), 0)
    assert any("the model does not see column 'passage' (4 rows); rewards can." in note for note in sets.notes)


UNREAD: dict[str, tuple[list[dict[str, Any]], Any, dict[str, int]]] = {
    "a column that other rows read": (
        [{"question": f"q{i}", "answer": "a"} for i in range(5)] + [{"question": "q", "prompt": "p", "answer": "a"}],
        lambda row: row_to_task(row, "e").messages,
        {"question": 1},
    ),
    "values that are the default": (
        [{"prompt": "p", "chosen": "a", "rejected": "b", "label": 1, "tie": False, "margin": 0, "rank": 1}] * 4,
        row_to_preference,
        {"rank": 4},
    ),
    "scores beside the margin, which they may contradict": (
        [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1, "score_chosen": 2, "score_rejected": 1}] * 4,
        row_to_preference,
        {},
    ),
    "a weight of 1": (
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]}] * 4,
        row_to_conversation,
        {},
    ),
    "a system message that the messages have too": (
        [{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}], "system": "S"}] * 2,
        lambda row: row_to_task(row, "e", needs_answer=False).messages,
        {},
    ),
    "a column whose name has a dot": (
        [{"prompt": "p", "completion": "c", "meta": 1, "meta.id": 2}] * 2,
        row_to_conversation,
        {"meta": 2, "meta.id": 2},
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_read_depends_on_the_row_and_not_on_a_value_that_is_the_default(name: str) -> None:
    rows, parse, unread = UNREAD[name]
    assert unread_columns([Row("", row) for row in rows], parse) == unread


# --- long prompts -----------------------------------------------------------------------------------------------------


def test_a_prompt_that_cannot_fit_is_refused_without_tokenizing_it(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Task("f:1", "f", (Message("user", "a" * 2_000_000),), "1")
    short = tasks(2)
    seen: list[int] = []
    encode = chat.prompt_tokens
    monkeypatch.setattr(chat, "prompt_tokens", lambda m: seen.append(len(m[-1].content)) or encode(m))
    with pytest.raises(DataError, match="1 training prompts are longer than .* tokens or more, f:1"):
        fit_prompts(TaskSets([long, *short], [], [], ""), chat, DataConfig())
    kept = fit_prompts(TaskSets([long, *short], [], [], ""), chat, DataConfig(overlong="drop"))
    assert kept.train == short and max(seen) < 10


@given(st.text(max_size=200), st.integers(0, 60))
def test_a_bound_is_never_above_the_length(text: str, limit: int) -> None:
    chat = ChatFormat(TOKENIZER)
    prompt = (Message("user", text),)
    exact = len(chat.prompt_tokens(prompt))
    (found,) = prompt_lengths([prompt], chat, limit)
    assert found == exact or limit < found <= exact


TOKENIZER = AutoTokenizer.from_pretrained(ABACUS)
