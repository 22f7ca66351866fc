"""`posttrain search` as a person uses it: results that survive a kill, comparison, exports, right and wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import posttrain as pt
from posttrain.cli import main as cli
from posttrain.rollout import journal
from posttrain.search.scorers import Scored
from posttrain.search.solve import Searched, check_separator
from posttrain.store.failpoints import VARIABLE
from posttrain.types import ConfigError
from tests import tiny

SMALL = "--tasks arithmetic --eval.problems 4 --rollout.max_tokens 40"
STEPS = "--strategy beam --budget 4 --search.separator ,"


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where the commands run."""
    folder, before = tmp_path_factory.mktemp("search"), Path.cwd()
    os.chdir(folder)
    with tiny.threads(1):
        yield folder
    os.chdir(before)


def call(command: str, text: str = "") -> Result:
    return CliRunner().invoke(cli.main, command.split(), input=text)


def made(command: str) -> dict[str, Any]:
    result = call(command + " --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    """A finished search."""
    return made(f"search abacus {SMALL} {STEPS} --out whole --tree tree.json")


def same_files(a: str, b: str) -> bool:
    return all(Path(a, name).read_bytes() == Path(b, name).read_bytes() for name in ("results.jsonl", "trees.jsonl"))


def test_a_report_counts_what_the_rows_and_trees_say(found: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in Path("whole/results.jsonl").read_text().splitlines()]
    trees = json.loads(Path("tree.json").read_text())["trees"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3] and found["tasks"] == 4
    assert found["accuracy"]["value"] == sum(row["passed"] for row in rows) / 4
    assert found["coverage"]["value"] == sum(any(row["right"]) for row in rows) / 4
    assert found["generated"]["value"] == sum(row["generated"] for row in rows) / 4
    for row, tree in zip(rows, trees, strict=True):
        assert row["generated"] == sum(len(node["tokens"]) for node in tree["nodes"] if not node["forced"])
        assert tree["right"] == {str(n): right for n, right in zip(row["candidates"], row["right"], strict=True)}
    assert call("runs").exit_code == 0


def test_after_kill_9_the_same_command_gives_the_same_bytes(found: dict[str, Any]) -> None:
    command = f"search abacus {SMALL} {STEPS} --out killed --json"
    environment = {**os.environ, VARIABLE: "journal:recorded:20", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-m", "posttrain", *command.split()], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    before = Path("killed/journal/0000000").stat().st_size
    assert 0 < before < Path("whole/journal/0000000").stat().st_size
    again = made(f"search abacus {SMALL} {STEPS} --out killed --rollout.slots 3")  # slots change no result
    assert same_files("whole", "killed") and {**again, "folder": ""} == {**found, "folder": "", "written": {}}


def test_a_problem_whose_row_was_cut_is_searched_again(found: dict[str, Any]) -> None:
    text = Path("whole/results.jsonl").read_text()
    made(f"search abacus {SMALL} {STEPS} --out cut")
    Path("cut/results.jsonl").write_text(text[: len(text) - 20])
    made(f"search abacus {SMALL} {STEPS} --out cut")
    assert same_files("whole", "cut")


def test_a_larger_budget_continues_from_the_completions_that_are_there(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(f"search abacus {SMALL} --strategy majority --budget 2 --out grown")
    records: list[bytes] = []
    record = journal._record

    def counted(key: bytes, completion: Any) -> bytes:
        records.append(key)
        return record(key, completion)

    monkeypatch.setattr(journal, "_record", counted)
    made(f"search abacus {SMALL} --strategy majority --budget 4 --out grown")
    assert len(records) == 4 * 2  # 4 problems, of whose 4 completions 2 were there
    monkeypatch.undo()
    made(f"search abacus {SMALL} --strategy majority --budget 4 --out at-once")
    assert same_files("grown", "at-once")
    for other, words in {
        "--budget 2": "search.budget = 4, not 2",
        "--budget 4 --run.seed 1": "run.seed = 0, not 1",
    }.items():
        refused = call(f"search abacus {SMALL} --strategy majority {other} --out grown")
        assert refused.exit_code == 7 and words in refused.stderr


def test_ctrl_c_says_how_to_continue(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, *asked: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("posttrain.search.engine.Engine.sample", stop)
    named = call(f"search abacus {SMALL} --out stopped")
    assert (named.exit_code, named.stderr.splitlines()[-1]) == (
        130, "Stopped and saved. To continue, run the same command again.")  # fmt: skip
    unnamed = call(f"search abacus {SMALL}")
    folder = Path("runs/search-0001")
    assert unnamed.exit_code == 130 and f"run the same command with --out {folder} again" in unnamed.stderr


def test_exports_are_written_with_their_numbers_of_rows() -> None:
    found = made(
        f"search abacus {SMALL} --budget 8 --out exported --prm p.jsonl --pairs d.jsonl --demonstrations s.jsonl"
    )
    assert found["written"].keys() == {"p.jsonl", "d.jsonl", "s.jsonl"}
    for name, count in found["written"].items():
        assert len(Path(name).read_text().splitlines()) == count
    assert found["written"]["s.jsonl"] == round(4 * found["coverage"]["value"])


def test_strategies_are_compared_over_budgets_and_a_second_call_samples_nothing() -> None:
    command = f"search abacus {SMALL} --compare --strategies majority,best-of-n,beam --budgets 1,4 --out compared"
    found = made(command)
    assert [(p["strategy"], p["budget"]) for p in found["points"]] == [
        (name, n) for name in ("majority", "best-of-n", "beam") for n in (1, 4)]  # fmt: skip
    first = [p["accuracy"]["value"] for p in found["points"] if p["budget"] == 1]
    assert first[0] == first[1] == sum(found["rates"]) / 4, "of one completion, nothing can be chosen"
    assert sorted(i for part in found["thirds"].values() for i in part) == [0, 1, 2, 3]
    assert found["advice"].startswith("Use ") and json.loads(Path("compared/frontier.json").read_text())
    page = Path("compared/report.html").read_text()
    assert found["advice"].split(":")[0] in page and page.count("<img") == 1 and "best-of-n" in page
    assert Path("compared/frontier.png").read_bytes()[1:4] == b"PNG"
    before = Path("compared/journal/0000000").read_bytes()
    assert made(command)["points"] == found["points"]
    assert Path("compared/journal/0000000").read_bytes() == before


def test_an_evaluation_of_what_a_search_chooses(found: dict[str, Any]) -> None:
    report = made(f"eval abacus {SMALL} --search beam:4 --search.separator ,")
    assert (report["accuracy"], report["generated"]) == (found["accuracy"], found["generated"])
    assert report["samples"] == 1 and report["scored"]["value"] == 0
    assert "generated" not in made(f"eval abacus {SMALL}")


def test_a_chat_answers_with_what_a_search_chooses_and_says_what_it_spent() -> None:
    result = call("chat abacus --search majority:2 --max-tokens 24", "12 + 30 = ?\n\n")
    assert result.exit_code == 0 and "[2 completions, " in result.output and "0 scored]" in result.output


def test_python_has_the_same_search(found: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"eval__problems": 4, "max_tokens": 40, "separator": ","}
    searched = pt.search("abacus", "arithmetic", strategy="beam", budget=4, **settings)
    assert isinstance(searched, Searched) and searched.folder is None
    rows = [json.loads(line) for line in Path("whole/results.jsonl").read_text().splitlines()]
    assert [json.loads(json.dumps(one.as_dict())) for one in searched.outcomes] == rows


def test_a_gold_answer_as_scorer_is_named_in_a_note(found: dict[str, Any]) -> None:
    report = made(f"search abacus {SMALL} --budget 2 --scorer auto --out gold")
    assert report["accuracy"] == report["coverage"] and "reads the gold answer" in report["notes"][-1]
    assert not any("gold" in note for note in found["notes"])


WRONG = {
    "--strategy beem": "search.strategy='beem' is not one of majority, adaptive, best-of-n, beam, dvts, rebase, mcts, "
    "particles, revise, budget-forcing. Did you mean 'beam'?",
    "--scorer confidense": "unknown search.scorer 'confidense'. Did you mean 'confidence'?",
    "--budget 0": "budget=0 must be 1 or more",
    "--strategy beam --scorer auto": "scores unfinished completions, but search.scorer='auto' reads finished ones only",
    "--eval.temperature 0": "eval.temperature=0 is greedy, so the 16 completions",
    "--strategy beam --env.name guess": "needs tasks that one completion answers, but env.name='guess'",
    "--strategy majority --search.expansions 3": "search.expansions=3 has no effect on the strategy 'majority'",
    "--strategy majority --search.choose best --scorer model:nowhere": "reward model folder 'nowhere' does not exist",
    "--eval.samples 2": "eval.samples=2, but a search has one result per task",
    "--budgets 1,4": "--budgets 1,4 has no effect without --compare",
    "--compare --budget 4": "--budget 4 has no effect with --compare",
    "--compare --strategies beem": "unknown strategy 'beem'. Did you mean 'beam'?",
    "--compare --budgets 1,x": "--budgets 1,x is not a list of whole numbers",
    "--tree nowhere/t.json": "the folder nowhere does not exist",
}  # fmt: skip


@pytest.mark.parametrize("given", WRONG)
def test_wrong_input_is_one_sentence_before_anything_is_sampled(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.search.engine.Engine.sample", lambda *asked: pytest.fail("it has sampled"))
    result = call(f"search abacus {SMALL} {given} --out wrong")
    assert result.exit_code == 2 and WRONG[given] in result.stderr and not Path("wrong/results.jsonl").exists()


@dataclass(frozen=True)
class Separated:
    """A scorer whose steps end in a text, as a process reward model has it."""

    separator: str
    partial: bool = True

    def __call__(self, nodes: Sequence[Any]) -> list[Scored]:
        return [Scored((0.5,)) for _ in nodes]


def test_a_scorer_whose_step_separator_the_model_does_not_write_ends_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("posttrain.search.solve.make_scorer", lambda *_: Separated("☃"))
    result = call(f"search abacus {SMALL} --budget 8 --out separated")
    words = "none of the first 32 completions has '☃', with which search.scorer ends a step"
    assert result.exit_code == 5 and words in result.stderr, result.output


def test_a_step_separator_that_the_tokenizer_loses_is_refused() -> None:
    def engine(text: str) -> Any:
        return SimpleNamespace(encode=lambda _: [1, 2], collector=SimpleNamespace(decode=lambda _: text))

    check_separator(engine("a\nb"), Separated("\n"))
    with pytest.raises(ConfigError, match="reads steps that end in '\\\\n', but the model's tokenizer cannot write"):
        check_separator(engine("a b"), Separated("\n"))


def test_wrong_searches_of_other_commands() -> None:
    for command, words in {
        "eval abacus --search beam:x": "the budget 'x' is not a whole number; write beam:16",
        "eval abacus --scorer auto": "--scorer auto has no effect without --search",
        "eval abacus --search.budget 4": "search.budget=4 has no effect without search.strategy",
        "chat abacus --search best-of-n:2 --scorer auto": "compares with a gold answer, which a chat does not have",
        "chat abacus --scorer confidence": "--scorer confidence has no effect without --search",
    }.items():
        result = call(command)
        assert result.exit_code == 2 and words in result.stderr, result.output
