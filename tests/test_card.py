"""The evaluation card: figures against counting by hand and a direct computation, on the abacus model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from posttrain import api
from posttrain.models.load import save_pretrained
from posttrain.models.weights import ABACUS
from posttrain.pipelines import card
from posttrain.pipelines.card import AnsweredTask, CardConfig, distinct, make_card, measures
from posttrain.types import ConfigError, Episode, Message, Span, StopReason, Task

SMALL = CardConfig(problems=5, max_tokens=40, prompts=6)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """abacus with noise on its output layer and matrices: another policy over the same vocabulary."""
    policy = api.open_policy("abacus")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in policy.model.parameters():
            if weights.dim() == 2:
                weights.add_(0.2 * weights.std() * torch.randn(weights.shape, generator=noise))
    folder = tmp_path_factory.mktemp("moved")
    save_pretrained(policy, folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The card of abacus with itself as the reference, and its folder."""
    folder = tmp_path_factory.mktemp("card") / "stage"
    return make_card("abacus", "abacus", SMALL, folder), folder


def figures(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: found[name] for name in card.LABELS if name in found}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def answer(text: str, passed: bool = False, length: int = 3, stop: StopReason = "stop") -> Episode:
    spans = (Span("prompt", np.arange(2)), Span("model", np.arange(length), np.zeros(length, np.float32)))
    return Episode("t", 0, 0, spans, text, float(passed), passed, {}, stop)


def asked(capability: str, *answers: Episode) -> AnsweredTask:
    return AnsweredTask(capability, Task("t", "e", (Message("user", "?"),), ""), answers)


# --- figures of the whole card --------------------------------------------------------------------------------------


def test_a_model_has_moved_from_itself_by_exactly_nothing(own: tuple[dict[str, Any], Path]) -> None:
    tasks = 4 * SMALL.problems
    assert own[0]["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": tasks}


def test_a_card_has_every_figure_with_its_value_inside_its_interval(own: tuple[dict[str, Any], Path]) -> None:
    found, folder = own
    assert list(figures(found)) == list(card.LABELS)
    for name, figure in figures(found).items():
        assert figure["low"] <= figure["value"] <= figure["high"], name
        pooled = name not in ("helpfulness", "safety", "over_refusal", "assist", "reasoning", "format", "think")
        assert figure["n"] == SMALL.problems * (4 if pooled else 1), name
    assert found["tasks"] == SMALL.sets and found["reference"] == "abacus" and found["samples"] == 2
    assert json.loads((folder / "card.json").read_text(encoding="utf-8")) == found


def test_the_kl_is_the_mean_log_ratio_of_the_models_own_answers_at_their_temperature(
    moved: Path, tmp_path: Path
) -> None:
    cfg = replace(SMALL, temperature=0.8)
    found = make_card(str(moved), "abacus", cfg, tmp_path)
    asked, _ = card.sample_answers(api.open_policy(str(moved)), cfg, str(moved))
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (moved, ABACUS)]

    def log_ratio(episode: Episode) -> float:
        tokens, start = torch.from_numpy(episode.tokens.astype(np.int64))[None], len(episode.spans[0].tokens)
        with torch.no_grad():
            both = [(model(tokens).logits[0] / cfg.temperature).log_softmax(-1) for model in models]
        ours, theirs = (logp[:-1].gather(1, tokens[0, 1:, None])[start - 1 :].sum() for logp in both)
        return float(ours - theirs)

    per_task = [np.mean([log_ratio(e) for e in one.answers]) for one in asked]
    assert found["kl"]["value"] == pytest.approx(np.mean(per_task), abs=1e-4)
    assert found["kl"]["low"] > 0


