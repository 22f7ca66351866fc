"""Step and outcome verifiers: where steps end, what they are labelled with, and what is learned from that."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from posttrain import api, config
from posttrain.algos.prm import auc, held_out, joint_loss, labelled_rows, loss, resampled
from posttrain.config import ModelConfig, RewardConfig, TrainConfig
from posttrain.config.prm import PRMConfig
from posttrain.data import batching
from posttrain.data.chat import ChatFormat
from posttrain.data.preferences import read_solutions
from posttrain.data.solutions import graded
from posttrain.data.sources import Row, read_rows
from posttrain.data.steps import split_steps, step_ends, step_row
from posttrain.models import heads
from posttrain.models.load import load_policy
from posttrain.rewards.models import joined_steps, load_reward_model
from posttrain.rewards.verifiers import exact
from posttrain.rollout.build import with_opening
from posttrain.rollout.collector import Collector
from posttrain.rollout.generator import OnDone, OnToken, Request
from posttrain.rollout.sample_solutions import (
    checked_steps,
    first_mistakes,
    graded_sample,
    sample_solutions,
    step_values,
)
from posttrain.store.run import Run
from posttrain.train.forward import step_scores, step_scores_and_likelihood
from posttrain.train.learner import make_learner
from posttrain.types import Completion, ConfigError, DataError, Message, SamplingParams, Solution, Task
from tests import tiny
from tests.conftest import shared

ASK = (Message("user", "Go."),)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and solutions whose right steps are of `o` and whose wrong ones are of `x`."""
    folder = tmp_path_factory.mktemp("prm")
    tiny.chatty(folder / "base")
    lines: list[str] = []
    for n in range(120):
        wrong = None if n % 3 == 0 else n % 3
        steps = ["xx" if i == wrong else "oo" for i in range(1 + n % 4 if wrong is None else wrong + 2)]
        row = {"question": f"Go {n}.", "steps": steps, "mistake_index": wrong, "answer": "o", "target": "o"}
        lines.append(json.dumps({**row, "answer": "o" if wrong is None else "x"}) + "\n")
    (folder / "steps.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def chat(root: Path) -> ChatFormat:
    return ChatFormat(load_policy(ModelConfig(path=str(root / "base"))).tokenizer)


def train(root: Path, name: str, **settings: Any) -> Path:
    base = {"model.path": str(root / "base"), "data.tasks": str(root / "steps.jsonl"), "run.out": str(root / name)}
    quick = {"algo.batch_rows": 16, "train.lr": 1e-2, "data.holdout": 0.3, "train.threads": 1, "train.steps": 15}
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return api.start("prm", config.resolve("prm", {}, {**base, **quick, **dotted})).folder


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    return train(root, "trained")


# --- where steps end -------------------------------------------------------------------------------------------------


@given(st.text(alphabet="ab ,\n", max_size=20), st.sampled_from(["\n", ", ", "\n\n", "b"]))
def test_steps_joined_are_the_answer_again_and_end_in_order_with_words(text: str, separator: str) -> None:
    steps = split_steps(text, separator)
    ends = step_ends(steps, separator)
    assert separator.join(steps) == text if text.strip() else steps == []
    assert ends == sorted(ends) and len(ends) == len(steps)
    assert all(step.strip() for step in steps)


def test_blank_steps_are_none_and_white_space_belongs_to_no_step() -> None:
    assert split_steps("one\n\ntwo \n", "\n") == ["one\n", "two \n"]
    assert step_ends(["one\n", "two \n"], "\n") == [3, 8]
    assert step_ends(["a", "b"], ", ") == [1, 4]
    assert split_steps(" \n ", "\n") == []


@pytest.mark.parametrize("form", ["chat", "plain"])
@pytest.mark.parametrize("answer", ["one\ntwo", " a é step\n<eos> is text\nlast", "tail \n\nend\n"])
def test_a_step_is_read_at_the_last_token_of_its_own_words(chat: ChatFormat, form: Any, answer: str) -> None:
    own = ChatFormat(chat._tokenizer, form)  # pyright: ignore[reportPrivateUsage]
    steps = split_steps(answer, "\n")
    row = step_row(own, ASK, answer, step_ends(steps, "\n"), [0.25 * i for i in range(len(steps))])
    where = np.flatnonzero(row.loss_mask)
    begin = len(own.prompt_tokens(ASK))
    for i, at in enumerate(where):
        assert own.decode(row.tokens[begin : at + 1]) == answer[: step_ends(steps, "\n")[i]]
    assert row.returns is not None and row.returns[where].tolist() == [0.25 * i for i in range(len(steps))]
    assert row.tokens[-1] in own.stop_ids


def test_two_labels_for_one_token_are_refused(chat: ChatFormat) -> None:
    with pytest.raises(DataError, match="two steps of 'ab' end in the same token"):
        step_row(chat, ASK, "ab", [2, 2], [1.0, 0.0])


# --- the loss and the numbers ----------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_the_steps_with_their_soft_labels(chat: ChatFormat) -> None:
    rows = [step_row(chat, ASK, "a\nb", [1, 3], [1.0, 0.25]), step_row(chat, ASK, "c", [1], [0.0])]
    (batch,) = batching.micro(rows, 999, "token-mean")
    logits = torch.full(batch.tokens.shape, 7.0)  # anything, where nothing is judged
    logits[batch.mask] = torch.tensor([2.0, -1.0, 0.5])
    value, stats = loss(logits, batch)
    nats = [
        math.log1p(math.exp(-2)),
        0.25 * math.log1p(math.exp(1)) + 0.75 * math.log1p(math.exp(-1)),
        math.log1p(math.exp(0.5)),
    ]
    assert value.item() == pytest.approx(sum(nats) / 3)
    assert stats["step_accuracy"].value == pytest.approx(2 / 3)


def test_the_language_modelling_loss_adds_the_likelihood_of_whole_rows(root: Path, chat: ChatFormat) -> None:
    """Hand-worked for two rows of two and one steps: 2/3 and 1/3 of their mean negative log-probabilities."""
    policy = heads.attach_scalar(load_policy(ModelConfig(path=str(root / "base"))), 1, 0)
    rows = [step_row(chat, ASK, "a\nb", [1, 3], [1.0, 0.25]), step_row(chat, ASK, "c", [1], [0.0])]
    (batch,) = batching.micro(rows, 999, "token-mean")
    logits, likelihood = step_scores_and_likelihood(policy, batch)
    torch.testing.assert_close(logits, step_scores(policy, batch)[0])
    plain = AutoModelForCausalLM.from_pretrained(root / "base")
    for row, (mean,) in zip(rows, likelihood.tolist(), strict=True):
        logp = plain(torch.from_numpy(row.tokens[None].astype(np.int64))).logits[0].log_softmax(-1)
        each = [logp[i - 1, token].item() for i, token in enumerate(row.tokens.tolist()) if i]
        assert mean == pytest.approx(np.mean(each), rel=1e-4)
    value, stats = joint_loss(0.5)(logits, likelihood, batch)
    nats = -likelihood[:, 0]
    assert value.item() == pytest.approx(loss(logits, batch)[0].item() + 0.5 * (2 * nats[0] + nats[1]).item() / 3)
    assert stats["lm_loss"].value == pytest.approx(nats.mean().item())


def test_auc_is_the_chance_that_a_right_one_scores_higher_ties_half() -> None:
    right = np.array([False, False, True, True])
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), right) == 0.75
    assert auc(np.array([0.5, 0.5, 0.5, 0.5]), right) == 0.5
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([True, True])))


