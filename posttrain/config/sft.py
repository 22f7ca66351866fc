"""Settings of algos/sft.py."""

from __future__ import annotations

import math
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
from posttrain.types import ConfigError


@dataclass(frozen=True)
class SFTConfig:
    batch_rows: int = 32
    """Conversations or texts per optimizer step."""
    max_tokens: int = 1024
    """Longest row; what happens to longer ones is `overlong`, and they are counted, never silent."""
    overlong: Literal["cut", "drop"] = "cut"
    """Rows over max_tokens are cut at their end, or dropped whole."""
    train_on: Literal["assistant", "completion", "all"] = "assistant"
    """`assistant` trains what the assistant wrote, stop tokens included; `completion` its last turn; `all` all text."""
    neftune_alpha: float = 0.0
    """Noise on the input embeddings while training (NEFTune): uniform, times alpha / sqrt(row length × width)."""


@dataclass(frozen=True)
class SFTRecipe:
    """Supervised fine-tuning on texts or conversations.

    In conversations only what the assistant wrote is trained. Several sources are mixed by weights:
    a.jsonl*3 + b.jsonl*1.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algo: SFTConfig = field(default_factory=SFTConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require_positive(self.algo, "batch_rows", "max_tokens")
        alpha = self.algo.neftune_alpha
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ConfigError(f"algo.neftune_alpha={alpha} must be 0 (no noise) or a positive number; 5 is common.")
        if self.data.overlong != "refuse":
            raise ConfigError(
                f'data.overlong="{self.data.overlong}" is about prompts to be answered; rows to learn from are limited '
                "by algo.max_tokens. Set algo.overlong."
            )
        check_shared(self)
