"""What recipes have in common, as types: code that serves several algorithms names the sections it reads."""

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
        """The models a run holds, what it samples and the passes it makes, with these settings."""
        ...


@runtime_checkable
class Sampling(Protocol):
    """The sections that sampling and scoring completions reads."""

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
    """The same with an environment of several turns."""

    @property
    def env(self) -> EnvConfig: ...


class SamplingRecipe(Recipe, Sampling, Protocol):
    """An algorithm's recipe that samples completions."""


@runtime_checkable
class PairRecipe(SamplingRecipe, Protocol):
    """An algorithm's recipe that learns from preferences."""

    @property
    def pairs(self) -> PairsConfig: ...
