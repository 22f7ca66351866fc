"""PPO: a hand-worked rollout buffer, gradients that add up, a critic that learns, controllers that move, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain import api, config
from posttrain.algos import ppo, sft
from posttrain.config import ModelConfig, TrainConfig
from posttrain.config.ppo import PPOConfig, PPORecipe
from posttrain.data import batching
from posttrain.models import heads
from posttrain.models.load import Policy, save_pretrained
from posttrain.store.run import Run
from posttrain.train import critic as critics
from posttrain.train import forward
from posttrain.train.learner import Learner, make_learner
from posttrain.train.learners.local import LocalLearner
from posttrain.types import ConfigError, Episode, PosttrainError, Sample, Span, add_stats
from tests import tiny

VOWELS = str(Path(__file__).parent / "vowels.py") + ":vowels"


def critic_learner(policy: Policy, lanes: int = 1) -> Learner:
    """The learner of a critic."""
    return make_learner(policy, TrainConfig(lanes=lanes), 1, forward=forward.token_values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(folder: Path) -> dict[str, Any]:
    """Settings of a run that takes a second."""
    return {
        "model.path": str(folder),
        "data.tasks": "sums",
        "data.count": 64,
        "reward.name": VOWELS,
        "rollout.max_tokens": 6,
        "rollout.slots": 64,
        "algo.prompts": 16,
        "algo.kl_coef": 0.0,
        "eval.problems": 2,
        "train.steps": 3,
        "train.lr": 3e-3,
        "train.threads": 1,
        "algo.critic_lr": 3e-3,
    }


def train(
    base: dict[str, Any], out: Path, reward: Callable[..., float] | None = None, **settings: Any
) -> list[dict[str, float]]:
    """The metrics of each step of a run, those of step 0 first."""
    seen: list[dict[str, float]] = []
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    recipe = config.resolve("ppo", {}, {**base, "run.out": str(out), **dotted})
    api.start("ppo", recipe, lambda step, values: seen.append(values), None, reward)
    return seen


# --- the frozen buffer ----------------------------------------------------------------------------------------------


def row(mask: list[int], old_logp: list[float], ref_logp: list[float], values: list[float]) -> Sample:
    """A sample of a hand-worked episode; the sampler agreed with the learner."""
    old, reference, value = (np.asarray(x, np.float32) for x in (old_logp, ref_logp, values))
    tokens, blank = np.arange(len(mask)) + 3, np.zeros(len(mask), np.float32)
    return Sample(tokens, np.asarray(mask, bool), old, blank, old, reference, value)


THREE = [
    row([0, 1, 1, 1], [0, -1, -2, -1], [0, -1.5, -1.75, -1.25], [0, 0.5, 0.25, 0.5]),
    row([0, 0, 1], [0, 0, -1], [0, 0, -1], [0, 0, 0.25]),
    row([0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]),  # could not be scored
]
SCORES = torch.tensor([1.0, -1.0, torch.nan])


def test_a_buffer_of_two_scored_answers_is_what_it_is_by_hand(tmp_path: Path) -> None:
    cfg = PPOConfig(gamma=1.0, lam=0.5, kl_coef=0.5, whiten_advantages=False)
    frozen, stats = ppo.freeze(
        THREE, SCORES, cfg, ppo.Progress(kl_coef=0.5), critic_learner(tiny.load(tiny.make(tmp_path)))
    )
    # Token rewards: −½·½, +½·¼, 1 − ½·¼ and −1. TD errors of the first answer: −½, ⅜, ⅜.
    assert frozen[0].advantages.tolist() == [0, -0.21875, 0.5625, 0.375]
    assert frozen[0].returns is not None and frozen[0].returns.tolist() == [0, 0.28125, 0.8125, 0.875]
    assert frozen[1].advantages.tolist() == [0, 0, -1.25]
    assert frozen[1].returns is not None and frozen[1].returns.tolist() == [0, 0, -1]
    assert not frozen[2].advantages.any() and frozen[2].returns is not None and not frozen[2].returns.any()
    values = {name: stat.value for name, stat in stats.items()}
    assert values["score"] == 0 and values["score_less_kl"] == -0.125
    assert values["kl"] == 0.5 / 4 and values["kl_episode"] == 0.25 and values["kl_coef"] == 0.5
    assert values["returns"] == (0.28125 + 0.8125 + 0.875 - 1) / 4
    advantages, returns = np.array([-0.21875, 0.5625, 0.375, -1.25]), np.array([0.28125, 0.8125, 0.875, -1])
    assert values["advantages_std"] == pytest.approx(advantages.std(ddof=1), rel=1e-6)
    assert values["explained_variance"] == pytest.approx(1 - advantages.var() / returns.var(), rel=1e-6)


def test_whitening_is_over_all_trained_tokens_of_the_step_and_leaves_returns_alone(tmp_path: Path) -> None:
    cfg = PPOConfig(gamma=1.0, lam=0.5)
    frozen, _ = ppo.freeze(
        THREE, SCORES, cfg, ppo.Progress(kl_coef=0.5), critic_learner(tiny.load(tiny.make(tmp_path)))
    )
    plain = np.array([-0.21875, 0.5625, 0.375, -1.25])
    white = np.concatenate([s.advantages[s.loss_mask] for s in frozen])
    np.testing.assert_allclose(white, (plain - plain.mean()) / plain.std(ddof=1), rtol=1e-6)
    assert frozen[0].returns is not None and frozen[0].returns.tolist() == [0, 0.28125, 0.8125, 0.875]


def test_whitened_rewards_have_unit_deviation_and_their_mean(tmp_path: Path) -> None:
    cfg = PPOConfig(gamma=1.0, lam=1.0, whiten_rewards=True, whiten_advantages=False)
    frozen, _ = ppo.freeze(
        THREE, SCORES, cfg, ppo.Progress(kl_coef=0.5), critic_learner(tiny.load(tiny.make(tmp_path)))
    )
    rewards = np.array([-0.25, 0.125, 0.875, -1])
    scaled = (rewards - rewards.mean()) / rewards.std(ddof=1) + rewards.mean()
    assert frozen[0].returns is not None and frozen[1].returns is not None
    np.testing.assert_allclose(frozen[0].returns[1:], scaled[:3][::-1].cumsum()[::-1], rtol=1e-6)
    np.testing.assert_allclose(frozen[1].returns[2], scaled[3], rtol=1e-6)


@pytest.mark.parametrize("lanes", [1, 4])
def test_whitened_returns_have_running_units_and_the_critics_values_keep_their_meaning(
    lanes: int, tmp_path: Path
) -> None:
    critic = heads.attach_scalar(tiny.load(tiny.make(tmp_path)), 1, "a")
    owner = critic_learner(critic, lanes)
    scale = critics.ReturnScale()
    rows = [replace(THREE[0], tokens=np.arange(4) + 10)]
    before = forward.sample_values(critic, rows, 64)[0]
    seen = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-4.0, 10.0])]
    for returns in seen:
        scale.update(owner, returns)
    everything = torch.cat(seen).double()
    assert scale.count == 5 and scale.mean == pytest.approx(everything.mean().item())
    assert scale.std == pytest.approx(everything.std(correction=0).item())
    after = scale.restore(torch.from_numpy(forward.sample_values(critic, rows, 64)[0][1:]))
    kept = owner.state()[0]["model"]["scalar.bias"]
    assert critic.scalar is not None and torch.equal(kept, critic.scalar.bias)  # the next update starts from it
    np.testing.assert_allclose(after, before[1:], rtol=1e-5)
    cfg = PPOConfig(lam=0.5, whiten_returns=True)
    frozen, _ = ppo.freeze(THREE, SCORES, cfg, at := ppo.Progress(kl_coef=0.5), owner)
    targets = np.concatenate([s.returns[s.loss_mask] for s in frozen if s.returns is not None])
    assert at.scale.count == 4
    np.testing.assert_allclose([targets.mean(), targets.std()], [0, 1], atol=1e-6)


def answer(reward: float | None, stop: Any) -> Episode:
    spans = (Span("prompt", np.array([5])), Span("model", np.array([6]), np.zeros(1, np.float32)))
    return Episode("t", 0, 0, spans, "", reward, stop=stop)


@pytest.mark.parametrize(
    ("how", "expected"), [("score", [0.5, 0.25]), ("replace", [0.5, -1.0]), ("penalise", [0.5, -0.75])]
)
def test_answers_that_do_not_end_are_scored_as_the_setting_says(how: Any, expected: list[float]) -> None:
    episodes = [answer(0.5, "stop"), answer(0.25, "length"), answer(None, "length")]
    scores = ppo.terminal_scores(episodes, PPOConfig(truncated=how))
    assert scores[:2].tolist() == expected and scores[2].isnan()


# --- gradients ------------------------------------------------------------------------------------------------------


def buffer(policy: Policy, count: int = 12) -> list[Sample]:
    """Random rows of a frozen buffer, off-policy enough that ratios and values clip here and there."""
    draw = np.random.default_rng(0)
    out: list[Sample] = []
    for i in range(count):
        size = int(draw.integers(4, 20))
        mask = np.arange(size) >= draw.integers(1, 4)
        noise = [draw.normal(size=size).astype(np.float32) for _ in range(3)]
        out.append(Sample(draw.integers(3, policy.vocab, size), mask & (i != 5), noise[0] * 0, noise[0]))
        out[-1] = replace(out[-1], old_values=noise[1], returns=noise[2], ref_logp=None)
    logp = forward.sample_logprobs(policy, out, 64)
    return [
        replace(s, old_logp=old + 0.2 * draw.normal(size=len(old)).astype(np.float32) * s.loss_mask)
        for s, old in zip(out, logp, strict=True)
    ]


def gradients(learner: LocalLearner) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(m) if m.grad is None else m.grad.clone() for n, m in learner.master.items()}


def one_pass(policy: Policy, samples: list[Sample], forward: Any, loss: Any) -> dict[str, torch.Tensor]:
    learner = LocalLearner(policy, config.TrainConfig(), 1, forward=forward)
    for batch in batching.micro(samples, 64, "token-mean"):
        learner.forward_backward([batch], loss)
    return gradients(learner)


def test_a_shared_critics_gradient_is_the_policys_plus_the_weighted_values(tmp_path: Path) -> None:
    cfg = PPOConfig(critic="shared", vf_coef=0.25, entropy_coef=0.1)
    policy = heads.attach_scalar(tiny.load(tiny.make(tmp_path)), 1, 0)
    samples = buffer(policy)
    whole = one_pass(policy, samples, ppo.make_forward(cfg), ppo.shared_loss(cfg, only_critic=False))
    of_policy = one_pass(policy, samples, forward.token_stats_with_entropy, ppo.policy_loss(cfg))
    of_values = one_pass(policy, samples, forward.token_values, ppo.critic_loss(cfg))
    for name, grad in whole.items():
        torch.testing.assert_close(grad, of_policy[name] + 0.25 * of_values[name], rtol=1e-4, atol=1e-7)
    assert of_values["scalar.weight"].abs().max() > 0 and not of_policy["scalar.weight"].any()


class Steps:
    """A learner whose steps only remember the gradient that they would have applied."""

    def __init__(self, policy: Policy, forward: Any, temperature: float = 1.0) -> None:
        self.learner = LocalLearner(policy, config.TrainConfig(lr=0), 1, temperature, forward)
        self.found: list[dict[str, torch.Tensor]] = []
        real = self.learner.step

        def step(only: str = "", update: int | None = None) -> Any:
            self.found.append(gradients(self.learner))
            return real(only, update)

        self.learner.step = step  # type: ignore[method-assign]


def improve(cfg: PPOConfig, policy: Policy, critic: Policy, shown: list[Sample], room: int) -> tuple[Steps, Steps, Any]:
    """One step's epochs over `buffer`, at learning rate 0."""
    recipe = replace(PPORecipe(algo=cfg), train=config.TrainConfig(micro_batch_tokens=room, lr=0))
    actor, judge = Steps(policy, ppo.make_forward(cfg), 0.5), Steps(critic, forward.token_values)
    at = ppo.Progress(kl_coef=0.0)
    stats = ppo.improve(recipe, at, actor.learner, judge.learner, buffer(policy), shown)
    return actor, judge, stats