def test_intervals_draw_the_steps_of_a_solution_together() -> None:
    """Ten copies of each of 20 values carry no more than the 20: the interval must not shrink."""
    values = np.arange(20) / 20
    alone = resampled(np.arange(20), lambda i: float(values[i].mean()))
    copies = np.repeat(values, 10)
    together = resampled(np.repeat(np.arange(20), 10), lambda i: float(copies[i].mean()))
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * np.std(values) / math.sqrt(20), rel=0.15)


def test_steps_are_joined_by_minimum_product_last_or_mean_of_their_probabilities() -> None:
    logits = torch.tensor([0.0, 3.0, -1.0])
    p = torch.sigmoid(logits.double()).tolist()
    expected = {"min": min(p), "product": math.prod(p), "last": p[2], "mean": sum(p) / 3}
    assert {how: joined_steps(logits, how) for how in expected} == pytest.approx(expected)
    assert joined_steps(logits[:0], "min") == 0.0  # a blank answer


# --- labels from files -----------------------------------------------------------------------------------------------


def test_only_steps_up_to_the_first_mistake_are_trained_and_all_are_read_in_an_examination(chat: ChatFormat) -> None:
    row = Row("s.jsonl:1", {"input": "Go.", "steps": ["a", "b", "c"], "mistake_index": 1, "answer": "x", "target": "y"})
    one = graded(row, PRMConfig())
    assert (one.known, one.right, one.solution.labels) == (2, False, (1.0, 0.0, 0.0))
    (learned,), _ = labelled_rows([one], chat, PRMConfig())
    (examined,), _ = labelled_rows([one], chat, PRMConfig(), whole=True)
    assert learned[1].loss_mask.sum() == 2 and examined[1].loss_mask.sum() == 3
    assert graded(row, PRMConfig(after_mistake="wrong")).known == 3
    outcome = graded(row, PRMConfig(level="outcome"))
    assert outcome.solution.steps == ("a\nb\nc",) and outcome.solution.labels == (0.0,)
    (whole,), _ = labelled_rows([outcome], chat, PRMConfig(level="outcome"))
    assert np.flatnonzero(whole[1].loss_mask).tolist() == [len(whole[1].tokens) - 1]


