"""Critics: a value head on a separate model or on the policy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from posttrain import rng
from posttrain.config import ModelConfig
from posttrain.models import heads
from posttrain.models.load import Policy, load_policy
from posttrain.train.learner import Learner
from posttrain.types import ConfigError


@dataclass
class ReturnScale:
    """Return normalisation: running mean and standard deviation of the returns, initially 0 and 1."""

    count: int = 0
    mean: float = 0.0
    std: float = 1.0

    def update(self, critic: Learner, returns: torch.Tensor) -> None:
        """Adds returns (K,) and rescales the critic's head so that its denormalised values do not change.

        PopArt (van Hasselt et al., arXiv 1602.07714, proposition 1): w ← w σ / σ', b ← (σ b + μ − μ') / σ'.
        """
        wide = returns.double()
        mean, std, count = self.mean, self.std, self.count
        self.count = count + len(wide)
        gap = wide.mean().item() - mean
        self.mean = mean + gap * len(wide) / self.count
        squares = std**2 * count + wide.var(correction=0).item() * len(wide) + gap**2 * count * len(wide) / self.count
        self.std = math.sqrt(squares / self.count) if squares > 1e-8 * self.count else 1.0
        weight, bias = (critic.weights()[f"scalar.{name}"] for name in ("weight", "bias"))
        critic.assign(
            {
                "scalar.weight": weight * (std / self.std),
                "scalar.bias": (bias * std).add_(mean - self.mean).div_(self.std),
            }
        )

    def normalise(self, values: torch.Tensor) -> torch.Tensor:
        """Normalises values in reward units to the critic's units."""
        return (values - self.mean) / self.std

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """Converts values in the critic's units back to reward units."""
        return values * self.std + self.mean


def make_critic(cfg: ModelConfig, policy: Policy, shared: bool, source: str, seed: int) -> Policy:
    """Attaches a value head to the policy (`shared`), or to a second model with the same initial weights.

    `source` is the folder of a reward model to initialise from: body and head for a separate critic, only the head for
    a shared one. The heads of an ensemble are averaged. Without a source the head, and so the initial values, are 0.
    Raises ConfigError if the folder has no head or does not fit the policy.
    """
    rng.seed_global(seed, "critic")  # LoRA's initial weights
    scorer = load_critic(cfg, source, policy) if source else None
    if shared:
        critic = policy
        if scorer is not None and scorer.head.weight.shape[1] != policy.head.weight.shape[1]:
            raise ConfigError(
                f"algo.critic_init={source!r} has width {scorer.head.weight.shape[1]}, but a shared critic needs the "
                f'policy\'s width {policy.head.weight.shape[1]}. Set algo.critic = "separate".'
            )
    else:
        critic = scorer or heads.as_critic(load_policy(cfg, policy.device))
    trained = None if scorer is None else scorer.scalar
    heads.attach_scalar(critic, 1)
    assert critic.scalar is not None
    with torch.no_grad():
        critic.scalar.weight.copy_(torch.zeros(1) if trained is None else trained.weight.mean(0, keepdim=True))
        critic.scalar.bias.copy_(torch.zeros(1) if trained is None else trained.bias.mean(0, keepdim=True))
    return critic


def load_critic(cfg: ModelConfig, source: str, policy: Policy) -> Policy:
    """Loads a reward model from a folder or finished run. Raises ConfigError if it has no head or does not fit."""
    path = Path(source) / "model" if (Path(source) / "run.json").is_file() else source
    scorer = heads.load_scorer(replace(cfg, path=str(path)), policy.device)
    if scorer.vocab != policy.vocab or scorer.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigError(
            f"algo.critic_init={source!r} has another vocabulary ({scorer.vocab} entries) than the policy {cfg.path!r} "
            f"({policy.vocab}), so it cannot read the policy's tokens. Use a reward model with the policy's tokenizer."
        )
    return scorer
