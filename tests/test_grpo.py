"""The GRPO family: every preset is its paper's loss, and the options that cross all of them do what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_type_hints

import numpy as np
import pytest
import torch

import posttrain as pt
from posttrain import config
from posttrain.algos import grpo
from posttrain.config import PRESETS, GRPORecipe
from posttrain.data import batching
from posttrain.objectives.policy import POLICY_LOSSES
from posttrain.store.run import Run
from posttrain.types import ConfigError, Episode, Sample, Span
from tests import tiny

P, G, MAX_LEN = 3, 4, 12
Rows = list[np.ndarray]


# --- every preset is its paper's loss ------------------------------------------------------------------------------
# Written a second time from the papers: plain Python over rows of answer tokens, in float64. `frozen` is what they put
# under a stop-gradient, so that differences in `logp` alone give the gradient.


def seq_mean_token_mean(losses: Rows) -> float:
    return float(np.mean([row.mean() for row in losses]))


def token_mean(losses: Rows) -> float:
    return sum(row.sum() for row in losses) / sum(len(row) for row in losses)


def clipped(logp: np.ndarray, old: np.ndarray, a: float | np.ndarray, low: float, high: float) -> np.ndarray:
    r = np.exp(logp - old)
    return -np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)


def k3(logp: np.ndarray, ref: np.ndarray) -> np.ndarray:
    return np.exp(ref - logp) - 1 - (ref - logp)


def sample_std(rewards: np.ndarray, eps: float = 0.0) -> np.ndarray:
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + eps)


def paper_reinforce(x: Any) -> float:
    a = (x.rewards - x.rewards.mean()).ravel()  # the running mean starts at the first batch's own
    return float(np.mean([-ai * row.sum() for ai, row in zip(a, x.logp, strict=True)]))


def paper_rloo(x: Any) -> float:
    beta = 0.03
    kl = np.array([(o - f).sum() for o, f in zip(x.old, x.ref, strict=True)]).reshape(x.rewards.shape)
    r = x.rewards - beta * kl
    a = (r - (r.sum(1, keepdims=True) - r) / (r.shape[1] - 1)).ravel()
    return float(np.mean([-ai * row.sum() for ai, row in zip(a, x.logp, strict=True)]))


def paper_reinforce_plus_plus(x: Any) -> float:
    beta = 0.01
    raw = [r - beta * np.cumsum((o - f)[::-1])[::-1] for r, o, f in zip(x.rewards.ravel(), x.old, x.ref, strict=True)]
    every = np.concatenate(raw)
    a = [(row - every.mean()) / every.std() for row in raw]
    return token_mean([clipped(p, o, ai, 0.2, 0.2) for p, o, ai in zip(x.logp, x.old, a, strict=True)])


def paper_reinforce_plus_plus_baseline(x: Any) -> float:
    centred = (x.rewards - x.rewards.mean(1, keepdims=True)).ravel()
    every = np.concatenate([np.full(len(p), c) for p, c in zip(x.logp, centred, strict=True)])
    a = (centred - every.mean()) / every.std()
    return token_mean(
        [
            clipped(p, o, ai, 0.2, 0.2) + 1e-5 * 0.5 * (p - f) ** 2
            for p, o, f, ai in zip(x.logp, x.old, x.ref, a, strict=True)
        ]
    )


def paper_remax(x: Any) -> float:
    a = (x.rewards - x.greedy).ravel()
    return float(np.mean([-ai * row.sum() for ai, row in zip(a, x.logp, strict=True)]))


def paper_grpo(x: Any) -> float:
    a = sample_std(x.rewards).ravel()
    return seq_mean_token_mean(
        [clipped(p, o, ai, 0.2, 0.2) + 0.04 * k3(p, f) for p, o, f, ai in zip(x.logp, x.old, x.ref, a, strict=True)]
    )


def paper_dr_grpo(x: Any) -> float:
    a = (x.rewards - x.rewards.mean(1, keepdims=True)).ravel()
    rows = [clipped(p, o, ai, 0.2, 0.2).sum() / MAX_LEN for p, o, ai in zip(x.logp, x.old, a, strict=True)]
    return float(np.mean(rows))


def paper_dapo(x: Any) -> float:
    a = sample_std(x.rewards).ravel()  # overlong shaping and filtering act before: see the tests below
    return token_mean([clipped(p, o, ai, 0.2, 0.28) for p, o, ai in zip(x.logp, x.old, a, strict=True)])


def paper_gspo(x: Any) -> float:
    a = sample_std(x.rewards).ravel()
    s = [np.exp((p - o).mean()) for p, o in zip(x.logp, x.old, strict=True)]
    return float(np.mean([-min(si * ai, np.clip(si, 1 - 3e-4, 1 + 4e-4) * ai) for si, ai in zip(s, a, strict=True)]))


def paper_cispo(x: Any) -> float:
    a = sample_std(x.rewards).ravel()
    weights = [np.clip(np.exp(p - o), 0.0, 5.0) for p, o in zip(x.frozen, x.old, strict=True)]
    return token_mean([-w * ai * p for w, ai, p in zip(weights, a, x.logp, strict=True)])


def paper_nanochat(x: Any) -> float:
    a = (x.rewards - x.rewards.mean(1, keepdims=True)).ravel()
    rows = [-ai * p for ai, p in zip(a, x.logp, strict=True)]
    return float(np.mean([token_mean(rows[i : i + 8]) for i in range(0, len(rows), 8)]))


def paper_trl(x: Any) -> float:
    a = sample_std(x.rewards, 1e-4).ravel()
    return token_mean([clipped(p, o, ai, 0.2, 0.2) for p, o, ai in zip(x.logp, x.old, a, strict=True)])


def paper_verl(x: Any) -> float:
    a = sample_std(x.rewards, 1e-6).ravel()
    rows = []
    for p, o, f, ai in zip(x.logp, x.old, x.ref, a, strict=True):
        policy = clipped(p, o, ai, 0.2, 0.2)
        rows.append((np.minimum(policy, -3 * ai) if ai < 0 else policy) + 1e-3 * k3(p, f))
    return token_mean(rows)


def paper_openrlhf(x: Any) -> float:
    a = sample_std(x.rewards, 1e-9).ravel()
    rows = []
    for p, o, f, b, ai in zip(x.logp, x.old, x.ref, x.behaviour, a, strict=True):
        w = np.exp(o - b)
        rows.append(np.clip(w, 0.5, 5) * clipped(p, o, ai, 0.2, 0.27) + 1e-3 * k3(p, f))
    return token_mean(rows)


PAPERS: dict[str, Callable[[Any], float]] = {
    "reinforce": paper_reinforce,
    "rloo": paper_rloo,
    "reinforce++": paper_reinforce_plus_plus,
    "reinforce++-baseline": paper_reinforce_plus_plus_baseline,
    "remax": paper_remax,
    "grpo": paper_grpo,
    "dr-grpo": paper_dr_grpo,
    "dapo": paper_dapo,
    "gspo": paper_gspo,
    "cispo": paper_cispo,
    "nanochat": paper_nanochat,
    "grpo-trl": paper_trl,
    "grpo-verl": paper_verl,
    "grpo-openrlhf": paper_openrlhf,
}


class Inputs:
    """A batch of P × G answers of 1 to 6 tokens after a prompt of 2, with everything a loss may look at."""

    def __init__(self, spread: float) -> None:
        draw = np.random.default_rng(0)
        lengths = draw.integers(1, 7, P * G)
        self.rewards = draw.normal(size=(P, G)).round(2)
        self.greedy = draw.normal(size=(P, 1)).round(2)
        self.old = [draw.uniform(-3, -0.1, n) for n in lengths]
        self.logp = [o + draw.normal(scale=spread, size=len(o)) for o in self.old]
        self.ref = [o + draw.normal(scale=0.5, size=len(o)) for o in self.old]
        self.behaviour = [o + draw.normal(scale=0.6, size=len(o)) for o in self.old]
        self.frozen = [row.copy() for row in self.logp]

    def samples(self, with_ref: bool) -> list[Sample]:
        def full(row: np.ndarray) -> np.ndarray:
            return np.concatenate([np.zeros(2), row]).astype(np.float32)

        return [
            Sample(
                np.arange(len(old) + 2),
                np.arange(len(old) + 2) > 1,
                full(behaviour),
                full(old * 0),
                full(old),
                full(ref) if with_ref else None,
            )
            for old, ref, behaviour in zip(self.old, self.ref, self.behaviour, strict=True)
        ]


def recipe_of(preset: str) -> GRPORecipe:
    sizes = {"prompts": P, "group_size": G, "minibatches": 1}
    made = cast(GRPORecipe, config.resolve("grpo", {"algo": {"preset": preset, **sizes}}))
    return replace(made, rollout=replace(made.rollout, max_tokens=MAX_LEN))


def test_every_preset_has_its_paper_here() -> None:
    assert PAPERS.keys() == PRESETS["grpo"].keys()


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("preset", PRESETS["grpo"])
def test_a_preset_gives_its_papers_loss_and_gradient(preset: str, spread: float) -> None:
    x, recipe = Inputs(spread), recipe_of(preset)
    cfg = recipe.algo
    baseline = torch.tensor(x.greedy, dtype=torch.float64) if cfg.baseline == "greedy" else None
    samples, _, _ = grpo.credit(cfg, x.samples(cfg.kl_coef > 0), torch.tensor(x.rewards), baseline, cast(Any, None))
    (batch,) = batching.micro(samples, 10**6, cfg.aggregate, MAX_LEN)
    order = [i for part in batching.passes([len(s.tokens) for s in samples], 10**6) for i in part]
    logp = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for row, i in enumerate(order):
        logp[row, 2 : 2 + len(x.logp[i])] = torch.from_numpy(x.logp[i])
    logp.requires_grad_()
    value, _ = grpo.make_loss(recipe)(logp, torch.zeros_like(logp), batch)
    (gradient,) = torch.autograd.grad(value, logp)
    assert value.item() == pytest.approx(PAPERS[preset](x), rel=2e-5, abs=2e-6)
    for row, i in enumerate(order):
        for t in range(len(x.logp[i])):
            if preset != "gspo" and abs(abs(x.logp[i][t] - x.old[i][t]) - np.log(1.2)) < 1e-4:
                continue  # at the kink of a clip there is no derivative
            sides = []
            for sign in (1, -1):
                x.logp[i][t] += sign * 1e-6
                sides.append(PAPERS[preset](x))
                x.logp[i][t] -= sign * 1e-6
            assert gradient[row, 2 + t].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-3, abs=1e-5)


def test_the_three_implementations_scale_the_same_rewards_differently() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    found = {
        name: grpo.compare(recipe_of(name).algo, rewards, None)[0, 0].item()
        for name in ("grpo-trl", "grpo-verl", "grpo-openrlhf", "dr-grpo")
    }
    assert found["grpo-trl"] == pytest.approx(0.5 / (1 / 3**0.5 + 1e-4), abs=1e-9)
    assert found["grpo-verl"] == pytest.approx(0.5 / (1 / 3**0.5 + 1e-6), abs=1e-9)
    assert found["grpo-openrlhf"] == pytest.approx(0.8660254, abs=1e-6) and found["dr-grpo"] == 0.5


# --- options that cross all presets --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model"))


def spread(completion: str, **task: object) -> float:
    """Differs between the answers of a random model."""
    return float(sum(map(ord, completion)) % 7)


def train(model: Path, out: Path, reward: Any = spread, **settings: Any) -> dict[str, list[float]]:
    """Metrics by name of a short run."""
    small: dict[str, Any] = {
        "rollout__max_tokens": 8, "rollout__slots": 32, "prompts": 3, "group_size": 4, "problems": 4,
        "steps": 3, "train__lr": 1e-2, "threads": 1, "count": 64,
    }  # fmt: skip
    result = pt.grpo(str(model), "sums", reward, out, **{**small, **settings})
    assert result.summary
    with Run.read(result.folder) as run:
        names = {name for _, name, _ in run.metrics()}
        return {name: list(run.curve(name)[1]) for name in names}


@pytest.mark.parametrize("preset", PRESETS["grpo"])
def test_every_preset_trains(model: Path, tmp_path: Path, preset: str) -> None:
    found = train(model, tmp_path / "run", preset=preset, minibatches=1, max_resamples=1 if preset == "dapo" else 0)
    assert len(found["reward"]) == 3 and all(np.isfinite(found["loss"]))


def test_several_updates_per_batch_start_at_ratio_one_and_then_move(model: Path, tmp_path: Path) -> None:
    once = train(model, tmp_path / "once", steps=1, train__lr=0.3)
    twice = train(model, tmp_path / "twice", steps=1, train__lr=0.3, epochs=4)
    assert once["clipped"] == [0.0] and twice["clipped"][0] > 0


def test_with_the_samplers_old_logp_the_pass_before_the_updates_is_saved_and_the_first_one_measures(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner's own and the sampler's differ by rounding, so the run is the same to rounding."""
    ours = train(model, tmp_path / "learner", steps=1, minibatches=2, epochs=2)
    monkeypatch.setattr("posttrain.train.learners.local.LocalLearner.logprobs", None)  # who makes that pass fails
    theirs = train(model, tmp_path / "sampler", steps=1, minibatches=2, epochs=2, old_logp="sampler")
    assert 0 <= theirs["mismatch"][0] < 1e-4
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)