def test_the_ptx_term_adds_exactly_its_weight_times_the_supervised_gradient(tmp_path: Path) -> None:
    policy = tiny.load(tiny.make(tmp_path))
    critic = heads.attach_scalar(tiny.load(tmp_path), 1, 0)
    shown = [replace(s, advantages=s.advantages * 0, old_logp=None, old_values=None, returns=None) for s in THREE[:2]]
    shown = [replace(s, ref_logp=None) for s in shown]
    supervised = one_pass(policy, shown, forward.token_stats, sft.loss)
    alone = one_pass(policy, shown, ppo.make_forward(PPOConfig()), ppo.ptx_loss(0.5))
    assert all(torch.equal(alone[name], 0.5 * grad) for name, grad in supervised.items())
    cfg = PPOConfig(prompts=12, minibatches=1, ptx_coef=0.5, ptx_data="x", ptx_rows=2)
    with_ptx, without = (improve(cfg, policy, critic, rows, 64)[0].found[0] for rows in (shown, []))
    for name, grad in with_ptx.items():
        torch.testing.assert_close(grad, without[name] + 0.5 * supervised[name], rtol=1e-4, atol=1e-6)


def test_the_size_of_a_pass_changes_no_gradient_of_policy_or_critic(tmp_path: Path) -> None:
    policy = tiny.load(tiny.make(tmp_path))
    critic = heads.attach_scalar(tiny.load(tmp_path), 1, 0)
    cfg = PPOConfig(prompts=12, minibatches=3, epochs=2, entropy_coef=0.1)
    small, large = (improve(cfg, policy, critic, [], room) for room in (8, 4096))
    for a, b in zip(small[:2], large[:2], strict=True):
        assert len(a.found) == len(b.found) == 6
        for one, other in zip(a.found, b.found, strict=True):
            for name, grad in one.items():
                torch.testing.assert_close(grad, other[name], rtol=1e-4, atol=1e-6)


