"""Scalar head on a language model's last hidden states, for reward models, step verifiers and critics.

The head is one linear layer, width → K; K > 1 is an ensemble of heads on a shared body. It is saved in its own file
inside a standard Hugging Face folder, so the body still loads anywhere, and its metadata describes what it scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from posttrain import rng
from posttrain.config import ModelConfig
from posttrain.models.load import Policy, load_policy
from posttrain.models.weights import resolve_path
from posttrain.types import ConfigError

HEAD_FILE = "scalar_head.safetensors"


class ScalarHead(nn.Linear):
    """Linear layer, width → K scores. `about` describes the scores and the input format, and is saved with the head.

    Its keys are `kind`: `reward` (score of a completion), `outcome` or `step` (logit of being correct); `format`: the
    chat format; `separator` and `aggregate`: how a completion is split into steps and their scores are combined. It is
    empty for a critic.
    """

    def __init__(self, width: int, heads: int, about: Mapping[str, str]) -> None:
        super().__init__(width, heads)
        self.about = dict(about)


def attach_scalar(policy: Policy, heads: int, *seed: Any, about: Mapping[str, str] | None = None) -> Policy:
    """Adds a scalar head with `heads` outputs in fp32 to the policy.

    Weights are drawn from a normal distribution with standard deviation 1 / sqrt(width + 1) (Stiennon et al., arXiv
    2009.01325, appendix B), seeded by `seed`; biases are 0.
    """
    width = policy.head.weight.shape[1]
    generator = torch.Generator().manual_seed(rng.key("scalar", *seed) % (1 << 63))
    linear = ScalarHead(width, heads, about or {})
    with torch.no_grad():
        linear.weight.copy_(torch.randn(heads, width, generator=generator) / (width + 1) ** 0.5)
        linear.bias.zero_()
    policy.scalar = linear.to(policy.device)
    return policy


def as_critic(policy: Policy) -> Policy:
    """Freezes the output layer unless it is tied: a critic or reward model does not use it, so it must not decay."""
    if policy.head.weight is not policy.body.get_input_embeddings().weight:  # type: ignore[operator]
        policy.head.requires_grad_(False)
    return policy


def about(policy: Policy) -> dict[str, str]:
    """The metadata of the policy's scalar head; empty for a critic."""
    return policy.scalar.about if isinstance(policy.scalar, ScalarHead) else {}


def save_head(policy: Policy, folder: Path) -> None:
    """Writes the scalar head to the model folder."""
    assert policy.scalar is not None
    tensors = {name: p.detach().cpu().contiguous() for name, p in policy.scalar.named_parameters()}
    save_file(tensors, folder / HEAD_FILE, metadata=about(policy))


def load_scorer(cfg: ModelConfig, device: torch.device | str = "cpu") -> Policy:
    """Loads a reward model, step verifier or critic from a folder with a scalar head.

    Raises ConfigError if the folder has none.
    """
    path = Path(resolve_path(cfg.path)) / HEAD_FILE
    if not path.is_file():
        raise ConfigError(
            f"model {cfg.path!r} has no scalar head ({HEAD_FILE}), so it cannot give scores. Use the `model` folder of "
            "a `posttrain reward` or `posttrain prm` run."
        )
    policy = load_policy(cfg, device)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    heads, width = tensors["weight"].shape
    if width != policy.head.weight.shape[1]:
        raise ConfigError(f"{path} has width {width}, but the model has width {policy.head.weight.shape[1]}.")
    attach_scalar(policy, heads, about=metadata)
    assert policy.scalar is not None
    policy.scalar.load_state_dict(tensors)
    return as_critic(policy)
