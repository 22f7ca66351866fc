"""Settings of algos/sft.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from posttrain.config.facts import Facts
from posttrain.config.sections import (
    ClusterConfig,
    DataConfig,
    EpochTrainConfig,
    HeldOutConfig,
    ModelConfig,
    RunConfig,
    check_shared,
    require_positive,
)
from posttrain.types import ConfigError


@dataclass(frozen=True)
class SFTConfig:
    batch_rows: int = 32
    """Conversations or texts per optimizer step."""
    max_tokens: int = 1024
    """Maximum row length; longer rows are handled by `overlong` and counted."""
    overlong: Literal["cut", "drop"] = "cut"
    """What to do with rows over max_tokens: truncate them at the end, or drop them."""
    train_on: Literal["assistant", "completion", "all"] = "assistant"
    """`assistant` trains all assistant turns, stop tokens included; `completion` only the last one; `all` all text."""
    neftune_alpha: float = 0.0
    """NEFTune: uniform noise on the input embeddings, scaled by alpha / sqrt(row length × width); 0 adds none."""


@dataclass(frozen=True)
class SFTRecipe:
    """Supervised fine-tuning on texts or conversations.

    In conversations, only the assistant's turns are trained. Several sources can be mixed with weights:
    a.jsonl*3 + b.jsonl*1.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algo: SFTConfig = field(default_factory=SFTConfig)
    train: EpochTrainConfig = field(default_factory=EpochTrainConfig)
    eval: HeldOutConfig = field(default_factory=HeldOutConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def facts(self) -> Facts:
        """The models a run with these settings holds, what it samples and its forward passes."""
        algo = self.algo
        return Facts(
            data="conversations",
            samples="never",
            batch_rows=algo.batch_rows,
            held_out_pass=True,
            max_tokens=algo.max_tokens,
        )

    def __post_init__(self) -> None:
        require_positive(self.algo, "batch_rows", "max_tokens")
        alpha = self.algo.neftune_alpha
        if not (alpha >= 0 and math.isfinite(alpha)):
            raise ConfigError(f"algo.neftune_alpha={alpha} must be 0 (no noise) or a positive number; 5 is common.")
        if self.data.overlong != "refuse":
            raise ConfigError(
                f'data.overlong="{self.data.overlong}" applies to prompts for sampling; training rows are limited by '
                "algo.max_tokens. Set algo.overlong."
            )
        check_shared(self)