def test_rows_that_could_not_be_scored_change_no_gradient(tmp_path: Path) -> None:
    policy = tiny.load(tiny.make(tmp_path))
    cfg = PPOConfig()
    samples = buffer(policy)
    scored = [s for s in samples if s.loss_mask.any()]
    assert len(scored) == len(samples) - 1
    every, some = (one_pass(policy, s, ppo.make_forward(cfg), ppo.policy_loss(cfg)) for s in (samples, scored))
    for name, grad in every.items():
        torch.testing.assert_close(grad, some[name], rtol=1e-5, atol=1e-7)


def test_epochs_end_when_the_policy_has_moved_far_enough(tmp_path: Path) -> None:
    policy = tiny.load(tiny.make(tmp_path))
    critic = heads.attach_scalar(tiny.load(tmp_path), 1, 0)
    for target, updates in ((0.0, 6), (1e-6, 2), (1e3, 6)):  # `buffer` is off-policy by about 0.02 nats a token
        cfg = PPOConfig(prompts=12, minibatches=2, epochs=3, target_kl=target)
        actor, judge, _ = improve(cfg, policy, critic, [], 64)
        assert len(actor.found) == len(judge.found) == updates


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("lora", [0, 2])
def test_the_first_update_has_ratio_one_and_no_distance_to_the_start(
    base: dict[str, Any], tmp_path: Path, critic: str, lora: int
) -> None:
    settings = {"algo__critic": critic, "algo__kl_coef": 0.1, "model__lora_rank": lora, "micro_batch_tokens": 64}
    first = train(base, tmp_path / "run", minibatches=1, steps=1, **settings)[1]
    assert first["kl"] == first["kl_episode"] == 0 and first["score"] == first["score_less_kl"]
    assert first["clipped"] == 0 and first["approx_kl"] == 0, "the ratio was not exactly 1"
    assert first["explained_variance"] == 0, "a fresh head predicts 0"


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_tiny_model_learns_to_write_more_vowels(base: dict[str, Any], tmp_path: Path, critic: str) -> None:
    steps = train(
        base, tmp_path / "run", algo__critic=critic, prompts=32, minibatches=1, rollout__max_tokens=4, steps=12, lr=2e-2
    )
    first, last = (np.mean([s["reward"] for s in part]) for part in (steps[1:4], steps[-3:]))
    assert last > first + 0.2, f"{first:.2f} → {last:.2f}"