def test_the_steps_of_big_bench_mistake_are_labelled_as_its_annotators_did(chat: ChatFormat) -> None:
    rows = read_rows(str(shared("data", "big-bench-mistake", "multistep_arithmetic.jsonl")), 0)
    found = [graded(row, PRMConfig()) for row in rows]
    wrong = [row.values["mistake_index"] for row in rows]
    assert (
        len(found) == 300
        and [one.known - 1 if m is not None else None for one, m in zip(found, wrong, strict=True)] == wrong
    )
    assert all(one.solution.labels[m] == 0 for one, m in zip(found, wrong, strict=True) if m is not None)
    labelled, notes = labelled_rows(found[:5], chat, PRMConfig(max_tokens=10000))
    assert notes == [] and [int(row.loss_mask.sum()) for _, row in labelled] == [one.known for one in found[:5]]


# --- labels from rollouts --------------------------------------------------------------------------------------------


class Scripted:
    """A generator that ends the answer with the letters it is told to, by prompt text and attempt."""

    version = 0

    def __init__(self, chat: ChatFormat, say: Any) -> None:
        self.chat, self.say, self.prompts = chat, say, list[str]()

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        out: list[list[Completion]] = []
        for request in requests:
            begun = self.chat.decode(request.prompt)
            self.prompts.append(begun)
            texts = [self.say(begun, i) for i in range(len(request.seeds))]
            rows = [[*self.chat.text_tokens(text)[0]][1:] if text else [2] for text in texts]
            out.append([Completion(np.array(r), np.zeros(len(r)), np.zeros(len(r)), "stop") for r in rows])
        return out

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.version = version

    def weights(self) -> dict[str, torch.Tensor]:
        return {}


def collector(chat: ChatFormat, say: Any) -> Collector:
    return Collector(
        Scripted(chat, say), lambda t: chat.prompt_tokens(t.messages), chat.decode, exact, SamplingParams(), seed=0
    )


def test_a_steps_label_is_the_share_of_its_completions_that_end_right(chat: ChatFormat) -> None:
    def say(begun: str, attempt: int) -> str:  # right after `a` in one attempt of four, after `b` in three
        return " #### 7" if attempt < (3 if "b;" in begun else 1) else " #### 8"

    own = collector(chat, say)
    task = Task("t", "mine", ASK, "7")
    cfg = PRMConfig(separator=";", completions=4)
    assert step_values(own, chat, [("t#0", task, ["a", "b", " #### 9"])], cfg) == [[0.25, 0.75]]
    assert step_values(
        own, chat, [("t#0", task, ["a", "b", " #### 9"])], PRMConfig(separator=";", completions=4, labels="hard")
    ) == [[1.0, 1.0]]
    assert [text.rpartition("Go.")[2] for text in own.generator.prompts[:2]] == ["a;", "a;b;"]  # type: ignore[attr-defined]


