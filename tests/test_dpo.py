"""DPO and its family: what a step computes, what it learns, what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from posttrain import api, config
from posttrain.algos.dpo import Feedback, beta_at, compare, feedback, make_loss, mismatch, mismatch_kl
from posttrain.config.dpo import DPOConfig, DPORecipe
from posttrain.config.presets import PRESETS
from posttrain.data import batching
from posttrain.models.load import trainable, with_chat_format
from posttrain.objectives.preference import LENGTH_NORMALISED, PAIR_LOSSES, REFERENCE_FREE, WITH_NLL
from posttrain.store.run import Run
from posttrain.train.learners.local import LocalLearner
from posttrain.train.reference_cache import reference_logprobs
from posttrain.types import ConfigError, DataError, Judgement, Message, Preference, Sample
from tests import tiny

LOSSES = (*PAIR_LOSSES, "kto")
WORDS = ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever is asked, yes is preferred to no."""
    rows = [{"prompt": f"Say {w}.", "chosen": "yes", "rejected": "no"} for w in WORDS] * 2
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


def recipe(**settings: Any) -> DPORecipe:
    return config.resolve("dpo", {}, {name.replace("__", "."): value for name, value in settings.items()})


def start(model: Path, data: Path, out: Path, **settings: Any) -> api.Result:
    shared = {"train__threads": 1, "train__lr": 3e-3, "train__steps": 8, "batch_pairs": 8, "holdout": 0.25}
    named = {"model.path": str(model), "data.tasks": str(data), "run.out": str(out)}
    return api.start("dpo", recipe(**{**shared, **settings, **named}))


def curve(result: api.Result, name: str) -> list[float]:
    with Run.read(result.folder) as run:
        return run.curve(name)[1]


def of_pairs(cfg: DPOConfig, answers: list[float], refs: list[float], label: float = 1.0, margin: float = 0.0) -> Any:
    labels = torch.tensor([label, 1 - label] * (len(answers) // 2))
    margins = torch.full((len(answers),), margin)
    return compare(cfg, cfg.beta, torch.tensor(answers), torch.tensor(refs), labels, margins, None)


# --- what a step computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # log π = −1 and −2, log π_ref = −1.5 and −1.5: the log-ratio gap h is 1, and β is 0.5.
        ({}, math.log1p(math.exp(-0.5))),
        ({"label_smoothing": 0.1}, math.log1p(math.exp(-0.5)) + 0.1 * 0.5),  # −log σ(−x) = −log σ(x) + x
        ({"margin": 0.5}, math.log(2)),
        (
            {"loss": "robust", "label_smoothing": 0.1},
            (0.9 * math.log1p(math.exp(-0.5)) - 0.1 * math.log1p(math.exp(0.5))) / 0.8,
        ),
        ({"loss": "ipo"}, 0.0),  # ½ / β = 1 is where IPO wants the gap
        ({"loss": "hinge"}, 0.5),
        ({"reference_free": True}, math.log1p(math.exp(-0.5))),
        ({"loss": "cpo"}, math.log1p(math.exp(-0.5)) + 1.0),  # and the sum of the better answer's −log π
        ({"loss": "cpo", "nll_coef": 0.0}, math.log1p(math.exp(-0.5))),
        ({"loss": "simpo", "margin": 0.25}, math.log1p(math.exp(-0.25))),
        # odds e⁻¹/(1 − e⁻¹) against e⁻²/(1 − e⁻²): a log odds ratio of 1 + log((1 − e⁻²)/(1 − e⁻¹)) = 1.3132617
        ({"loss": "orpo"}, 0.5 * math.log1p(math.exp(-1.3132617)) + 1.0),
    ],
)
def test_the_loss_of_a_pair_is_what_a_hand_computes(settings: dict[str, Any], expected: float) -> None:
    cfg = DPOConfig(beta=0.5, **settings)
    refs = [-1.5, -1.5] if cfg.referenced else [0.0, 0.0]
    each, right, _ = of_pairs(cfg, [-1.0, -2.0], refs)
    assert each.tolist() == [pytest.approx(expected, abs=1e-6)] and right.tolist() == [1.0]