def test_the_critic_learns_to_predict_a_constant_reward(base: dict[str, Any], tmp_path: Path) -> None:
    settings = {"lam": 1.0, "max_flat_steps": 99, "value_clip": 0.0, "critic_lr": 1e-2}
    steps = train(base, tmp_path / "run", lambda completion, answer, **task: 0.75, steps=12, **settings)
    assert steps[1]["returns"] == steps[-1]["returns"] == 0.75
    assert steps[1]["value_loss"] > 0.1 and steps[-1]["value_loss"] < 0.002


def test_the_critic_learns_from_the_first_letter_how_an_answer_will_be_scored(
    base: dict[str, Any], tmp_path: Path
) -> None:
    def odd(completion: str, answer: str, **task: Any) -> float:
        return float(ord((completion or " ")[0]) % 2)

    settings = {"lam": 1.0, "value_clip": 0.0, "critic_lr": 1e-2, "lr": 0.0, "prompts": 64, "minibatches": 4}
    explained = [s["explained_variance"] for s in train(base, tmp_path / "run", odd, steps=20, **settings)[1:]]
    assert explained[0] == 0 and np.mean(explained[-5:]) > 0.1


def test_warming_up_moves_the_critic_alone(base: dict[str, Any], tmp_path: Path) -> None:
    for critic in ("separate", "shared"):
        settings = {"algo__critic": critic, "critic_warmup": 2, "algo__kl_coef": 0.1, "steps": 4}
        settings["kl_controller"] = "adaptive"
        steps = train(base, tmp_path / critic, lambda completion, **task: 1 + len(completion) / 8, **settings)
        assert [s["kl"] for s in steps[1:4]] == [0, 0, 0] and steps[4]["kl"] != 0
        assert [s["kl_coef"] for s in steps[1:4]] == [0.1, 0.1, 0.1], "the controller waits for the policy"
        assert steps[2]["value_loss"] < steps[1]["value_loss"] and "approx_kl" not in steps[2]


