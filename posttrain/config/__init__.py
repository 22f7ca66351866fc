"""Every setting of the system: a field of a dataclass here, explained once by the string under it.

`sections` holds what recipes share, one file more for each algorithm, `presets` what papers and other implementations
chose, `resolve` turns TOML and overrides into a recipe. `docs/reference/config.md` is made from the strings. Only the standard
library is imported, so the command line answers before torch is loaded.
"""

from posttrain.config.algorithms import RECIPES
from posttrain.config.files import read_settings, settings_from
from posttrain.config.grpo import GRPOConfig, GRPORecipe
from posttrain.config.presets import PRESETS
from posttrain.config.resolve import as_dict, as_toml, coerce, field_docs, locate, nearest, read_toml, resolve
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
from posttrain.config.sft import SFTConfig, SFTRecipe

__all__ = [
    "PRESETS",
    "RECIPES",
    "DataConfig",
    "EnvConfig",
    "EvalConfig",
    "GRPOConfig",
    "GRPORecipe",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SFTRecipe",
    "TrainConfig",
    "as_dict",
    "as_toml",
    "coerce",
    "field_docs",
    "locate",
    "nearest",
    "read_settings",
    "read_toml",
    "resolve",
    "settings_from",
]
