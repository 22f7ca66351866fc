"""A scalar head on a language model's last hidden states: what reward models, step verifiers and critics are.

The head is one linear layer, width → K. K > 1 makes an ensemble of heads on a shared body. It is kept beside the
weights of an ordinary Hugging Face folder, so that the body still loads anywhere, and says itself what it scores.
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
from posttrain.models.load import Policy, load_policy, resolve_path
from posttrain.types import ConfigError

HEAD_FILE = "scalar_head.safetensors"


class ScalarHead(nn.Linear):
    """width → K scores. `about` says what they mean and how a text must be shown to the model; it is saved with it.

    `kind` is `reward` (of a whole answer), `outcome` or `step` (logits of being right); `format` the chat format;
    `separator` and `aggregate` how the steps of an answer are found and joined. A critic's says nothing.
    """

    def __init__(self, width: int, heads: int, about: Mapping[str, str]) -> None:
        super().__init__(width, heads)
        self.about = dict(about)


def attach_scalar(policy: Policy, heads: int, *seed: Any, about: Mapping[str, str] | None = None) -> Policy:
    """Gives the policy a scalar head of `heads` outputs, in fp32.

    Weights start normal with standard deviation 1 / sqrt(width + 1) (Stiennon et al., arXiv 2009.01325, appendix B),
    a function of `seed`; biases at 0.
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
    """Freezes an output layer of its own: a critic or reward model never uses it, so it must not be decayed."""
    if policy.head.weight is not policy.body.get_input_embeddings().weight:  # type: ignore[operator]
        policy.head.requires_grad_(False)
    return policy


def about(policy: Policy) -> dict[str, str]:
    """What the policy's scalar head says about itself; empty for a critic's."""
    return policy.scalar.about if isinstance(policy.scalar, ScalarHead) else {}


def save_head(policy: Policy, folder: Path) -> None:
    """Writes the scalar head beside the model's files."""
    assert policy.scalar is not None
    tensors = {name: p.detach().cpu().contiguous() for name, p in policy.scalar.named_parameters()}
    save_file(tensors, folder / HEAD_FILE, metadata=about(policy))


def load_scorer(cfg: ModelConfig, device: torch.device | str = "cpu") -> Policy:
    """A reward model, step verifier or critic from a folder that holds a scalar head.

    Raises ConfigError for a model without one.
    """
    path = Path(resolve_path(cfg.path)) / HEAD_FILE
    if not path.is_file():
        raise ConfigError(
            f"model {cfg.path!r} has no scalar head ({HEAD_FILE}), so it cannot score. Give the `model` folder of a "
            "`posttrain reward` or `posttrain prm` run."
        )
    policy = load_policy(cfg, device)
    with safe_open(path, "pt") as file:
        tensors, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    heads, width = tensors["weight"].shape
    if width != policy.head.weight.shape[1]:
        raise ConfigError(f"{path} has width {width}, but the model's is {policy.head.weight.shape[1]}.")
    attach_scalar(policy, heads, about=said)
    assert policy.scalar is not None
    policy.scalar.load_state_dict(tensors)
    return as_critic(policy)