def test_the_adaptive_coefficient_moves_towards_its_target_both_ways(base: dict[str, Any], tmp_path: Path) -> None:
    settings = {"kl_controller": "adaptive", "algo__kl_coef": 0.1, "kl_horizon": 160.0, "steps": 4}
    for target, sign in ((1e-9, 1), (1e9, -1)):
        steps = train(base, tmp_path / str(sign), kl_target=target, **settings)
        coefs = [s["kl_coef"] for s in steps[1:]]
        # step 1 measures no KL at all, so that the coefficient falls whatever the target is
        assert coefs[0] == 0.1 and coefs[1] == pytest.approx(0.1 * (1 - 0.2 * 16 / 160))
        assert coefs[3] == pytest.approx(coefs[1] * (1 + sign * 0.02) ** 2)


def test_attempts_that_cannot_be_scored_are_counted_and_teach_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    def fussy(completion: str, answer: str, **task: Any) -> float:
        if ord((completion or "x")[0]) % 3 == 0:
            raise ValueError("no")
        return len(completion) / 8

    steps = train(base, tmp_path / "run", fussy, reward__max_failure_rate=1.0, algo__kl_coef=0.1)
    assert all(s["unscored"] > 0 for s in steps[1:]) and all(np.isfinite(s["loss"]) for s in steps[1:])
    with Run.read(tmp_path / "run") as run:
        assert {e.advantage for e in run.episodes("train", 1) if e.reward is None} == {0.0}


def test_equal_scores_for_many_steps_stop_the_run(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PosttrainError, match="in the last 2 steps all completions had the same score"):
        train(base, tmp_path / "run", lambda completion, answer, **task: 0.5, max_flat_steps=2)


# --- a critic from a reward model -----------------------------------------------------------------------------------


def scorer(folder: Path, out: Path, count: int = 2) -> Policy:
    """Writes a reward model with an ensemble of heads."""
    policy = heads.attach_scalar(tiny.load(folder), count, "reward")
    assert policy.scalar is not None
    with torch.no_grad():
        policy.scalar.bias.copy_(torch.arange(count) + 1.0)
    save_pretrained(policy, out)
    heads.save_head(policy, out)
    return policy


@pytest.mark.parametrize("shared", [False, True])
def test_a_critic_starts_from_a_reward_model_with_its_heads_averaged(
    folder: Path, tmp_path: Path, shared: bool
) -> None:
    source = scorer(folder, tmp_path / "model")
    (tmp_path / "run.json").write_text("{}")  # a run's folder stands for the model in it
    policy = tiny.load(folder)
    critic = critics.make_critic(ModelConfig(path=str(folder)), policy, shared, str(tmp_path), 0)
    assert (critic is policy) == shared and source.scalar is not None and critic.scalar is not None
    torch.testing.assert_close(critic.scalar.weight[0], source.scalar.weight.mean(0))
    assert critic.scalar.bias.tolist() == [1.5]


