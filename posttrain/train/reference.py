"""The starting model, frozen: what a KL penalty on fresh answers measures the distance to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from posttrain.config import ModelConfig
from posttrain.models import lora
from posttrain.models.load import Policy, load_policy
from posttrain.train.forward import sample_logprobs
from posttrain.types import Sample

PerRow = Callable[[Sequence[Sample]], list[np.ndarray]]
"""A pass without gradient: rows → one number per token [L] for each, in their order."""


def frozen_reference(cfg: ModelConfig, policy: Policy, micro_batch_tokens: int, temperature: float) -> PerRow:
    """Log-probabilities under the model that `cfg` names: the policy with its adapters off, or a frozen copy."""
    if cfg.lora_rank:

        def adapters_off(samples: Sequence[Sample]) -> list[np.ndarray]:
            with lora.disabled(policy.model):
                return sample_logprobs(policy, samples, micro_batch_tokens, temperature)

        return adapters_off
    frozen = load_policy(cfg, policy.device)
    frozen.model.requires_grad_(False)
    return lambda samples: sample_logprobs(frozen, samples, micro_batch_tokens, temperature)
