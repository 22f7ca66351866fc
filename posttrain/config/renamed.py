"""Renamed settings: old names still work, with a warning that gives the new name.

A recipe's identity, which pipelines hash, uses the original names and leaves out settings that were added later and
have their default value, so that renaming or adding a setting does not change it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from posttrain.types import Json, JsonView

RENAMED = {
    "train.tokens_per_pass": "train.micro_batch_tokens",
    "algo.max_refills": "algo.max_resamples",
    "algo.drop_truncated": "algo.mask_truncated",
    "algo.unfinished": "algo.truncated",
    "algo.unfinished_value": "algo.truncated_value",
    "algo.overlap": "algo.ahead",
}
"""Old name → current name."""
WAS = {"algo.overlap": {False: 0, True: 1}}
"""Old name → its values that are written differently today → what they are."""
ADDED = {
    "model.continue_adapter": False,
    "data.shuffle": True,
    "data.template_kwargs": {},
    "reward.weights": (),
    "rollout.stop": (),
    "rollout.stop_token_ids": (),
    "train.lanes": 1,
    "train.learner": "local",
    "train.epochs": 1,
    "run.track": "",
    "run.keep_best": "",
    "run.patience": 0,
    "run.journal": True,
    "rollout.vllm_python": "",
    "rollout.vllm_gpus": "",
    "rollout.vllm_sync": "files",
    "rollout.vllm_timeout": 600.0,
    "algo.held_out_labels": "",
    "algo.lm_coef": 0.0,
}
"""Settings that were added later → their default, which keeps the previous behaviour."""
ADDED_SECTIONS = {"eval": {"every": 0}}
"""Sections that some algorithms got later → the same."""
WITHOUT_EFFECT = ("cluster",)
"""Sections that do not change a result, and so are not part of a recipe's identity."""
CHANGED = {("data.count", "0"): 4096}
"""(setting, default as text) → its former default, which draws the same number of problems."""


class SettingRenamed(FutureWarning):
    """A setting was given by its old name."""


def current_name(name: str, known: Collection[str]) -> str:
    """The current name of `section.key` or `key`; warns if it is an old name. `known` has the recipe's full names."""
    for old, new in RENAMED.items():
        if new in known and old not in known and name in (old, old.partition(".")[2]):
            warnings.warn(f"setting {old} was renamed to {new}. Use {new}.", SettingRenamed, stacklevel=2)
            return new
    return name


def current_value(name: str, current: str, value: Any) -> Any:
    """The value of the setting `current` that was given as `name`, which may be an old name of it."""
    for old, values in WAS.items():
        if current == RENAMED[old] and name in (old, old.partition(".")[2]):
            meant = str(value).lower() == "true" if str(value).lower() in ("true", "false") else None
            return value if meant is None else values[meant]
    return value


def current_settings(settings: JsonView, known: Collection[str], warn: bool = True) -> Json:
    """Nested settings with old names replaced; anything that is not a section is kept for the caller to reject."""
    out: Json = {s: dict(v) if isinstance(v, Mapping) else v for s, v in settings.items()}
    for section, values in out.items():
        if isinstance(values, dict):
            with warnings.catch_warnings():
                if not warn:
                    warnings.simplefilter("ignore", SettingRenamed)
                now = {k: current_name(f"{section}.{k}", known) for k in values}
            out[section] = {
                now[k].partition(".")[2]: current_value(f"{section}.{k}", now[k], v) for k, v in values.items()
            }
    return out


def identity(sections: Mapping[str, JsonView]) -> dict[str, Json]:
    """A recipe as section → key → value with the original names, without later settings that have their default."""
    first = {new: old for old, new in RENAMED.items()}
    out: dict[str, Json] = {}
    for section, values in sections.items():
        full = {f"{section}.{key}": value for key, value in values.items()}
        if section in WITHOUT_EFFECT or values == ADDED_SECTIONS.get(section):
            continue
        kept = {name: value for name, value in full.items() if name not in ADDED or value != ADDED[name]}
        out[section] = {
            first.get(name, name).partition(".")[2]: _first_value(name, CHANGED.get((name, str(value)), value))
            for name, value in kept.items()
        }
    return out


def _first_value(name: str, value: Any) -> Any:
    """A value as it was written under the setting's original name; what could not be written then is kept."""
    for old, values in WAS.items():
        if RENAMED[old] == name:
            return next((was for was, now in values.items() if now == value), value)
    return value
