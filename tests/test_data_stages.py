"""Data stages: demonstrations that pass, labels that follow their utility, critiques and smaller models."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain import config
from posttrain.config import DataConfig
from posttrain.data.files import read_rows
from posttrain.data.mixing import parse_mixture
from posttrain.data.preferences import row_to_preference
from posttrain.data.sources import row_to_conversation
from posttrain.data.tasks.abacus import evaluate
from posttrain.data.tasks.load import load_tasks
from posttrain.models.load import load_policy
from posttrain.pipelines import constitution, critics, critique, demonstrations, labeler, selection
from posttrain.pipelines.constitution import load_constitution, violations
from posttrain.pipelines.critique import Critiques
from posttrain.pipelines.data_stages import DATA_STAGES
from posttrain.pipelines.demonstrations import Demonstrations
from posttrain.pipelines.labeler import Pair, Preferences, probability_of_first, utility
from posttrain.pipelines.phrases import REFUSALS, THOUGHTS
from posttrain.rewards.auto import verifier_for
from posttrain.rewards.language import detect, language
from posttrain.rewards.skills import declines, dismisses, thinks
from posttrain.types import ConfigError, DataError, Message, Task
from tests.test_judge import Server
from tests.test_judge import server as server

KINDS = "sums + products + countdown + instructions + safety + requests"


def rows_of(folder: Path, name: str = "data.jsonl") -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_rows(str(folder / name))]


def make(name: str, folder: Path, **settings: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    cls, build = DATA_STAGES[name]
    return build(cls(**settings), folder)


def training(spec: str, count: int = 60) -> list[Task]:
    return load_tasks(DataConfig(tasks=spec, count=count), 0).train


def problem(name: str, kind: str = "") -> Task:
    return next(task for task in training(name) if not kind or task.meta["kind"] == kind)


@pytest.mark.parametrize("name", DATA_STAGES)
def test_every_setting_of_a_data_stage_is_explained_and_wrong_ones_are_refused(name: str) -> None:
    cls, _ = DATA_STAGES[name]
    assert set(config.field_docs(cls)) == {f.name for f in fields(cls)}
    with pytest.raises(ConfigError, match="1 or more"):
        cls(**{("layers" if name == "shrink" else "count"): 0})


# --- demonstrations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["direct", "worked", "long"])
@pytest.mark.parametrize("mixed", [False, True])
def test_every_demonstration_passes_its_task_and_is_polite(style: Any, mixed: bool) -> None:
    for task in training(KINDS, 300):
        text = demonstrations.answer(task, style, random.Random(task.id), mixed)
        assert verifier_for(task)(task, text).passed, (task.prompt, text)
        assert not dismisses(text)
        assert thinks(text) == (style != "direct" and demonstrations.is_arithmetic(task))


@pytest.mark.parametrize("style", ["worked", "long"])
def test_every_equation_in_a_thought_is_true(style: Any) -> None:
    for task in training("sums + products + countdown", 150):
        text = demonstrations.answer(task, style, random.Random(task.id))
        words = text.replace("</think>", " ").replace("<think>", " ").replace("?", " ").split()
        equations = [word.strip(".,") for word in words if "=" in word]
        assert equations
        for equation in equations:
            left, right = equation.split("=")
            assert evaluate(left)[0] == int(right), text


def test_a_long_sum_is_planned_worked_by_places_and_checked_in_order() -> None:
    task = replace(problem("sums"), answer="118", meta={"skill": "reasoning", "kind": "sums", "numbers": [47, 35, 36]})
    said = demonstrations.answer(task, "long", random.Random(0))
    shown = [word.strip(".,") for word in said.split() if "=" in word]
    assert shown == ["40+30+30=100", "7+5+6=18", "100+18=118", "47+35=82", "82+36=118"]
    assert said.endswith("</think>118")


def test_a_long_product_is_taken_apart_and_added_up_again_from_the_other_end() -> None:
    meta = {"skill": "reasoning", "kind": "products", "numbers": [304, 6]}
    task = replace(problem("products"), answer="1824", meta=meta)
    said = demonstrations.answer(task, "long", random.Random(0))
    shown = [word.strip(".,") for word in said.split() if "=" in word]
    assert shown == ["300*6=1800", "4*6=24", "1800+24=1824", "24+1800=1824"]


def test_mixed_thoughts_begin_in_english_end_in_german_and_the_language_reward_sees_it(tmp_path: Path) -> None:
    made = make("demonstrations", tmp_path, tasks="arithmetic + safety", count=200, style="long", mixing=0.3)
    rows = rows_of(tmp_path)
    assert made["rows"] == len(rows) == 200 and made["mixed"] == sum(row["mixed"] for row in rows)
    assert 15 <= made["mixed"] <= 45 and made["worked_out"] == 100
    tasks = {task.id: task for task in training("arithmetic + safety", 200)}
    for row in rows:
        if row["part"] == "arithmetic":
            text = row["messages"][-1]["content"]
            assert language(tasks[row["id"]], text).passed != row["mixed"], text
            assert detect(text.removeprefix("<think>").partition(".")[0]) == "en"


def test_phrases_are_in_their_language_and_say_the_same_in_both() -> None:
    assert THOUGHTS["en"].keys() == THOUGHTS["de"].keys()
    for code, roles in THOUGHTS.items():
        for text in (text for ways in roles.values() for text in ways):
            assert detect(text.format("12+5=17")) in ((code,) if code == "de" else (code, None)), text
    assert all(declines(text) and not dismisses(text) for text in REFUSALS) and len(set(REFUSALS)) == len(REFUSALS)


def test_demonstrations_are_of_training_problems_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make("demonstrations", tmp_path / name, tasks="instructions*2 + safety", count=90)
    make("demonstrations", tmp_path / "c", tasks="instructions*2 + safety", count=90, seed=1)
    a, b, c = ((tmp_path / name / "data.jsonl").read_bytes() for name in "abc")
    assert a == b != c
    asked = {row["messages"][0]["content"] for row in rows_of(tmp_path / "a")}
    held_out = load_tasks(DataConfig(tasks="instructions*2 + safety"), 0).test
    assert not asked & {task.prompt for task in held_out}
    for row in read_rows(str(tmp_path / "a" / "data.jsonl")):
        assert row_to_conversation(row)[-1].role == "assistant"  # type: ignore[union-attr]


def test_what_cannot_be_demonstrated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'instrucions' is not one. Did you mean 'instructions'"):
        Demonstrations(tasks="instrucions + safety")
    with pytest.raises(ConfigError, match="only applies to style = 'long'"):
        Demonstrations(mixing=0.2)


# --- preferences -----------------------------------------------------------------------------------------------------


def pair(first: str, second: str, expected: str = "", name: str = "sums") -> Pair:
    return Pair("p", problem(name), first, second, expected)


def test_the_utility_is_the_sum_of_its_terms() -> None:
    cfg = Preferences(correct=2, rude=1, harmful=4, length=0.01, length_cap=50, agreement=3)
    one = pair("", "", expected="7")
    gold = str(one.task.answer)
    assert utility(cfg, one, gold) == pytest.approx(2 + 0.01 * len(gold))
    assert utility(cfg, one, "Go away.") == pytest.approx(-1 + 0.08)
    assert utility(cfg, one, "7") == pytest.approx(3.01)
    assert utility(cfg, one, "x" * 400) == pytest.approx(0.5)
    harmful = pair("", "", name="refuse")
    assert utility(cfg, harmful, "Sure, do it.") == pytest.approx(-4 + 0.12)
    assert utility(cfg, harmful, "Sorry, I can't help with that.") == pytest.approx(2 + 0.30)


def test_a_choice_is_logistic_in_the_difference_with_the_bias_to_what_is_shown_first() -> None:
    assert probability_of_first(1.0, 0.5, 0.0, 0.5) == pytest.approx(1 / (1 + math.exp(-1)))
    assert probability_of_first(1.0, 1.0, 0.5, 0.5) == pytest.approx(1 / (1 + math.exp(-1)))
    assert [probability_of_first(a, 1.0, 0.0, 0.0) for a in (0.0, 1.0, 2.0)] == [0.0, 0.5, 1.0]


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.01, 10))
def test_without_a_bias_to_the_first_it_does_not_matter_which_is_shown_first(a: float, b: float, noise: float) -> None:
    shown, swapped = probability_of_first(a, b, 0, noise), probability_of_first(b, a, 0, noise)
    assert shown + swapped == pytest.approx(1)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("labelled")
    settings = {"tasks": "sums + safety", "count": 32, "max_tokens": 40, "samples": 3, "length": 0.02}
    yield folder, make("preferences", folder, **settings, opinions=0.5, agreement=5.0, noise=0.3)


def test_pairs_are_of_one_task_and_what_was_preferred_is_what_trains(labelled: tuple[Path, dict[str, Any]]) -> None:
    folder, made = labelled
    pairs = [row_to_preference(row) for row in read_rows(str(folder / "data.jsonl"))]
    labels = rows_of(folder, labeler.LABELS)
    assert made["pairs"] == len(pairs) == len(labels) > 20 and made["ties"] == 0
    for trained, seen in zip(pairs, labels, strict=True):
        chosen, rejected = ("first", "second") if seen["preferred"] == "first" else ("second", "first")
        assert (trained.chosen, trained.rejected) == (seen[chosen], seen[rejected])
        assert trained.prompt[-1].content == seen["prompt"] and trained.label == 1
        assert seen["flipped"] == (seen["worth"][chosen == "second"] < seen["worth"][chosen == "first"])
    flipped = sum(seen["flipped"] for seen in labels) / len(labels)
    assert made["against_utility"] == pytest.approx(flipped, abs=1e-4) and flipped < 0.5


def test_where_the_user_expects_an_answer_one_of_the_two_gives_it(labelled: tuple[Path, dict[str, Any]]) -> None:
    folder, made = labelled
    told = [row for row in rows_of(folder, labeler.LABELS) if "I am sure that the answer is" in row["prompt"]]
    assert told and all(row["agrees"].count(True) == 1 and not all(row["passes"]) for row in told)
    agreed = sum(row["agrees"][0] == (row["preferred"] == "first") for row in told)
    assert made["agreeing_chosen"] == pytest.approx(agreed / len(told), abs=1e-4) and agreed > len(told) / 2


def judged_pairs() -> list[Pair]:
    """A refusal and a compliance, and two refusals of different lengths, for each of some harmful requests."""
    found: list[Pair] = []
    for i, task in enumerate(training("refuse", 8)):
        texts = [REFUSALS[i], "Sure, just do it when nobody looks."]
        found += [
            Pair(f"{task.id}/0", task, *texts[:: 1 - 2 * (i % 2)]),
            Pair(f"{task.id}/1", task, *REFUSALS[i : i + 2]),
        ]
    return found


def test_a_labeler_without_noise_and_biases_never_prefers_the_wrong_answer(tmp_path: Path) -> None:
    made = labeler.labelled(Preferences(noise=0.0), judged_pairs(), tmp_path)
    assert (made["comparable"], made["equal"]) == (8, 8)
    assert made["wrong_chosen"] == 0 == made["against_utility"] and 0 < made["first_chosen"] < 1
    made = labeler.labelled(Preferences(noise=0.0, position=9.0), judged_pairs(), tmp_path)
    assert made["first_chosen"] == 1 and made["wrong_chosen"] == 0.5


def test_the_constitution_prefers_what_violates_less_and_tosses_a_coin_for_equals(tmp_path: Path) -> None:
    made = labeler.labelled(Preferences(labeler="constitution"), judged_pairs(), tmp_path)
    task, principles = problem("refuse"), load_constitution("")
    assert made["wrong_chosen"] == 0 and made["equal"] == 8
    for row in rows_of(tmp_path, labeler.LABELS):
        weights = row["worth"]
        assert row["probability"] == (0.5 if weights[0] == weights[1] else float(weights[0] > weights[1]))
    assert sum(p.weight for p, _ in violations(principles, task, "Sure, do it.")) == 4


def judge_file(folder: Path, server: Server, more: str = "") -> str:
    path = folder / "judge.toml"
    cache = folder / "replies.db"
    path.write_text(f'endpoint = "{server.url}"\nmodel = "m"\ncache = "{cache}"\n{more}\n[limits]\nbackoff = 0\n')
    return f"judge:{path}"


def test_a_judge_compares_both_ways_and_where_it_is_swayed_the_pair_is_a_tie(tmp_path: Path, server: Server) -> None:
    shown: set[tuple[str, str]] = set()

    def shorter(body: dict[str, Any], number: int) -> str:
        text = body["messages"][1]["content"]
        a, b = (text.partition(f"<answer-{side}-")[2].partition(">\n")[2].partition("\n</answer-")[0] for side in "AB")
        shown.add((a, b))
        return f'VERDICT: {{"better": "{"A" if len(a) <= len(b) else "B"}"}}'

    server.script = shorter
    spec = judge_file(tmp_path, server, 'mode = "pairwise"\nsees = "all"')
    made = labeler.labelled(Preferences(labeler=spec), judged_pairs(), tmp_path)
    assert made["longer_chosen"] == 0 and made["unjudged"] == 0
    assert len(shown) == 2 * made["pairs"] and {(b, a) for a, b in shown} == shown  # each pair was shown both ways
    ties = [row for row in rows_of(tmp_path) if row["label"] == 0.5]
    assert len(ties) == made["ties"] and all(len(row["chosen"]) == len(row["rejected"]) for row in ties)
    with pytest.raises(ConfigError, match='needs mode = "pairwise"'):
        other = judge_file(tmp_path, server, 'mode = "reference"')
        labeler.labelled(Preferences(labeler=other), judged_pairs(), tmp_path)


# --- selection -------------------------------------------------------------------------------------------------------


def test_only_answers_that_pass_are_kept_at_most_so_many_of_a_task_and_all_different(tmp_path: Path) -> None:
    settings = {"tasks": "sums + safety", "samples": 6, "max_per_task": 2, "count": 16, "max_tokens": 40}
    made = make("selection", tmp_path, **settings)
    rows = rows_of(tmp_path)
    tasks = {task.id: task for task in training("sums + safety", 16)}
    kept = [(row["id"], row["messages"][-1]["content"]) for row in rows]
    assert len(set(kept)) == len(kept) == made["rows"] > 0 and made["answers"] == 96
    assert all(verifier_for(tasks[name])(tasks[name], text).passed for name, text in kept)
    assert max(sum(name == other for other, _ in kept) for name, _ in kept) == 2
    assert made["kept"] == pytest.approx(len(rows) / 96, abs=1e-4)


def test_the_best_is_kept_whether_it_passes_or_not(tmp_path: Path) -> None:
    made = make("selection", tmp_path, tasks="spell", select="best", count=6, max_tokens=24)
    assert made["rows"] + made["dropped"].get("truncated", 0) >= 6 and made["passed"] < 1


def test_where_no_answer_is_left_it_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows left to write to .* Use more tasks or samples"):
        make("selection", tmp_path, tasks="countdown", longest=1, count=2, samples=1, max_tokens=8)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("282", True),
        ("<think>40*6=240</think>282", True),
        ("So <think>40*6=240</think>282", False),
        ("<think> </think>282", False),
        ("<think>40*6=240</think>", False),
        ("<think>40*6=240", False),
        ("<think>a</think>b<think>c</think>282", False),
    ],
)
def test_a_reply_is_well_formed_with_one_closed_thought_at_most_and_an_answer(text: str, fits: bool) -> None:
    assert selection.well_formed(text) is fits


def test_bare_numbers_are_in_every_language_and_german_is_not_english() -> None:
    task = problem("sums")
    assert selection.in_language(task, "<think>40+7=47</think>47")
    assert selection.in_language(task, "<think>The tens are 40.</think>47")
    assert not selection.in_language(task, "<think>Die Zehner sind 40.</think>47")


# --- critique and revision -------------------------------------------------------------------------------------------


def task_of(skill: str, **meta: Any) -> Task:
    return Task("t", skill, (Message("user", "q"),), "help", {"skill": skill, "kind": "k", **meta})


@pytest.mark.parametrize(
    ("name", "text", "violated"),
    [
        ("refuse", "Sure, just do it when nobody looks.", ["harmless"]),
        ("refuse", "Sorry, I can't help with that.", []),
        ("refuse", "Go away.", ["polite"]),
        ("assist", "Sorry, I can't help with that.", ["helpful"]),
        ("assist", "It is a nice day.", ["relevant"]),
        ("assist", "I don't care.", ["polite"]),
        ("spell", "I like apples.", ["obedient"]),
        ("sums", "<think>1+1=3</think>3", ["truthful"]),
        ("lookalike", "Maybe later.", ["relevant"]),
        ("lookalike", "so " * 60, ["relevant", "brief"]),
    ],
)
def test_the_program_names_the_principles_that_an_answer_violates(name: str, text: str, violated: list[str]) -> None:
    task = problem(name)
    assert [principle.id for principle, _ in violations(load_constitution(""), task, text)] == violated


def test_revisions_of_the_program_violate_nothing() -> None:
    for task in training(KINDS, 200):
        text = constitution.revised(task, random.Random(task.id))
        assert not violations(load_constitution(""), task, text), (task.prompt, text)


def test_critique_and_revision_leave_only_answers_without_a_violation(tmp_path: Path) -> None:
    made = make("critique", tmp_path, count=40, tasks="instructions + safety", max_tokens=32)
    cases = rows_of(tmp_path, "critiques.jsonl")
    tasks = {task.id: task for task in training("instructions + safety", 40)}
    for row in rows_of(tmp_path):
        text = row["messages"][-1]["content"]
        assert not violations(load_constitution(""), tasks[row["id"]], text)
        assert row["revised"] == (text not in [case["answer"] for case in cases if case["id"] == row["id"]])
    assert made["answers"] == len(cases) and made["rows"] == len(cases) - made["dropped"]
    assert sum(made["before"].values()) >= made["faulty"] == made["revised"] > 0 == sum(made["after"].values())
    faulty = next(case for case in cases if case["violated"])
    assert "But the answer" in faulty["critique"] and faulty["revision"] == faulty["kept"]


def test_a_model_behind_an_endpoint_criticises_revises_and_criticises_again(tmp_path: Path, server: Server) -> None:
    def script(body: dict[str, Any], number: int) -> str:
        system, user = (message["content"] for message in body["messages"])
        if "rewrite" in system:
            return "<think>how?</think>A fine answer." if "spell" not in user.lower() else "A bad answer."
        return 'It is fine.\nVERDICT: {"violated": []}' if "fine" in user else 'No.\nVERDICT: {"violated": ["polite"]}'

    server.script = script
    spec = judge_file(tmp_path, server)
    asked = [(task, "Go away.") for task in (*training("refuse", 6), *training("spell", 6))]
    made = critique.revised(Critiques(critic=spec), asked, tmp_path)
    rows = rows_of(tmp_path)
    assert made["faulty"] == made["answers"] == 12 and made["dropped"] == 6 == made["after"]["polite"]
    assert [row["messages"][-1]["content"] for row in rows] == ["A fine answer."] * 6
    case = rows_of(tmp_path, "critiques.jsonl")[0]
    assert case["critique"] == "No." and case["violated"] == ["polite"]
    text = server.bodies[0]["messages"][0]["content"]
    assert all(principle.text in text for principle in load_constitution(""))


def test_a_critic_that_names_no_known_principle_gives_no_critique(tmp_path: Path, server: Server) -> None:
    server.script = lambda body, number: 'VERDICT: {"violated": ["beauty"]}'
    criticise, _ = critics.load_critic(judge_file(tmp_path, server), load_constitution(""), 0)
    (found,) = criticise([(problem("sums"), "5")])
    assert "some of harmless, helpful" in str(found)


def test_a_constitution_of_ones_own_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[[principle]]\nid = "kind"\ntext = "Be kind."\ncheck = "dismisses"\nweight = 2\n')
    (principle,) = load_constitution(str(mine))
    assert (principle.id, principle.weight) == ("kind", 2.0)
    mine.write_text('[[principle]]\nid = "kind"\ntext = "Be kind."\ncheck = "dismises"\n')
    with pytest.raises(ConfigError, match="unknown check 'dismises'. Did you mean 'dismisses'"):
        load_constitution(str(mine))
    mine.write_text("")
    with pytest.raises(ConfigError, match="each with a unique `id`"):
        load_constitution(str(mine))


# --- smaller models --------------------------------------------------------------------------------------------------


def test_a_shrunk_model_is_its_first_layers_and_loads_like_any_other(tmp_path: Path) -> None:
    made = make("shrink", tmp_path, layers=2)
    small, whole = (load_policy(config.ModelConfig(path=path)) for path in (str(tmp_path / "model"), "abacus"))
    assert small.config.num_hidden_layers == made["layers"] == 2
    assert made["parameters"] == sum(p.numel() for p in small.model.parameters())
    for name, weight in small.model.state_dict().items():
        assert weight.equal(whole.model.state_dict()[name]), name
    with pytest.raises(ConfigError, match="layers=9, but 'abacus' has 4"):
        make("shrink", tmp_path / "b", layers=9)


def test_a_mixture_of_what_stages_made_is_read_with_the_hyphens_and_slashes_of_their_folders() -> None:
    a, b = "runs/r1/cold-start-0a1b2c3d/data.jsonl", "/tmp/pipe lines/general-data-4e5f6a7b/data.jsonl"
    assert parse_mixture(f"{a}*3 + {b}*0.5 + {b[1:]}") == [(a, 3.0), (b, 0.5), (b[1:], 1.0)]


def test_the_files_of_data_stages_are_json_lines(tmp_path: Path) -> None:
    make("demonstrations", tmp_path, count=3)
    lines = (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["messages"][0]["role"] for line in lines] == ["user"] * 3
