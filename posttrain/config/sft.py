"""Settings of algos/sft.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.sections import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    check_shared,
    require_positive,
)


@dataclass(frozen=True)
class SFTConfig:
    batch_rows: int = 32
    """Conversations or texts per optimizer step."""
    max_tokens: int = 1024
    """Longest row; longer ones are cut at the end and counted, never silently."""
    train_on: Literal["assistant", "all"] = "assistant"
    """`assistant` trains what the assistant wrote, its stop token included; `all` trains every token but the first."""


@dataclass(frozen=True)
class SFTRecipe:
    """Supervised fine-tuning on texts or conversations.

    In conversations only what the assistant wrote is trained.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algo: SFTConfig = field(default_factory=SFTConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require_positive(self.algo, "batch_rows", "max_tokens")
        check_shared(self)
