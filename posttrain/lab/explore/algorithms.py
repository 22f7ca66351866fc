"""Algorithm explorer: the memory that each algorithm needs according to the planner, and the data it learns from.

Every number is `planner.memory` of a real recipe on a well-known model shape; no model is loaded. Sizes are bytes per
device. Where this package needs less than the textbook (DPO's reference runs only once), the page has a switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from posttrain import config
from posttrain.lab.folders import Place
from posttrain.lab.routing import get
from posttrain.models.shapes import SHAPES, ModelShape
from posttrain.planner.memory import Memory, Rows, Where, plan_memory, reference_bytes, samples
from posttrain.types import ConfigError, Json

SIZES = {
    "1b": ("llama-3.2-1b", "Llama 3.2 1B"),
    "7b": ("qwen2.5-7b", "Qwen2.5 7B"),
    "13b": ("llama-2-13b", "Llama 2 13B"),
    "70b": ("llama-3.1-70b", "Llama 3.1 70B"),
}
CARDS = (12, 24, 40, 80)
"""Memory of common graphics cards in GiB."""
DEVICES = (1, 2, 4, 8)
LENGTHS = (512, 1024, 2048, 4096, 8192)
RANK = 16  # LoRA rank
PROMPT = 4  # one quarter of a sequence is its prompt
AT_ONCE = 32  # answers sampled at once
PROCESS = 1 << 30  # bytes of a GPU process, as in `posttrain plan`
PARTS = {
    "weights": ("weights", "float32 masters"),
    "gradients": ("gradients", "the output layer's gradient"),
    "optimizer": ("optimizer",),
    "reference": ("reference model",),
    "critic": ("critic",),
    "reward model": ("reward model",),
    "KV cache": ("KV cache",),
}
"""Part of a bar → the planner's parts in it; the rest is activations and temporary buffers."""
REST = "activations"


@dataclass(frozen=True)
class Kind:
    """An algorithm: its settings here, its models and data, and a short description."""

    title: str
    algorithm: str
    settings: Mapping[str, Mapping[str, object]]
    roles: tuple[str, ...]
    data: str
    about: str
    explores: str


_PAIRS = {"data": {"tasks": "pairs.jsonl"}}
KINDS: dict[str, Kind] = {
    "ppo": Kind("PPO", "ppo", {"algo": {"kl_coef": 0.02}}, ("policy", "reference", "critic", "reward model"),
                "prompts, and a reward model learned from comparisons",
                "The critic predicts the reward at every token; what turns out better becomes more likely.",
                "yes: it samples answers and gets their rewards"),
    "dpo": Kind("DPO", "dpo", _PAIRS, ("policy", "reference"), "pairs of answers, one preferred",
                "No sampling and no reward model: the preferred answer becomes more likely relative to the reference.",
                "no: it only sees the answers in the data"),
    "grpo": Kind("GRPO", "grpo", {"algo": {"kl_coef": 0.04}}, ("policy", "reference"),
                 "prompts whose answers a program can check",
                 "Several answers to one prompt are compared with each other; their mean reward replaces the critic.",
                 "yes: several answers to each prompt"),
    "rloo": Kind("RLOO", "grpo", {"algo": {"kl_coef": 0.04, "baseline": "leave-one-out"}}, ("policy", "reference"),
                 "prompts, and any reward", "Like GRPO, with the mean reward of the other answers as the baseline.",
                 "yes: several answers to each prompt"),
    "kto": Kind("KTO", "dpo", {**_PAIRS, "algo": {"loss": "kto"}}, ("policy", "reference"),
                "single answers, each with a thumb up or down", "Like DPO, but without pairs.",
                "no: it only sees the answers in the data"),
    "sft": Kind("SFT", "sft", {}, ("policy",), "demonstrations: prompts with a good answer",
                "Each token of the demonstration becomes more likely.", "no: it imitates"),
    "reward": Kind("Reward model", "reward", _PAIRS, ("reward model",), "pairs of answers, one preferred",
                   "Not a policy: it learns the scores that PPO maximises.", "no: it only scores"),
}  # fmt: skip
"""In table order; PPO, DPO and GRPO also have a card."""


@dataclass(frozen=True)
class Asked:
    """The settings in the URL. `length` is tokens per sequence; `cached` runs DPO's reference only once."""

    size: str = "7b"
    dtype: str = "bfloat16"
    lora: bool = False
    devices: int = 1
    length: int = 1024
    recompute: bool = True
    cached: bool = False

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Asked:
        """Parses URL parameters. Raises ConfigError for values that are not offered."""
        choices: dict[str, tuple[Any, ...]] = {
            "size": tuple(SIZES), "dtype": ("bfloat16", "float32"), "devices": DEVICES, "length": LENGTHS,
        }  # fmt: skip
        found: Json = {}
        for field in fields(cls):
            options = {str(choice).lower(): choice for choice in choices.get(field.name, (True, False))}
            given = query.get(field.name, str(field.default).lower())
            if given not in options:
                raise ConfigError(f"{field.name}={given!r} is not one of {', '.join(options)}.")
            found[field.name] = options[given]
        return cls(**found)