def test_a_lagging_sampler_uses_weights_of_the_stated_age(model: Path, tmp_path: Path) -> None:
    found = train(model, tmp_path / "run", steps=6, max_lag=2)
    assert found["lag"] == [0, 1, 2, 0, 1, 2]
    assert found["mismatch"] == [found["mismatch"][0], 0, 0, found["mismatch"][3], 0, 0]  # the ratio is to the sampler
    corrected = train(model, tmp_path / "corrected", steps=3, max_lag=2, is_cap=2.0)
    assert corrected["mismatch"][0] < 1e-4 < corrected["mismatch"][1]
    assert corrected["is_weight"][1] != 1.0


def first_letter(completion: str, **task: object) -> float:
    """Equal for most answers of a random model, so that many groups are flat."""
    return float(ord((completion or "a")[0]) % 5 == 0)


def test_dynamic_sampling_replaces_flat_groups_by_exactly_as_many(model: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "rollout__max_tokens": 4,
        "rollout__slots": 32,
        "prompts": 6,
        "group_size": 4,
        "problems": 4,
        "count": 64,
    }
    result = pt.grpo(str(model), "sums", first_letter, tmp_path / "run", steps=2, max_resamples=20, threads=1, **small)
    with Run.read(result.folder) as run:
        kept, sampled = run.curve("groups_kept")[1], run.curve("groups")[1]
        rows = run.episodes("train", 1)
    assert kept == [6, 6] and all(n > 6 for n in sampled)
    assert len({row.group for row in rows}) == sampled[0], "every sampled group is stored, the flat ones too"
    prompts = [row.prompt for row in rows if row.index == 0]
    assert len(set(prompts)) == len(prompts), "a replacement is a fresh task"


