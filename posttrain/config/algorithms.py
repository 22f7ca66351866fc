"""The algorithms and their recipe classes."""

from __future__ import annotations

from typing import Any

from posttrain.config.distill import DistillRecipe
from posttrain.config.dpo import DPORecipe
from posttrain.config.grpo import GRPORecipe
from posttrain.config.online_dpo import OnlineDPORecipe
from posttrain.config.ppo import PPORecipe
from posttrain.config.prm import PRMRecipe
from posttrain.config.raft import RaftRecipe
from posttrain.config.reward import RewardModelRecipe
from posttrain.config.sft import SFTRecipe

RECIPES: dict[str, type[Any]] = {
    "grpo": GRPORecipe,
    "sft": SFTRecipe,
    "dpo": DPORecipe,
    "online-dpo": OnlineDPORecipe,
    "reward": RewardModelRecipe,
    "prm": PRMRecipe,
    "ppo": PPORecipe,
    "raft": RaftRecipe,
    "distill": DistillRecipe,
}
"""All algorithms, in the order of the command line."""


def algorithm_of(recipe: object) -> str:
    """The name of a recipe's algorithm."""
    return next(name for name, cls in RECIPES.items() if type(recipe) is cls)
