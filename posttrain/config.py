"""Recipes: TOML plus `--section.key value` overrides become frozen dataclasses, or one clear error.

Every setting of the system is a field below, explained once by the string under it. `docs/config.md` is made from
those strings. Only the standard library is imported, so the command line answers before torch is loaded.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from posttrain.types import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    path: str = "abacus"
    """Folder or hub id of a Hugging Face causal language model, or `abacus`, the tiny base model that ships here."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights, for sampling and for training alike."""
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer; 0 trains all weights."""
    lora_alpha: int = 32
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class DataConfig:
    tasks: str = "arithmetic"
    """What to train on: a built-in task name, a JSONL or Parquet file, or a Hugging Face data set id."""
    eval_tasks: str = ""
    """What to evaluate on; empty uses the built-in task's held-out split, or holds out rows of the file."""
    holdout: float = 0.1
    """Share of a file's rows kept out of training for evaluation when eval_tasks is empty."""
    count: int = 4096
    """Problems to generate for a built-in task, or the most rows to read from a file (0 reads all)."""
    system: str = ""
    """System message put before every task; empty adds none."""
    instruction: str = ""
    """Text appended to each question after a blank line, e.g. how to format the answer."""
    max_prompt_tokens: int = 1024
    """Prompts longer than this are refused before step 0, or dropped and counted (see overlong)."""
    format: Literal["chat", "plain"] = "chat"
    """`chat` uses the tokenizer's chat template; `plain` feeds the text as it is, for base models without one."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What to do with prompts over max_prompt_tokens; nothing is ever cut silently."""


@dataclass(frozen=True)
class RewardConfig:
    name: str = "auto"
    """`auto` (the task's own verifier), `exact`, `numeric`, `math`, `format`, or `FILE.py:FUNCTION`."""
    max_failure_rate: float = 0.01
    """Stop when more than this share of a step's attempts could not be scored (and more than one attempt)."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["embedded"] = "embedded"
    """What samples completions. `embedded` runs in this process."""
    slots: int = 128
    """Sequences decoded at once; a slot is refilled the moment its sequence ends."""
    max_tokens: int = 256
    """Longest completion, stop token included; longer ones are cut and marked `length`."""
    temperature: float = 1.0
    """Sampling temperature; the learner's log-probabilities use the same one."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 60
    """Updates to run. For sft the default is 0: one pass over the data."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling so that it would be 0 one update after the last."""
    warmup_steps: int = 0
    """Optimizer updates over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW first-moment decay."""
    beta2: float = 0.95
    """AdamW second-moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""
    tokens_per_pass: int = 8192
    """Most tokens in one forward-backward pass. Memory only: the gradient does not depend on it."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"
    """`auto` (cuda when present, else cpu), `cpu`, or a cuda device."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """Evaluate on held-out tasks every this many steps; 0 evaluates only before and after."""
    problems: int = 256
    """Held-out tasks per evaluation."""
    samples: int = 1
    """Answers per task."""
    temperature: float = 1.0
    """Sampling temperature of evaluations."""


@dataclass(frozen=True)
class RunConfig:
    out: str = ""
    """Run folder; empty picks `runs/<algorithm>-<number>`."""
    seed: int = 0
    """Everything random in the run is a function of this number."""
    checkpoint_every: int = 10
    """Steps between checkpoints. A killed run loses at most this much work, and no exactness."""
    keep: int = 2
    """Newest checkpoints kept; the last one is always whole."""


@dataclass(frozen=True)
class GRPOConfig:
    prompts: int = 32
    """Tasks per step."""
    group_size: int = 8
    """Completions per task; their mean reward is the baseline."""
    minibatches: int = 1
    """Optimizer steps per batch of completions; 1 is strictly on-policy."""
    policy_loss: Literal["clip", "reinforce"] = "clip"
    """`clip` is PPO's pessimistic ratio; `reinforce` is the plain policy gradient."""
    clip_low: float = 0.2
    """Ratios below 1 − clip_low earn nothing more."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high earn nothing more (DAPO's clip-higher uses 0.28)."""
    normalise_std: bool = False
    """Divide advantages by the group's standard deviation (GRPO as published); off is Dr. GRPO's choice."""
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    """How tokens are weighted over the optimizer batch: DAPO, GRPO, sequence sum, Dr. GRPO."""
    kl_coef: float = 0.0
    """Weight of the k3 KL penalty towards the starting model; 0 keeps no reference."""
    is_cap: float = 0.0
    """Cap of the importance weight that corrects sampler against learner; 0 does not correct."""
    max_mismatch: float = 0.5
    """Stop when sampler and learner differ by more than this in one token's log-probability."""
    max_flat_steps: int = 20
    """Stop after this many steps in a row in which no group had differing rewards."""