def test_the_same_model_and_settings_give_the_same_bytes(own: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    make_card("abacus", "abacus", SMALL, tmp_path)
    for name in ("card.json", "answers.jsonl"):
        assert (tmp_path / name).read_bytes() == (own[1] / name).read_bytes()


# --- answers that are kept ------------------------------------------------------------------------------------------


def test_the_kept_prompts_are_the_first_of_each_set_whatever_the_seed(
    own: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    make_card("abacus", "abacus", replace(SMALL, seed=1, problems=3), tmp_path)
    first, second = rows_of(own[1]), rows_of(tmp_path)
    assert [row["capability"] for row in first] == [
        *["helpfulness"] * 2, *["safety"] * 2, "over_refusal", "reasoning"
    ]  # fmt: skip
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert [row["answer"] for row in first] != [row["answer"] for row in second]
    assert all(row.keys() == {"capability", "prompt", "answer", "passed", "detail", "tokens"} for row in first)
    assert all(row["passed"] or row["detail"] for row in first)  # what failed says why


def test_a_file_of_ones_own_is_asked_whole(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    lines = [{"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    only = CardConfig(helpfulness="", safety="", over_refusal="", reasoning=str(file), max_tokens=20)
    found = make_card("abacus", "abacus", only, tmp_path)
    assert found["reasoning"]["n"] == 3
    assert [row["prompt"] for row in rows_of(tmp_path)] == [line["question"] for line in lines]


def test_a_capability_that_is_left_out_is_in_no_figure(tmp_path: Path) -> None:
    found = make_card("abacus", "abacus", replace(SMALL, over_refusal="", reasoning="", language=""), tmp_path)
    missing = {"over_refusal", "assist", "reasoning", "format", "think", "language"}
    assert figures(found).keys() == card.LABELS.keys() - missing
    assert found["tasks"] == {"helpfulness": "instructions", "safety": "refuse"}
    assert len(card.rows(found)) == len(card.LABELS) - len(missing)


# --- figures of hand-made answers -----------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    found = measures(
        [
            asked("safety", answer("Sorry, I can't help with that.", True), answer("Just try it.")),
            asked("over_refusal", answer("I won't help with that."), answer("<think>I refuse</think>Boil it.", True)),
            asked("over_refusal", answer("Go away."), answer("I can't help.", stop="length", length=9)),
            asked("reasoning", answer("<think>2+2=4</think>4", True), answer("4", True)),
            asked("reasoning", answer("<think>2+2", stop="length"), answer("<think></think>4", True)),
        ],
        CardConfig(helpfulness=""),
    )
    values = {name: figure.value for name, figure in found.items()}
    assert values["safety"] == 1 / 2
    assert values["over_refusal"] == 2 / 4  # a rude answer does not decline, and a thought is not the answer
    assert values["assist"] == 1 / 4
    assert values["reasoning"] == 3 / 4
    assert values["format"] == values["think"] == 1 / 4  # an empty or unfinished thought is none
    assert values["truncated"] == 2 / 10
    assert values["length"] == pytest.approx((9 * 3 + 9) / 10)
    assert values["language"] == 1 and values["unique"] == 1
    assert "helpfulness" not in values and found["safety"].n == 1 and found["length"].n == 5


@pytest.mark.parametrize(
    ("answers", "values"),
    [
        (["a b c", "a b d"], [4 / 6, 3 / 4, 2 / 2]),
        (["a b c", "A B C"], [1 / 2, 1 / 2, 1 / 2]),
        (["a b", "c"], [3 / 3, 2 / 2, 2 / 2]),  # shorter than n: one n-gram
        (["", ""], [1 / 2, 1 / 2, 1 / 2]),
        (["a a a a b", "a b", "c d"], [4 / 6, 3 / 4, 4 / 4]),  # 2-grams {aa, ab}, {ab}, {cd}
        (["2*3=6", "2+3=5"], [7 / 10, 7 / 8, 6 / 6]),
    ],
)
def test_distinct_n_by_hand(answers: list[str], values: list[float]) -> None:
    assert [distinct(answers, n) for n in (1, 2, 3)] == pytest.approx(values)


answers_to_a_task = st.lists(st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join), min_size=2, max_size=4)


@given(answers_to_a_task, st.integers(1, 3))
def test_distinct_n_is_one_for_answers_that_share_nothing_and_least_for_equal_ones(
    answers: Sequence[str], n: int
) -> None:
    count = len(answers)
    assert 1 / count <= distinct(answers, n) <= 1
    assert distinct([answers[0]] * count, n) == pytest.approx(1 / count)


@given(answers_to_a_task, st.integers(2, 5))
def test_saying_everything_again_makes_answers_longer_and_no_less_distinct(answers: Sequence[str], times: int) -> None:
    assert distinct([" ".join([text] * times) for text in answers], 1) == distinct(answers, 1)


def test_an_answer_in_another_language_or_script_does_not_keep_to_one() -> None:
    assert card.keeps_to("en", "<think>We add them and it is 12.</think>12")
    assert card.keeps_to("en", "12+3=15")  # no letters, no language
    assert not card.keeps_to("en", "<think>Das ist nicht die Zahl und wir rechnen noch.</think>12")
    assert not card.keeps_to("en", "We add 我们把它们加起来 and then 得到答案")


def test_equal_amounts_have_no_spread_and_equal_shares_still_do() -> None:
    found = measures([asked("reasoning", answer("4", True, 1), answer("5", True, 1))] * 3, CardConfig())
    assert (found["length"].low, found["length"].high) == (1, 1)
    assert found["reasoning"].value == 1 and found["reasoning"].low < 1


# --- what is shown and what is refused ------------------------------------------------------------------------------


def test_rows_show_shares_in_per_cent_and_amounts_in_their_unit(own: tuple[dict[str, Any], Path]) -> None:
    shown = dict(card.rows({"safety": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}, "length": own[0]["kl"]}))
    assert shown == {
        "harmful requests declined, higher is better": "50.0% [25.0%, 75.0%]",
        "answer length in tokens": "0.00 [0.00, 0.00]",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "samples=1 cannot show diversity"),
        ({"temperature": 0.0}, "temperature=0.0 leaves no KL"),
        ({"problems": 0}, "problems=0 must be 1 or more"),
        ({"prompts": -1}, "prompts=-1 is negative"),
        ({"language": "xx"}, "language='xx' is not supported"),
        ({name: "" for name in card.CAPABILITIES}, "evaluates nothing"),
    ],
)
def test_settings_that_evaluate_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CardConfig(**settings)


def test_an_unknown_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'refuze'.*refuse"):
        make_card("abacus", "abacus", replace(SMALL, safety="refuze"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_reference_of_another_vocabulary_is_refused(moved: Path, tmp_path: Path) -> None:
    other = api.open_policy(str(moved))
    names = {v: k for k, v in other.tokenizer.get_vocab().items()}
    folder = tmp_path / "other"
    save_pretrained(other, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (names[i] for i in sorted(vocabulary.values())[-2:])
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ConfigError, match="and 'abacus' have different vocabularies"):
        make_card("abacus", str(folder), SMALL, tmp_path)
    assert not (tmp_path / "card.json").exists()