def test_a_fresh_critic_is_another_model_whose_values_are_zero(folder: Path) -> None:
    policy = tiny.load(folder)
    critic = critics.make_critic(ModelConfig(path=str(folder)), policy, False, "", 0)
    assert critic.model is not policy.model and policy.scalar is None
    assert not forward.sample_values(critic, THREE[:1], 64)[0].any()


def test_a_critic_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    policy = tiny.load(folder)
    cfg = ModelConfig(path=str(folder))
    with pytest.raises(ConfigError, match="has no scalar head"):
        critics.make_critic(cfg, policy, False, str(folder), 0)
    scorer(tiny.make(tmp_path / "other"), tmp_path / "words")
    with pytest.raises(ConfigError, match="has another vocabulary"):
        critics.make_critic(cfg, policy, False, str(tmp_path / "words"), 0)
    scorer(folder, tmp_path / "narrow", 1)
    wide = tiny.load(folder)
    wide.model.set_output_embeddings(torch.nn.Linear(64, wide.vocab, bias=False))
    with pytest.raises(ConfigError, match="has width 32, but a shared critic needs the policy's width 64"):
        critics.make_critic(cfg, wide, True, str(tmp_path / "narrow"), 0)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gamma": 1.1}, r"algo.gamma=1.1 is not in \[0, 1\]"),
        ({"lam": -0.1}, r"algo.lam=-0.1 is not in \[0, 1\]"),
        ({"prompts": 9}, "9 prompts × 1 completions do not divide into 2 minibatches"),
        ({"kl_controller": "adaptive", "algo.kl_coef": 0}, "multiplies algo.kl_coef, which is 0"),
        ({"kl_controller": "adaptive", "kl_target": 0}, "algo.kl_target=0.0 .nats per completion. and kl_horizon"),
        ({"kl_controller": "adaptive", "kl_horizon": -1}, "kl_horizon=-1.0 .completions. must both be above 0"),
        ({"ptx_coef": 1}, "algo.ptx_data is empty"),
        ({"ptx_data": "sums"}, "is not used while algo.ptx_coef is 0"),
        ({"truncated": "penalise", "truncated_value": 1}, "which is not a penalty"),
        ({"critic_warmup": 60}, "leaves none of the train.steps=60 for the policy"),
        ({"critic": "shared", "vf_coef": 0}, "would never train a shared critic"),
        ({"critic": "shared", "critic_warmup": 1, "weight_decay": 0.1}, "would still change the policy's weights"),
        ({"rollout.temperature": 0}, "rollout.temperature=0 does not explore"),
        ({"epochs": 0}, "epochs=0 must be 1 or more"),
        *(
            ({name: -1}, rf"algo.{name}=-1(.0)? cannot be negative")
            for name in (
                "clip_low,clip_high,target_kl,kl_coef,entropy_coef,critic_lr,critic_warmup,vf_coef,value_clip,"
                "ptx_coef,max_mismatch"
            ).split(",")
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config.resolve("ppo", {}, settings)


def test_the_first_minibatch_of_several_starts_at_ratio_one(folder: Path) -> None:
    recipe = PPORecipe(algo=PPOConfig(prompts=12, minibatches=3), train=config.TrainConfig(micro_batch_tokens=32))
    policy = tiny.load(folder)
    critic = heads.attach_scalar(tiny.load(folder), 1, 0)
    learner = LocalLearner(policy, recipe.train, 1, forward=ppo.make_forward(recipe.algo))
    samples = ppo.fill(buffer(policy), ppo.minibatch_rows(recipe, 0, 0), "old_logp", learner.logprobs)
    judge = LocalLearner(critic, recipe.train, 1, forward=forward.token_values)
    stats = ppo.improve(recipe, ppo.Progress(kl_coef=0.0), learner, judge, samples, [])
    first = add_stats(stats[: next(i for i, s in enumerate(stats) if "grad_norm" in s)])
    assert first["approx_kl"].total == 0 and first["clipped"].total == 0
    assert add_stats(stats)["approx_kl"].total > 0
