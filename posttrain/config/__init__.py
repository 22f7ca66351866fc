"""All settings: each is a dataclass field in this package, explained by the string under it.

`sections` has the sections that recipes share, one module per algorithm has its own settings, `presets` has the choices
of papers and other implementations, and `resolve` turns TOML and overrides into a recipe. The strings are also the
source of `docs/reference/config.md`. Only the standard library is imported, so the command line starts fast.
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