@lru_cache(maxsize=512)
def recipe_of(name: str, size: str, dtype: str, lora: bool, length: int, recompute: bool) -> Any:
    """The resolved recipe of an algorithm, with one row or pair computed at a time."""
    kind = KINDS[name]
    settings: dict[str, dict[str, object]] = {section: dict(values) for section, values in kind.settings.items()}
    settings["model"] = {"dtype": dtype, "lora_rank": RANK if lora else 0, "gradient_checkpointing": recompute}
    settings["train"] = {"micro_batch_tokens": 2 * length}
    if "reward model" in kind.roles[1:]:
        settings["reward"] = {"name": f"model:{SIZES[size][0]}"}  # of the same size as the policy
    if config.RECIPES[kind.algorithm]().facts().samples == "every step":
        settings["rollout"] = {"max_tokens": rows_of(length).answer, "slots": AT_ONCE}
    return config.resolve(kind.algorithm, settings)


def rows_of(length: int) -> Rows:
    """Splits a sequence length into prompt and answer."""
    return Rows(length // PROMPT, length - length // PROMPT)


def planned(name: str, asked: Asked, devices: int) -> tuple[Any, Memory]:
    """The recipe, and its memory plan on this many devices."""
    recipe = recipe_of(name, asked.size, asked.dtype, asked.lora, asked.length, asked.recompute)
    shape, where = shape_of_size(asked.size), Where(devices, True, False, PROCESS)
    return recipe, plan_memory(recipe, shape, rows_of(asked.length), where)


def shape_of_size(size: str) -> ModelShape:
    """The model shape of a size option."""
    return SHAPES[SIZES[size][0]]


def parts_of(name: str, asked: Asked, devices: int) -> dict[str, int]:
    """Bytes per device for each part of the bar, in the peak phase; they add up to the planner's peak.

    Unless `cached`, DPO's reference is added on top, as large as the one of online DPO.
    """
    recipe, memory = planned(name, asked, devices)
    pieces = {**memory.held}
    for part, count in memory.phases[memory.peak_phase].items():
        pieces[part] = pieces.get(part, 0) + count
    process = pieces.pop("process")
    found = {part: sum(pieces.pop(piece, 0) for piece in inside) for part, inside in PARTS.items()}
    if recipe.facts().reference == "precomputed" and not asked.cached:
        found["reference"] += -(-reference_bytes(recipe, shape_of_size(asked.size)) // devices)
    return {**found, REST: sum(pieces.values()), "process": process}


def copies(name: str, asked: Asked, parts: Mapping[str, int]) -> dict[str, str]:
    """How each model of an algorithm is held: in memory, shared with the policy, or run once before training."""
    found: dict[str, str] = {}
    for role in KINDS[name].roles:
        held = role == KINDS[name].roles[0] or parts[role] > 0
        found[role] = "held" if held else "shared" if asked.lora else "read once"
    return found


def compute(asked: Asked) -> Json:
    """All data of the page, for JSON."""
    rows: list[Json] = []
    for name, kind in KINDS.items():
        parts = parts_of(name, asked, asked.devices)
        total = sum(parts.values())
        peaks = {devices: sum(parts_of(name, asked, devices).values()) for devices in DEVICES}
        fewest = {card: next((n for n, peak in peaks.items() if peak <= card << 30), None) for card in CARDS}
        recipe, memory = planned(name, asked, asked.devices)
        models = copies(name, asked, parts)
        rows.append({
            "name": name, "title": kind.title, "about": kind.about, "data": kind.data, "explores": kind.explores,
            "models": models, "held": sum(how == "held" for how in models.values()),
            "online": samples(recipe), "phase": memory.peak_phase,
            "parts": parts, "total": total, "fits": [card for card in CARDS if total <= card << 30],
            "fewest": [[card, count] for card, count in fewest.items()],
        })  # fmt: skip
    shape, rows_asked = shape_of_size(asked.size), rows_of(asked.length)
    model = {"title": SIZES[asked.size][1], "parameters": shape.parameters, "adapters": shape.adapters(RANK)}
    sequence = {"prompt": rows_asked.prompt, "answer": rows_asked.answer, "at_once": AT_ONCE}
    return {"asked": asdict(asked), "model": model, "cards": CARDS, "sequence": sequence, "kinds": rows}


def routes(place: Place) -> list[BaseRoute]:
    """The explorer's route; it does not depend on the folder."""
    return [get("/api/explore/algorithms", _read)]


def _read(request: Request) -> Json:
    return compute(Asked.of(request.query_params))
