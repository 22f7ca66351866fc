"""All settings: each is a dataclass field in this package, explained by the string under it.

`sections` has the sections that recipes share. One module per algorithm has its own settings and the facts it declares
about itself. `presets` has the choices of papers and implementations, and `resolve` turns TOML and overrides into a
recipe. `docs/reference/config.md` is generated from the strings. Only the standard library is imported, so the command
line starts without loading torch.
"""

from posttrain.config.algorithms import RECIPES, algorithm_of
from posttrain.config.evaluation import EvalRecipe
from posttrain.config.facts import Facts, Saving
from posttrain.config.files import read_settings, settings_from
from posttrain.config.grpo import GRPOConfig, GRPORecipe
from posttrain.config.presets import PRESETS
from posttrain.config.recipe import EnvRecipe, PairRecipe, Recipe, Sampling, SamplingRecipe
from posttrain.config.renamed import SettingRenamed, current_name, current_value, identity
from posttrain.config.resolve import (
    as_dict,
    as_toml,
    choices,
    coerce,
    field_docs,
    locate,
    nearest,
    read_toml,
    resolve,
    resolve_as,
    stored,
)
from posttrain.config.sections import (
    ClusterConfig,
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
    "ClusterConfig",
    "DataConfig",
    "EnvConfig",
    "EnvRecipe",
    "EvalConfig",
    "EvalRecipe",
    "Facts",
    "GRPOConfig",
    "GRPORecipe",
    "PairRecipe",
    "Recipe",
    "ModelConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SFTRecipe",
    "Sampling",
    "SamplingRecipe",
    "Saving",
    "SettingRenamed",
    "TrainConfig",
    "algorithm_of",
    "as_dict",
    "as_toml",
    "choices",
    "coerce",
    "current_name",
    "current_value",
    "field_docs",
    "identity",
    "locate",
    "nearest",
    "read_settings",
    "read_toml",
    "resolve",
    "resolve_as",
    "settings_from",
    "stored",
]