def test_without_enough_groups_a_step_trains_on_fewer(model: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "rollout__max_tokens": 4,
        "rollout__slots": 32,
        "prompts": 6,
        "group_size": 2,
        "problems": 4,
        "count": 64,
    }
    result = pt.grpo(str(model), "sums", first_letter, tmp_path / "few", steps=1, max_resamples=1, threads=1, **small)
    with Run.read(result.folder) as run:
        assert run.curve("groups_kept")[1][0] < 6


def test_answers_that_were_cut_leave_the_loss_but_not_the_mean(model: Path, tmp_path: Path) -> None:
    kept, dropped = (
        train(model, tmp_path / name, steps=1, mask_truncated=drop, rollout__max_tokens=64)
        for name, drop in (("kept", False), ("dropped", True))
    )
    assert kept["reward"] == dropped["reward"] and 0 < kept["truncated"][0] < 1
    assert kept["loss"] != dropped["loss"]


def test_the_overlong_penalty_grows_over_the_last_share_of_the_length() -> None:
    recipe = config.resolve("grpo", {"algo": {"overlong_share": 0.5}, "rollout": {"max_tokens": 8}})

    def episode(n: int) -> Episode:
        spans = (Span("prompt", np.zeros(2, int)), Span("model", np.zeros(n, int), np.zeros(n)))
        return Episode("t", 0, 0, spans, "", 1.0)

    shaped = grpo.shaped_rewards(recipe, [[episode(4), episode(5)], [episode(6), episode(8)]])
    assert shaped.tolist() == [[1.0, 0.75], [0.5, 0.0]]