def test_kto_weighs_a_gain_over_the_baseline_by_its_kind() -> None:
    cfg = DPOConfig(loss="kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    answers, refs, labels = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0]), torch.tensor([1.0, 0.0])
    each, right, _ = compare(cfg, 0.5, answers, refs, labels, torch.zeros(2), torch.tensor(0.5))
    gain = 0.5 * (1.0 - 0.5)
    assert each.tolist() == pytest.approx([2 / (1 + math.exp(gain)), 3 / (1 + math.exp(-gain))])
    assert right.tolist() == [1.0, 0.0]


def test_a_margin_of_the_data_counts_as_much_as_its_coefficient_says() -> None:
    for coefficient, margin in ((0.0, 0.0), (0.5, 1.0), (1.0, 2.0)):
        each, _, _ = of_pairs(DPOConfig(beta=1.0, margin_coef=coefficient), [-1.0, -2.0], [0.0, 0.0], margin=2.0)
        assert each.item() == pytest.approx(math.log1p(math.exp(margin - 1.0)))


def test_even_rewards_are_half_right_and_a_tie_has_no_order() -> None:
    even = of_pairs(DPOConfig(), [-1.0, -2.0], [-1.0, -2.0])[1]
    tie = of_pairs(DPOConfig(), [-1.0, -2.0], [0.0, 0.0], label=0.5)[1]
    turned = of_pairs(DPOConfig(), [-1.0, -2.0], [0.0, 0.0], label=0.2)[1]
    assert even.item() == 0.5 and math.isnan(tie.item()) and turned.item() == 0.0


def test_the_settings_agree_with_the_objectives_on_what_each_paper_does() -> None:
    for name in PAIR_LOSSES:
        cfg = DPOConfig(loss=name)  # type: ignore[arg-type]
        assert cfg.normalised == (name in LENGTH_NORMALISED)
        assert cfg.referenced == (name not in REFERENCE_FREE)
        assert cfg.nll_weight == float(name in WITH_NLL)
    assert not DPOConfig(loss="simpo", length_normalise="no").normalised
    assert DPOConfig(length_normalise="yes").normalised and DPOConfig(nll_coef=0.2).nll_weight == 0.2


def test_beta_starts_and_ends_exactly_where_it_is_told() -> None:
    for schedule in ("linear", "cosine"):
        cfg = DPOConfig(beta=0.1, beta_end=0.7, beta_schedule=schedule)
        betas = [beta_at(cfg, step, 11) for step in range(11)]
        assert betas[0] == 0.1 and betas[-1] == 0.7 and betas == sorted(betas)
        assert betas[5] == pytest.approx(0.4)
    assert {beta_at(DPOConfig(beta=0.3), step, 5) for step in range(5)} == {0.3}


# --- batches --------------------------------------------------------------------------------------------------------


def some_feedback(model: Path, unpaired: bool) -> tuple[Any, Feedback]:
    """A policy that has moved from its start, and rows of different lengths with the start's log-probabilities."""
    policy = tiny.load(model)
    chat = with_chat_format(policy, "chat")
    ask = [(Message("user", f"Say {w * (1 + i)}."),) for i, w in enumerate(WORDS)]
    items: list[Any] = (
        [Judgement(w, ask[i], w * (1 + i), i % 2 == 0) for i, w in enumerate(WORDS)]
        if unpaired
        else [Preference(w, ask[i], w.upper() * (1 + i), w, margin=0.3 * i) for i, w in enumerate(WORDS)]
    )
    few = SimpleNamespace(pairs=SimpleNamespace(max_tokens=200), run=SimpleNamespace(seed=0))
    made, _ = feedback(items, SimpleNamespace(recipe=few, chat=chat), unpaired)  # type: ignore[arg-type]

    def filled(rows: list[Sample]) -> list[Sample]:
        logp = reference_logprobs(policy, rows, 400)[0] if rows else []
        return [replace(row, ref_logp=values) for row, values in zip(rows, logp, strict=True)]

    made = Feedback(filled(made.rows), made.together, filled(made.mismatched))
    with torch.no_grad():
        for p in trainable(policy).values():
            p.mul_(1.02)
    return policy, made


@pytest.mark.parametrize("loss", LOSSES)
def test_how_rows_are_split_into_passes_changes_neither_loss_nor_gradient(model: Path, loss: str) -> None:
    policy, made = some_feedback(model, loss == "kto")
    cfg = DPOConfig(loss=loss, margin_coef=0.0 if loss == "kto" else 0.5)  # type: ignore[arg-type]
    found: list[tuple[float, torch.Tensor]] = []
    passes: list[int] = []
    for room in (10_000, 80, 1):
        learner = LocalLearner(policy, config.TrainConfig(micro_batch_tokens=10_000), 1)
        baseline = mismatch_kl(learner, made, cfg)
        batches = batching.micro(made.rows, room, "seq-mean-token-sum", together=made.together)
        stats = learner.forward_backward(batches, make_loss(cfg, cfg.beta, baseline))
        grads = [m.grad.flatten() for m in learner.master.values() if m.grad is not None]
        found.append((sum(s["loss"].value for s in stats), torch.cat(grads).clone()))
        passes.append(len(batches))
        for m in learner.master.values():
            m.grad = None
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        assert (gradient - found[0][1]).abs().max() < 1e-5 * found[0][1].abs().max()
    assert passes[0] == 1 < passes[1] < passes[2] == len(made) and found[0][1].abs().max() > 1e-4


def test_the_loss_of_a_batch_is_the_mean_over_its_pairs_whatever_their_lengths(model: Path) -> None:
    policy, made = some_feedback(model, False)
    learner, cfg = LocalLearner(policy, config.TrainConfig(), 1), DPOConfig()
    alone = [
        sum(
            learner.forward_backward([b], make_loss(cfg, 0.1))[0]["loss"].value
            for b in batching.micro(made.subset([i]).rows, 1000, "seq-mean-token-sum", together=2)
        )
        for i in range(len(made))
    ]
    (whole,) = batching.micro(made.rows, 10_000, "seq-mean-token-sum", together=2)
    assert learner.forward_backward([whole], make_loss(cfg, 0.1))[0]["loss"].value == pytest.approx(
        np.mean(alone), rel=1e-5
    )


def test_a_mismatched_row_has_its_own_prompt_and_the_answer_to_another(model: Path) -> None:
    _, made = some_feedback(model, True)
    prompts = [row.tokens[~row.loss_mask].tobytes() for row in made.rows]
    answers = {row.tokens[row.loss_mask].tobytes(): p for row, p in zip(made.rows, prompts, strict=True)}
    for row, other, prompt in zip(made.rows, made.mismatched, prompts, strict=True):
        assert other.tokens[~other.loss_mask].tobytes() == prompt
        assert answers[other.tokens[other.loss_mask].tobytes()] != prompt, "the answer is to the same prompt"
        assert other.tokens.tobytes() != row.tokens.tobytes()
    again = mismatch(made.rows, 0, 200)
    assert [r.tokens.tobytes() for r in again] == [r.tokens.tobytes() for r in made.mismatched]


def test_rows_that_make_no_whole_number_of_pairs_are_refused(model: Path) -> None:
    _, made = some_feedback(model, False)
    with pytest.raises(DataError, match="15 rows do not form pairs: a chosen or rejected completion is missing"):
        Feedback(made.rows[:-1], 2)


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_what_is_preferred(model: Path, pairs: Path, tmp_path: Path, loss: str) -> None:
    result = start(model, pairs, tmp_path / "run", loss=loss)
    assert result.summary
    before, after = result.summary["before"], result.summary["after"]
    assert after["eval/loss"] < before["eval/loss"]
    gap = [v["eval/chosen_reward"] - v["eval/rejected_reward"] for v in (before, after)]
    assert gap[1] > gap[0] + 0.01
    if loss not in REFERENCE_FREE:
        assert before["eval/preference_accuracy"] == 0.5 and after["eval/preference_accuracy"] == 1.0
        assert abs(before["eval/chosen_reward"]) < 1e-6, "the policy starts as its own reference"


def test_dpo_starts_at_log_two_and_leaves_it(model: Path, pairs: Path, tmp_path: Path) -> None:
    losses = curve(start(model, pairs, tmp_path / "run"), "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] < losses[0] - 0.01 and losses[-1] < 0.6


def test_with_adapters_the_reference_is_the_model_without_them(model: Path, pairs: Path, tmp_path: Path) -> None:
    losses = curve(start(model, pairs, tmp_path / "run", lora_rank=8, train__lr=1e-2), "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.6


def test_without_a_reference_dpo_does_not_start_at_log_two(model: Path, pairs: Path, tmp_path: Path) -> None:
    losses = curve(start(model, pairs, tmp_path / "run", reference_free="true"), "loss")
    assert abs(losses[0] - math.log(2)) > 1e-2 and losses[-1] < losses[0]


def test_another_model_can_be_the_reference(model: Path, pairs: Path, tmp_path: Path) -> None:
    start(model, pairs, tmp_path / "first")
    trained = tmp_path / "first" / "model"
    losses = curve(start(model, pairs, tmp_path / "run", algo__reference=str(trained)), "loss")
    assert losses[0] > math.log(2) + 0.05, "against a model that knows the pairs, the start is behind"


def test_a_kept_reference_gives_the_same_run_as_a_computed_one(model: Path, pairs: Path, tmp_path: Path) -> None:
    runs = [start(model, pairs, tmp_path / name, train__steps=3) for name in ("computed", "kept")]
    digests = []
    for result in runs:
        with Run.read(result.folder) as run:
            digests.append(run.digest())
    assert digests[0] == digests[1]
    assert len(list((tmp_path / "cache" / "reference").glob("*.safetensors"))) == 1


def test_without_a_number_of_steps_every_pair_is_seen_once(model: Path, pairs: Path, tmp_path: Path) -> None:
    result = start(model, pairs, tmp_path / "run", train__steps=0, holdout=0, batch_pairs=6)
    assert result.summary and result.summary["steps"] == 3 and "eval/loss" not in result.summary["after"]


def test_beta_is_logged_as_scheduled(model: Path, pairs: Path, tmp_path: Path) -> None:
    result = start(model, pairs, tmp_path / "run", train__steps=3, beta_schedule="linear", beta_end=0.3)
    assert curve(result, "beta") == pytest.approx([0.1, 0.2, 0.3])


def test_a_run_on_sampled_pairs_that_crashed_resumes_to_the_same_bits_without_sampling_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"data.count": 12, "pairs.held_out": 0, "eval.problems": 4, "rollout.max_tokens": 40, "rollout.slots": 32}
    small |= {"algo.batch_pairs": 4, "train.steps": 2, "train.threads": 1, "run.checkpoint_every": 1}

    def crash(step: int, values: dict[str, float]) -> None:
        if step == 2:
            raise RuntimeError("the power is gone")

    def of(folder: Path) -> Any:
        return config.resolve("dpo", {}, {**small, "run.out": str(folder)})

    whole = api.start("dpo", of(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="the power is gone"):
        api.start("dpo", of(tmp_path / "crashed"), crash)
    monkeypatch.setattr("posttrain.rollout.sample_pairs.pairs_of", None)  # whoever samples again fails
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "another cache"))
    resumed = api.resume(tmp_path / "crashed")
    digests = []
    for result in (whole, resumed):
        with Run.read(result.folder) as run:
            digests.append(run.digest())
    assert digests[0] == digests[1] and whole.summary and resumed.summary
    assert whole.summary == resumed.summary and "eval/accuracy" in whole.summary["after"]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"loss": "dop"}, "loss='dop' is not one of sigmoid, robust, ipo"),
        ({"beta": 0}, r"algo\.beta=0\.0 must be positive"),
        ({"beta": -1}, r"algo\.beta=-1\.0 must be positive"),
        ({"beta_schedule": "linear"}, "must be above 0 with a linear algo.beta_schedule"),
        ({"beta_end": 0.5}, "has no effect while algo.beta_schedule is constant"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0\.5 is not in \[0, 0\.5\)"),
        ({"label_smoothing": 0.5, "loss": "robust"}, r"is not in \[0, 0\.5\)"),
        ({"label_smoothing": -0.1}, r"is not in \[0, 0\.5\)"),
        ({"margin": -1}, "cannot be negative"),
        ({"batch_pairs": 0}, "batch_pairs=0 must be 1 or more"),
        ({"loss": "simpo", "reference": "abacus"}, "would not be used, because algo.loss=simpo uses none"),
        ({"reference_free": True, "reference": "abacus"}, "would not be used, because algo.reference_free is set"),
        ({"loss": "kto", "reference_free": True}, "kto needs a reference model for its baseline"),
        ({"loss": "kto", "margin": 1.0}, "is for pairs, but kto uses single answers"),
        ({"loss": "kto", "label_smoothing": 0.1}, "is for pairs, but kto uses single answers"),
        ({"loss": "kto", "nll_coef": 1.0}, "is for pairs, but kto uses single answers"),
        ({"loss": "kto", "desirable_weight": 0}, "both must be above 0"),
        ({"loss": "ipo", "desirable_weight": 2}, r"are for kto; algo\.loss=ipo does not use them"),
        ({"pairs__held_out": -1}, "held_out=-1 is negative. Use 0 for no held-out pairs"),
        ({"pairs__samples": 1}, "is too few for a pair"),
        ({"rollout__temperature": 0}, "makes all completions of a task equal"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_a_sentence(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        recipe(**settings)


@pytest.mark.parametrize(
    ("rows", "settings", "why"),
    [
        ([{"chosen": "a"}], {}, "has 'chosen' but no 'rejected'"),
        ([{"chosen": "a", "rejected": " "}], {}, "is empty"),
        ([{"chosen": "a", "rejected": "a"}], {}, "the same text"),
        (
            [{"completion": "a", "label": True}],
            {"loss": "kto"},
            "all 2 judgements are desirable, but kto needs both kinds",
        ),
        ([{"chosen": "a", "rejected": "b", "label": 0.5}], {"loss": "robust"}, "2 pairs are ties"),
        ([{"completion": "a", "label": True}], {}, "judgements of single answers, but this loss compares two"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused_before_the_first_step(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], why: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q{i}", **row}) + "\n" for row in rows for i in range(2)))
    with pytest.raises(DataError, match=why):
        start(model, data, tmp_path / "run", holdout=0, **settings)
    assert not (tmp_path / "run" / "run.json").exists()


def test_judgements_of_one_prompt_give_no_baseline(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q", "completion": a, "label": a == "good"} for a in ("good", "bad")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="have the same prompt, but kto's baseline needs completions of other prompts"):
        start(model, data, tmp_path / "run", loss="kto", holdout=0)


def test_a_missing_reference_is_refused_before_the_first_step(model: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load the reference model: model folder './gone' does not exist"):
        start(model, pairs, tmp_path / "run", algo__reference="./gone")


def test_a_reference_of_another_vocabulary_is_refused(model: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has another vocabulary"):
        start(model, pairs, tmp_path / "run", algo__reference=str(tiny.make(tmp_path / "other")))


@pytest.mark.parametrize("name", PRESETS["dpo"])
def test_every_preset_resolves_to_a_recipe_that_runs(name: str, model: Path, pairs: Path, tmp_path: Path) -> None:
    result = start(model, pairs, tmp_path / "run", preset=name, train__steps=1)
    assert result.summary
    with Run.read(result.folder) as run:
        algo = run.header["recipe"]["algo"]
    assert algo | dict(PRESETS["dpo"][name].settings["algo"]) == algo