@dataclass(frozen=True)
class SFTConfig:
    batch_rows: int = 32
    """Conversations or texts per optimizer step."""
    max_tokens: int = 1024
    """Longest row; longer ones are cut at the end and counted, never silently."""
    train_on: Literal["assistant", "all"] = "assistant"
    """`assistant` trains what the assistant wrote, its stop token included; `all` trains every token but the first."""


@dataclass(frozen=True)
class GRPORecipe:
    """Group-relative policy optimisation on a reward that a program can compute."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: GRPOConfig = field(default_factory=GRPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        algo = self.algo
        if algo.group_size < 2:
            raise ConfigError(
                f"group_size={algo.group_size} gives every answer advantage 0 and nothing would train. "
                "Set algo.group_size to 2 or more."
            )
        if algo.prompts * algo.group_size % algo.minibatches:
            raise ConfigError(
                f"{algo.prompts} prompts × {algo.group_size} completions do not divide into "
                f"{algo.minibatches} minibatches. Choose algo.minibatches to divide {algo.prompts * algo.group_size}."
            )
        if self.rollout.temperature <= 0:
            raise ConfigError("rollout.temperature=0 makes all answers of a group equal. Set it above 0, usually 1.")
        if self.eval.temperature < 0:
            raise ConfigError(f"eval.temperature={self.eval.temperature} is negative; 0 is greedy.")
        for name in ("clip_low", "clip_high", "kl_coef", "is_cap", "max_mismatch"):
            if getattr(algo, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(algo, name)} cannot be negative.")
        _require_positive(algo, "prompts", "minibatches", "max_flat_steps")
        _require_positive(self.train, "steps")
        _check_shared(self)


@dataclass(frozen=True)
class SFTRecipe:
    """Supervised fine-tuning on texts or conversations."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    algo: SFTConfig = field(default_factory=SFTConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=0))
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _require_positive(self.algo, "batch_rows", "max_tokens")
        _check_shared(self)


Recipe = GRPORecipe | SFTRecipe
RECIPES: dict[str, type[GRPORecipe] | type[SFTRecipe]] = {"grpo": GRPORecipe, "sft": SFTRecipe}
"""Algorithm name → the recipe class its settings resolve to."""


def _require_positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) <= 0:
            raise ConfigError(f"{name}={getattr(section, name)} must be 1 or more.")


def _check_shared(recipe: Any) -> None:
    train, run, data = recipe.train, recipe.run, recipe.data
    if min(train.lr, train.warmup_steps, train.steps, train.max_grad_norm, train.weight_decay) < 0:
        raise ConfigError("train.lr, warmup_steps, steps, max_grad_norm and weight_decay cannot be negative.")
    if not (0 <= train.beta1 < 1 and 0 <= train.beta2 < 1):
        raise ConfigError(f"train.beta1={train.beta1} and beta2={train.beta2} must both be in [0, 1).")
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"data.holdout={data.holdout} is not in [0, 1).")
    if data.count < 0:
        raise ConfigError(f"data.count={data.count} is negative; 0 reads all rows of a file.")
    if recipe.model.lora_rank < 0:
        raise ConfigError(f"model.lora_rank={recipe.model.lora_rank} is negative; 0 trains all weights.")
    _require_positive(train, "tokens_per_pass")
    _require_positive(run, "checkpoint_every", "keep")
    for section, names in (("rollout", ("slots", "max_tokens")), ("eval", ("problems", "samples"))):
        if hasattr(recipe, section):
            _require_positive(getattr(recipe, section), *names)