def test_sampled_solutions_begin_as_told_and_end_with_the_label_of_their_own_answer(chat: ChatFormat) -> None:
    def say(begun: str, attempt: int) -> str:
        if begun.endswith("Start"):
            return (";x; #### 7", ";y; #### 8", " and one step only", ";x; #### 7")[attempt]
        return " #### 7"

    own = collector(chat, say)
    cfg = PRMConfig(separator=";", completions=2, solutions=4, opening="Start")
    found, answers = sample_solutions(own, chat, [Task("t", "mine", ASK, "7")], cfg)
    assert answers == 4  # of which one has no second step and one repeats another
    assert [(one.id, one.steps, one.labels) for one in found] == [
        ("t#0", ("Start", "x", " #### 7"), (1.0, 1.0, 1.0)),
        ("t#1", ("Start", "y", " #### 8"), (1.0, 1.0, 0.0)),
    ]
    assert with_opening(own, chat, "") is own


@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4))
def test_binary_search_finds_the_first_mistake_of_hard_labels_with_few_completions(
    chat: ChatFormat, lengths: list[tuple[int, int]]
) -> None:
    """Steps `a` are right and `x` wrong, and every completion after an `x` is wrong: OmegaPRM = hard labels."""
    task = Task("t", "mine", ASK, "7")
    solutions = [
        (f"t#{n}", task, ["a" if i < right else "x" for i in range(length)], right >= length)
        for n, (length, right) in enumerate(lengths)
    ]
    own = collector(chat, lambda begun, _: " #### 8" if "x" in begun.rpartition("Go.")[2] else " #### 7")
    cfg = PRMConfig(separator=";", completions=2)
    hard = step_values(own, chat, [one[:3] for one in solutions], replace(cfg, labels="hard"))
    own.generator.prompts.clear()  # type: ignore[attr-defined]
    assert first_mistakes(own, chat, solutions, cfg) == hard
    asked = len(own.generator.prompts)  # type: ignore[attr-defined]
    assert asked <= sum(
        math.ceil(math.log2(length)) for _, _, steps, right in solutions if (length := len(steps)) and not right
    )


def test_the_steps_after_a_first_mistake_are_left_out_or_wrong(chat: ChatFormat) -> None:
    """Hand-worked: `10+70=80, 2+2=5, 80+5=85` breaks at its second step."""
    task = Task("t", "sums", ASK, "84", {"skill": "reasoning", "kind": "sums", "numbers": [12, 72]})
    steps = ["<think>10+70=80", "2+2=5", "80+5=85</think>85"]
    assert checked_steps(task, steps, ", ") == [1.0, 0.0, 0.0]
    one = Solution("t#0", ASK, tuple(steps), (1.0, 0.0, 0.0))
    known = {
        (labels, after): graded_sample(one, PRMConfig(after_mistake=after), labels).known
        for labels in ("soft", "hard", "first-mistake", "program")
        for after in ("drop", "wrong")
    }
    assert known == {key: 2 if key[0] in ("first-mistake", "program") and key[1] == "drop" else 3 for key in known}


# --- whole runs ------------------------------------------------------------------------------------------------------


def summary(folder: Path) -> dict[str, Any]:
    with Run.read(folder) as run:
        found = run.summary()
    assert found is not None
    return found


def test_a_process_model_learns_which_steps_are_wrong_and_finds_the_first(trained: Path) -> None:
    before, after = summary(trained)["before"], summary(trained)["after"]
    assert before["eval/first_mistake"] < 0.7
    assert after["eval/step_auc_low"] > 0.95 and after["eval/first_mistake_low"] > 0.8
    assert after["eval/outcome_auc"] > 0.95 and after["eval/step_loss"] < before["eval/step_loss"] / 2
    assert after["eval/middle_step_auc_low"] > 0.9
    assert "eval/first_step_auc" not in after  # no first step is wrong


