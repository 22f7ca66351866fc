"""Reads the configuration of a PEFT adapter and checks it before PEFT does, which has no sentence for what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from peft import PeftType

from posttrain.types import ConfigError, Json

ADAPTER = "adapter_config.json"
RANK, SCALE = "a whole number of at least 1", "a number other than 0"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER).is_file()


def read_json(file: Path) -> Json:
    """The object in a JSON file. Raises ConfigError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}. Copy or save it again.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds a {type(found).__name__}, expected an object. Save it again.")
    return found


def read_adapter(folder: Path) -> Json:
    """The configuration of the adapter in a folder. Raises ConfigError if it is damaged or no adapter PEFT has."""
    file = folder / ADAPTER
    about = read_json(file)
    kind: Any = about.get("peft_type")
    if kind not in [known.value for known in PeftType]:
        raise ConfigError(
            f"{file} has peft_type={kind!r}, which PEFT {peft.__version__} does not know; most adapters are of type "
            "LORA. Correct it, or use the version of PEFT that wrote it."
        )
    for key, (holds, expected) in (LORA_FIELDS if kind == "LORA" else {}).items():
        value: Any = about.get(key, DEFAULTS.get(key))
        if not holds(value):
            shown = f"has {key}={value!r}" if key in about else f"has no {key}"
            raise ConfigError(f"{file} {shown}, expected {expected}. Correct it, or save the adapter again.")
    return about


def base_name(folder: Path, about: Json) -> str:
    """The base model of an adapter: a hub id or folder, also relative to the adapter's folder."""
    name = about.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{folder / ADAPTER} names no base model. Set base_model_name_or_path to its folder or hub id."
        )
    beside = folder / name
    base = str(beside) if not Path(name).exists() and beside.is_dir() else name
    if Path(base).resolve() == folder.resolve():
        raise ConfigError(f"{folder / ADAPTER} names itself as its base model. Set base_model_name_or_path.")
    return base


def adapter_rank(path: str) -> int:
    """The rank of the PEFT adapter in a folder; 0 if it is of a type without one."""
    return int(read_adapter(Path(path)).get("r") or 0)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_scale(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value != 0


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _are_names(value: object) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(n, str) for n in value))
    )


def _table_of(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(holds(v) for v in value.values()))


LORA_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_rank, RANK),
    "lora_alpha": (_is_scale, SCALE),
    "lora_dropout": (_is_share, "a number between 0 and 1"),
    "bias": (("none", "all", "lora_only").__contains__, "none, all or lora_only"),
    "target_modules": (_are_names, "a name or a list of names"),
    "target_parameters": (_are_names, "a list of names"),
    "modules_to_save": (_are_names, "a list of names"),
    "rank_pattern": (_table_of(_is_rank), f"a table of names with {RANK} for each"),
    "alpha_pattern": (_table_of(_is_scale), f"a table of names with {SCALE} for each"),
}
"""Field of a LoRA adapter → whether a value is possible, and what is expected. PEFT always writes `r` and `lora_alpha`;
without them it would assume defaults, and scale the adapter by another factor than it was trained with."""
DEFAULTS: Json = {"lora_dropout": 0.0, "bias": "none"}
