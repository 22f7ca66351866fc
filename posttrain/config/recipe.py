"""Protocols for recipes: code that serves several algorithms declares which sections it reads."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from posttrain.config.facts import Facts
from posttrain.config.pairs import PairsConfig
from posttrain.config.sections import (
    DataConfig,
    EnvConfig,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)


class Recipe(Protocol):
    """The sections of every algorithm's recipe, a frozen dataclass; `algo` has the algorithm's own settings."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def algo(self) -> Any: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def run(self) -> RunConfig: ...

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        ...


@runtime_checkable
class Sampling(Protocol):
    """The sections needed to sample and score completions."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def reward(self) -> RewardConfig: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def eval(self) -> EvalConfig: ...
    @property
    def run(self) -> RunConfig: ...


@runtime_checkable
class EnvRecipe(Sampling, Protocol):
    """The same, with a multi-turn environment."""

    @property
    def env(self) -> EnvConfig: ...


class SamplingRecipe(Recipe, Sampling, Protocol):
    """The recipe of an algorithm that samples completions."""


@runtime_checkable
class PairRecipe(SamplingRecipe, Protocol):
    """The recipe of an algorithm that learns from preferences."""

    @property
    def pairs(self) -> PairsConfig: ...
