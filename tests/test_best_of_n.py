"""Best of n: picks, the unbiased estimate for every n, its cost in KL, and the training data that comes of it."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from posttrain.cli import main as cli
from posttrain.data.files import read_rows
from posttrain.data.preferences import row_to_preference
from posttrain.data.sources import row_to_conversation
from posttrain.evaluation.accuracy import pass_at_k
from posttrain.search.best_of_n import best_of_n, bon_kl, chosen_rows, expected_pick, measure, pairs_of
from posttrain.types import Episode, Message, Span, Task
from tests import tiny

SCORES = st.lists(st.integers(0, 3), min_size=1, max_size=6)
VOWELS = Path(__file__).parent / "vowels.py"


def episode(index: int, reward: float | None, text: str = "", passed: bool = False) -> Episode:
    spans = (Span("prompt", np.arange(3)), Span("model", np.arange(2), np.zeros(2, np.float32)))
    return Episode("t", 0, index, spans, text or f"answer {index}", reward, passed)


def task(name: str) -> Task:
    return Task(name, "sums", (Message("system", "Be brief."), Message("user", f"Question {name}?")), "1")


# --- the estimator --------------------------------------------------------------------------------------------------


@given(SCORES, st.data())
def test_the_expected_pick_is_the_average_over_all_subsets_of_n_answers(scores: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(scores)))
    values = data.draw(st.lists(st.floats(-5, 5), min_size=len(scores), max_size=len(scores)))
    means: list[float] = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
        means.append(float(np.mean([values[i] for i in top])))  # a fair draw among equal scores
    found = expected_pick(np.array(scores, float), np.array(values), n)
    assert found == pytest.approx(float(np.mean(means)), abs=1e-9)


@given(SCORES)
def test_the_best_of_one_is_the_mean_and_the_best_of_all_is_the_maximum(scores: list[int]) -> None:
    data = np.array(scores, float)
    assert expected_pick(data, data, 1) == pytest.approx(data.mean())
    assert expected_pick(data, data, len(data)) == pytest.approx(data.max())
    by_n = [expected_pick(data, data, n) for n in range(1, len(data) + 1)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(by_n)), "more answers never make the best one worse"


@given(st.integers(1, 40), st.data())
def test_where_the_score_is_whether_an_answer_passes_it_is_pass_at_k(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    passed = np.array([1.0] * right + [0.0] * (n - right))
    assert expected_pick(passed, passed, k) == pytest.approx(pass_at_k(n, right, k), abs=1e-9)


def test_the_expected_pick_by_hand() -> None:
    scores, right = np.array([1.0, 5.0, 3.0]), np.array([0.0, 0.0, 1.0])
    assert expected_pick(scores, scores, 2) == pytest.approx((5 + 3 + 5) / 3)
    assert expected_pick(scores, right, 2) == pytest.approx(1 / 3), "a scorer that likes a wrong answer best"
    assert expected_pick(scores, right, 3) == 0


@pytest.mark.parametrize("n", [0, 4])
def test_more_answers_than_there_are_cannot_be_estimated(n: int) -> None:
    with pytest.raises(ValueError, match=f"1 ≤ n ≤ N scored completions; got n={n}, N=3, of which 0 are unscored"):
        expected_pick(np.zeros(3), np.zeros(3), n)


def test_a_pick_is_the_first_of_the_highest_and_never_an_unscored_answer() -> None:
    nan = math.nan
    scores = np.array([[1.0, 3.0, 3.0], [nan, -2.0, -1.0], [nan, nan, nan]])
    assert best_of_n(scores).tolist() == [1, 2, -1]


def test_the_kl_bound_by_hand_and_against_its_integral() -> None:
    assert bon_kl(1) == 0 and bon_kl(4) == pytest.approx(math.log(4) - 3 / 4)
    u = (np.arange(200_000) + 0.5) / 200_000  # the quantile of a score: the best of n has density n u^(n − 1)
    for n in (2, 4, 16):
        density = n * u ** (n - 1)
        assert float((density * np.log(density)).mean()) == pytest.approx(bon_kl(n), abs=1e-4)
    with pytest.raises(ValueError, match="n=0 is too small"):
        bon_kl(0)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 6))
def test_of_finitely_many_answers_the_best_of_n_never_moves_further_than_the_bound(counts: list[int], n: int) -> None:
    p = np.array(counts, float) / sum(counts)  # answers in ascending order of score
    best = np.diff(np.concatenate([[0.0], np.cumsum(p) ** n]))
    assert float((best * np.log(best / p)).sum()) <= bon_kl(n) + 1e-9


# --- from answers to numbers and training data ----------------------------------------------------------------------


def test_it_is_measured_for_powers_of_two_and_for_all_and_tasks_with_unscored_answers_are_left_out() -> None:
    groups = [
        [episode(i, float(i), passed=i == 2) for i in range(6)],
        [episode(i, None if i else 1.0) for i in range(6)],
    ]
    found = measure(groups)
    assert [row.n for row in found.rows] == [1, 2, 4, 6] and (found.tasks, found.left_out) == (1, 1)
    assert [row.score.value for row in found.rows][::3] == [2.5, 5.0]
    assert [row.accuracy.value for row in found.rows][::3] == [pytest.approx(1 / 6), 0.0]
    assert found.rows[-1].kl == bon_kl(6)


def test_the_best_answers_become_rows_that_sft_reads(tmp_path: Path) -> None:
    tasks = [task("a"), task("b"), task("c")]
    groups = [
        [episode(0, 0.0), episode(1, 1.0)],
        [episode(0, 0.2), episode(1, 0.1)],
        [episode(0, None), episode(1, None)],
    ]
    assert [row["id"] for row in chosen_rows(tasks, groups)] == ["a", "b"]
    (row,) = chosen_rows(tasks, groups, least=0.5)
    assert row["score"] == 1.0
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = read_rows(str(tmp_path / "rows.jsonl"))
    assert row_to_conversation(read) == (*task("a").messages, Message("assistant", "answer 1"))


def test_pairs_are_best_against_worst_where_they_differ() -> None:
    groups = [
        [episode(0, 0.0), episode(1, 1.0), episode(2, -0.5)],
        [episode(0, 1.0), episode(1, 1.0), episode(2, 1.0)],
        [episode(0, 0.0, "same"), episode(1, 1.0, "same"), episode(2, None)],
        [episode(0, 0.0, " "), episode(1, 1.0), episode(2, 0.5)],
        [episode(0, 0.0), episode(1, 1.0, "a\0b"), episode(2, 0.5)],
        [episode(0, 0.0, "half a \ufffd"), episode(1, 1.0), episode(2, 0.5)],
        [episode(0, None), episode(1, None), episode(2, None)],
    ]
    (pair,) = pairs_of([task(name) for name in "abcdefg"], groups)
    assert (pair.chosen, pair.rejected, pair.margin) == ("answer 1", "answer 2", 1.5)
    assert pair.prompt == task("a").messages


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model, where the commands run."""
    folder = tmp_path_factory.mktemp("search")
    tiny.chatty(folder / "tiny")
    tiny.stopping(tiny.chatty(folder / "printable"))  # answers that files can hold
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def call(command: str) -> str:
    done = CliRunner().invoke(cli.main, command.split())
    assert done.exit_code == 0, done.output
    return done.stdout