def read_toml(path: str | Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Reads a recipe file: (algorithm, settings by section, the `[expect]` table)."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist.") from None
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}.") from None
    algorithm, expect = raw.pop("algorithm", None), raw.pop("expect", {})
    if not isinstance(algorithm, str) or algorithm not in RECIPES:
        raise ConfigError(f"{path}: algorithm is {algorithm!r}; expected one of {', '.join(RECIPES)}.")
    return algorithm, raw, expect


def resolve(algorithm: str, settings: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Any:
    """Builds the recipe of `algorithm` from nested settings, then from overrides named `section.key` or just `key`."""
    cls = RECIPES[algorithm]
    merged: dict[str, Any] = {s: dict(v) if isinstance(v, Mapping) else v for s, v in settings.items()}
    for name, value in (overrides or {}).items():
        section, key = locate(cls, name)
        values = merged.setdefault(section, {})
        if isinstance(values, dict):  # anything else is refused, with its name, by _build
            values[key] = value
    return _build(cls(), merged, "")


def locate(cls: type, name: str) -> tuple[str, str]:
    """Finds the (section, key) that `section.key`, or a key only one section has, stands for."""
    known = {f"{s.name}.{k.name}": (s.name, k.name) for s in fields(cls) for k in fields(_section_type(cls, s.name))}
    name = name.replace("-", "_")
    if name in known:
        return known[name]
    hits = [full for full, (_, key) in known.items() if key == name]
    if len(hits) == 1:
        return known[hits[0]]
    if hits:
        raise ConfigError(f"setting {name!r} is ambiguous: it could be {' or '.join(sorted(hits))}. Give the section.")
    raise ConfigError(f"unknown setting {name!r}{nearest(name, [*known, *(k for _, k in known.values())])}")


def nearest(name: str, options: list[str]) -> str:
    """` Did you mean 'x'?`, or the end of the sentence when nothing is near."""
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f". Did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(set(options)))}."


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _section_type(cls: type, name: str) -> type:
    return _hints(cls)[name]


def _build(default: Any, values: Mapping[str, Any], where: str) -> Any:
    """`default` with the values given; a recipe's own defaults (sft's steps) outlive a section that sets others."""
    cls = type(default)
    known = {f.name for f in fields(cls)}
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown setting {where}{name!r}{nearest(name, sorted(known))}")
        hint = _hints(cls)[name]
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} is a section; write [{name}] with settings below it, not a value.")
            built[name] = _build(getattr(default, name), value, f"{name}.")
        else:
            built[name] = coerce(value, hint, f"{where}{name}")
    return replace(default, **built)


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Turns a TOML value or command-line text into the field's type, or says what was expected."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}.")
        return value
    if origin in (types.UnionType, typing.Union):
        return coerce(value, next(a for a in typing.get_args(hint) if a is not type(None)), name)
    if hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if hint in (int, float) and (isinstance(value, str) or value != value):
        try:
            number = hint(value)
        except ValueError:
            number = math.nan
        if number != number:  # NaN would pass every range check below and poison the weights
            raise ConfigError(f"{name}={value!r} is not {'a whole number' if hint is int else 'a number'}.")
        return number
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} is {type(value).__name__}, expected {hint.__name__}.")
    return value


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a config dataclass."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0]).body
    docs: dict[str, str] = {}
    for node, after in zip(body, body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            docs[node.target.id] = after.value.value
    return docs


def as_dict(recipe: Any) -> dict[str, dict[str, Any]]:
    """Section → key → value, ready for JSON."""
    return {
        s.name: {k.name: getattr(getattr(recipe, s.name), k.name) for k in fields(getattr(recipe, s.name))}
        for s in fields(recipe)
    }


def as_toml(algorithm: str, recipe: Any, explain: bool = True) -> str:
    """The resolved recipe as TOML that resolves to itself, each setting explained unless `explain` is off."""
    lines = [f'algorithm = "{algorithm}"']
    for section in fields(recipe):
        value = getattr(recipe, section.name)
        docs = field_docs(type(value))
        lines += ["", f"[{section.name}]"]
        for key in fields(value):
            if explain:
                lines.append(f"# {docs[key.name]}")
            lines.append(f"{key.name} = {_toml_value(getattr(value, key.name))}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's, plus DEL
    return repr(value)