def test_a_process_model_also_learns_with_a_language_modelling_loss(root: Path) -> None:
    folder = train(root, "joint", algo__lm_coef=0.5)
    assert summary(folder)["after"]["eval/step_auc_low"] > 0.9
    with Run.read(folder) as run:
        losses = [value for _, _, value in run.metrics("lm_loss")]
    assert losses[-1] < losses[0]


def test_an_outcome_model_learns_from_whole_answers(root: Path) -> None:
    after = summary(train(root, "outcome", algo__level="outcome", train__steps=25))["after"]
    assert after["eval/outcome_auc_low"] > 0.9 and "eval/step_auc" not in after
    scores = load_reward_model(str(root / "outcome"), RewardConfig()).scores(
        [(Task("a", "mine", (Message("user", "Go 0."),), ""), text) for text in ("oo\noo", "oo\nxx\noo")]
    )
    assert 1 >= scores[0] > 0.5 > scores[1] >= 0


def test_a_process_model_is_a_verifier_of_any_reply(trained: Path) -> None:
    scorer = load_reward_model(f"model:{trained}", RewardConfig())
    task = Task("t", "mine", (Message("user", "Go 5."),), "")
    good, bad, blank = scorer.score_all([(task, "oo\noo"), (task, "oo\nxx"), (task, " ")])
    assert good.passed and good.score > 0.5 > bad.score and not bad.passed
    assert blank.score == 0.0
    assert heads.about(api.open_policy(str(trained))) == {} and api.open_policy(str(trained)).scalar is not None


def test_solutions_are_sampled_once_and_read_back_when_the_run_goes_on(root: Path) -> None:
    (root / "rewards.py").write_text("def size(completion, answer): return len(completion) / 4")
    tiny.stopping(Path(shutil.copytree(root / "base", root / "stopping")))
    settings = {"data__tasks": "sums", "data__count": 12, "reward__name": f"{root / 'rewards.py'}:size"}
    sampling = {"rollout__max_tokens": 8, "rollout__slots": 32, "eval__problems": 6, "algo__opening": "a|"}
    small = {"algo__completions": 2, "algo__solutions": 8, "algo__separator": "|", "train__steps": 2}
    folder = train(root, "sampled", model__path=str(root / "stopping"), **settings, **sampling, **small)
    kept = read_solutions(folder / "solutions.jsonl")
    assert kept and all(len(one.steps) >= 2 and set(one.labels) <= {0.0, 0.5, 1.0} for one in kept)
    first = folder / "solutions.jsonl"
    stamp = first.stat().st_mtime_ns
    assert api.resume(folder).summary == summary(folder) and first.stat().st_mtime_ns == stamp


def test_no_held_out_solutions_means_no_metrics(root: Path) -> None:
    policy = load_policy(ModelConfig(path=str(root / "base")))
    assert held_out(make_learner(policy, TrainConfig(), 1, forward=step_scores), [], PRMConfig()) == ({}, [])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused_in_a_sentence(root: Path, chat: ChatFormat) -> None:
    with pytest.raises(ConfigError, match="algo.separator is empty, so every solution would be one step"):
        train(root, "refused", algo__separator="")
    with pytest.raises(ConfigError, match="completions=0 must be 1 or more"):
        train(root, "refused", algo__completions=0)
    long = graded(Row("f:1", {"question": "Go.", "steps": ["a" * 50], "labels": [1]}), PRMConfig())
    with pytest.raises(DataError, match="none of 1 solutions fits algo.max_tokens=20; raise it"):
        labelled_rows([long], chat, PRMConfig(max_tokens=20))
    with pytest.raises(DataError, match="no sampled answer to sums has two steps or more"):
        settings = {"data__tasks": "sums", "data__count": 4, "rollout__max_tokens": 4, "eval__problems": 2}
        train(root, "refused", **settings, algo__solutions=1, rollout__slots=32)
