"""The frozen reference model for KL penalties on sampled completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from peft import PeftModel

from posttrain.config import ModelConfig
from posttrain.models import lora
from posttrain.models.load import Policy, load_policy
from posttrain.train.forward import sample_logprobs
from posttrain.types import Sample

PerRow = Callable[[Sequence[Sample]], list[np.ndarray]]
"""A no-grad pass: rows → per-token values [L] of each row, in input order."""


def frozen_reference(cfg: ModelConfig, policy: Policy, micro_batch_tokens: int, temperature: float) -> PerRow:
    """Log-probabilities under the starting model: the policy without its trained adapters, or a frozen copy."""
    if isinstance(policy.model, PeftModel):

        def adapters_off(samples: Sequence[Sample]) -> list[np.ndarray]:
            with lora.disabled(policy.model):
                return sample_logprobs(policy, samples, micro_batch_tokens, temperature)

        return adapters_off
    frozen = load_policy(cfg, policy.device)
    frozen.model.requires_grad_(False)
    return lambda samples: sample_logprobs(frozen, samples, micro_batch_tokens, temperature)
