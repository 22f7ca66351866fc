"""Protocols for recipes: code that serves several algorithms declares which sections it reads."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from posttrain.config.facts import Facts
from posttrain.config.pairs import PairSections
from posttrain.config.sections import EnvConfig, EvalConfig, RewardConfig, RolloutConfig, SharedSections


class Recipe(SharedSections, Protocol):
    """The sections of every algorithm's recipe, a frozen dataclass; `algo` has the algorithm's own settings."""

    @property
    def algo(self) -> Any: ...

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        ...


@runtime_checkable
class Sampling(SharedSections, Protocol):
    """The sections needed to sample and score completions."""

    @property
    def reward(self) -> RewardConfig: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def eval(self) -> EvalConfig: ...


@runtime_checkable
class EnvRecipe(Sampling, Protocol):
    """The same, with a multi-turn environment."""

    @property
    def env(self) -> EnvConfig: ...


class SamplingRecipe(Recipe, Sampling, Protocol):
    """The recipe of an algorithm that samples completions."""


@runtime_checkable
class PairRecipe(SamplingRecipe, PairSections, Protocol):
    """The recipe of an algorithm that learns from preferences."""