SMALL = f"--tasks sums --scorer {VOWELS}:vowels --data.count 16 --eval.problems 6 --max-tokens 8"


def test_the_command_measures_and_writes_what_sft_and_preference_training_read(place: Path) -> None:
    found = json.loads(call(f"best-of-n printable {SMALL} --n 8 --out best.jsonl --pairs pairs.jsonl --json"))
    assert [row["n"] for row in found["rows"]] == [1, 2, 4, 8] and found["tasks"] == 6
    scores = [row["score"]["value"] for row in found["rows"]]
    assert scores == sorted(scores) and scores[-1] > scores[0]
    chosen, compared = read_rows("best.jsonl"), read_rows("pairs.jsonl")
    assert found["written"] == {"best.jsonl": len(chosen), "pairs.jsonl": len(compared)}
    assert 0 < len(chosen) <= 6 and np.mean([row.values["score"] for row in chosen]) > scores[0]
    assert all(row_to_preference(row).margin > 0 for row in compared)
    assert json.loads(call("sft --model tiny --data best.jsonl --batch-rows 2 --data.holdout 0 --out sft --json"))


def test_other_tasks_can_be_used_and_a_person_gets_a_table(place: Path) -> None:
    train = json.loads(call(f"best-of-n tiny {SMALL} --n 2 --split train --json"))
    held_out = json.loads(call(f"best-of-n tiny {SMALL} --n 2 --json"))
    assert train["rows"] != held_out["rows"]
    assert "KL at most" in call(f"best-of-n tiny {SMALL} --n 2")


def test_a_file_is_used_whole_unless_a_side_of_it_is_asked_for(place: Path) -> None:
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = f"best-of-n tiny --tasks rows.jsonl --scorer {VOWELS}:vowels --max-tokens 4 --n 1 --json"
    counts = [json.loads(call(given + more))["tasks"] for more in ("", " --split train", " --split held-out")]
    assert counts == [20, 18, 2]


@pytest.mark.parametrize(
    ("options", "says"), [("--n 0", "samples=0 must be 1 or more"), ("--n 2 --out no/where.jsonl", "no does not exist")]
)
def test_what_cannot_be_done_is_refused_before_sampling(place: Path, options: str, says: str) -> None:
    done = CliRunner().invoke(cli.main, f"best-of-n tiny {SMALL} {options}".split())
    assert done.exit_code == 2 and says in done.stderr