def test_the_entropy_bonus_keeps_the_policy_spread_out(model: Path, tmp_path: Path) -> None:
    plain = train(model, tmp_path / "plain", steps=8)
    bonus = train(model, tmp_path / "bonus", steps=8, entropy_coef=0.5)
    assert bonus["entropy"][-1] > plain["entropy"][-1] + 0.05


def test_a_kl_penalty_keeps_the_policy_near_its_start(model: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"steps": 10, "train__lr": 1e-3, "prompts": 4, "group_size": 8}
    free = train(model, tmp_path / "free", kl_coef=1e-9, **small)
    held = train(model, tmp_path / "held", kl_coef=3.0, **small)
    assert free["kl"][0] < 1e-6 and held["kl"][-1] < 0.75 * free["kl"][-1]


def test_losses_of_the_recipe_are_those_of_the_dict() -> None:
    hints = get_type_hints(config.GRPOConfig, include_extras=True)
    assert config.choices(hints["policy_loss"]) == tuple(POLICY_LOSSES)


@pytest.mark.parametrize(
    ("algo", "sentence"),
    [
        ({"group_size": 1}, "gives every completion an advantage of 0"),
        ({"group_size": 1, "std": "sample", "baseline": "none"}, "gives every completion an advantage of 0"),
        ({"baseline": "leave-one-out", "std": "sample"}, 'needs algo.baseline = "group-mean"'),
        ({"baseline": "ema", "std": "batch"}, 'cannot be used with algo.baseline = "ema"'),
        ({"ema_decay": 1.0}, "algo.ema_decay=1.0 is not in [0, 1)."),
        ({"group_size": 1, "baseline": "none", "max_resamples": 1}, "a group of 1 is always one"),
        ({"overlong_share": 1.5}, "algo.overlong_share=1.5 is not in [0, 1]."),
        ({"is_cap": 1.0, "is_floor": 2.0}, "is above algo.is_cap"),
        ({"max_lag": -1}, "algo.max_lag=-1 cannot be negative"),
        ({"policy_loss": "gspo", "kl_coef": 0.1, "kl_place": "reward-to-go"}, 'Use "gspo-token"'),
        ({"preset": "dappo"}, "unknown preset 'dappo'. Did you mean 'dapo'?"),
    ],
)
def test_a_recipe_that_would_train_nothing_is_refused(algo: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=".") as error:
        config.resolve("grpo", {"algo": algo})
    assert sentence in str(error.value)


def test_what_is_given_beats_the_preset_and_a_resumed_recipe_is_the_same() -> None:
    made = config.resolve("grpo", {"algo": {"preset": "dapo", "clip_high": 0.3}}, {"group_size": "4"})
    assert (made.algo.clip_high, made.algo.group_size, made.algo.max_resamples) == (0.3, 4, 10)
    assert config.resolve("grpo", json.loads(json.dumps(config.as_dict(made)))) == made
