"""Estimates memory and time of a run: the planner's arithmetic plus measured row lengths and speeds.

Row lengths come from the data if it and the tokenizer are available locally, speeds from posttrain/planner/speed.py.
Estimating does not change the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from posttrain import config
from posttrain.config import EnvRecipe, PairRecipe, Recipe
from posttrain.data.chat import ChatFormat
from posttrain.data.conversation_rows import RowSettings, training_rows
from posttrain.data.conversations import load_conversations
from posttrain.data.lengths import fitting
from posttrain.data.pairs import pair_rows
from posttrain.data.tasks.load import load_tasks
from posttrain.models.adapters import adapter_rank
from posttrain.models.kernels.build import library
from posttrain.models.load import Policy
from posttrain.models.preflight import refusal
from posttrain.models.shapes import ModelShape, shape_of
from posttrain.models.weights import base_of, load_tokenizer
from posttrain.planner.memory import BASELINE, TILE, Memory, Rows, Where, plan_memory, rollout_of, samples
from posttrain.planner.speed import step_seconds
from posttrain.planner.workers import worker_memory
from posttrain.rollout.sample_pairs import load_pairs
from posttrain.train.device import resolve
from posttrain.train.job import Setup
from posttrain.types import ConfigError, Json, PosttrainError, Sample


@dataclass(frozen=True)
class Change:
    """A setting that reduces memory; `saves` is the peak reduction in bytes of this change alone."""

    setting: str
    value: str
    saves: int
    cost: str


@dataclass(frozen=True)
class Plan:
    """Estimated memory and time of a run.

    `seconds` has the parts of one step; empty if speeds were not measured. `refused` says why training would refuse the
    model or the data; empty if nothing speaks against them.
    """

    algorithm: str
    shape: ModelShape
    rows: Rows
    memory: Memory
    limit: int
    changes: list[Change]
    seconds: dict[str, float]
    steps: int
    unknown: list[str]
    refused: str = ""
    workers: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """(number, peak bytes of each) by kind of process, if there are several."""
    one_machine: bool = True

    @property
    def peak(self) -> int:
        """Peak bytes on a machine: of all processes, or of the largest where they are on several machines."""
        sizes = [count * size if self.one_machine else size for count, size in self.workers.values()]
        return (sum(sizes) if self.one_machine else max(sizes)) if sizes else self.memory.peak

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    def as_dict(self) -> Json:
        """The plan as JSON values, in bytes and seconds."""
        step = sum(self.seconds.values()) if self.seconds else None
        return {
            "algorithm": self.algorithm,
            "parameters": self.shape.parameters,
            "rows": vars(self.rows),
            "held": dict(self.memory.held),
            "phases": {name: dict(parts) for name, parts in self.memory.phases.items()},
            "peak": self.peak,
            "processes": {name: {"count": n, "bytes": size} for name, (n, size) in self.workers.items()},
            "peak_phase": self.memory.peak_phase,
            "memory": self.limit,
            "fits": self.fits,
            "changes": [vars(change) for change in self.changes],
            "seconds": self.seconds,
            "seconds_step": step,
            "seconds_run": step * self.steps if step is not None and self.steps else None,
            "steps": self.steps,
            "unknown": self.unknown,
            "refused": self.refused,
        }


def plan(
    recipe: Recipe | str | Path,
    memory: float | None = None,
    gpus: int = 1,
    device: str = "auto",
    probe: bool = True,
    rows: Rows | None = None,
) -> Plan:
    """Estimates memory and time of a resolved recipe, or of the recipe in a TOML file.

    `memory` is GiB per device (None: this machine's); `gpus` shards weights, gradients and optimizer states; `probe`
    times a small model if the device is present; `rows` overrides the measured row lengths. Raises ConfigError for
    invalid arguments and for a model of unknown shape.
    """
    if memory is not None and memory <= 0:
        raise ConfigError(f"memory={memory:g} GiB must be positive. Give the GiB of one device, such as 24.")
    if gpus < 1:
        raise ConfigError(f"gpus={gpus}, but a run needs at least one device. Give 1 or more.")
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise ConfigError(f"device={device!r} is unknown. Give auto, cpu or cuda.")
    if isinstance(recipe, str | Path):
        algorithm, sections, _ = config.read_toml(recipe)
        recipe = cast(Recipe, config.resolve(algorithm, sections))
    refused = refusal(recipe.model)
    try:
        recipe = _with_rank(recipe)
        shape = shape_of(base_of(recipe.model.path))
    except PosttrainError as error:
        raise (ConfigError(refused) if refused else error) from None
    cuda = device.startswith("cuda") or gpus > 1 or (device == "auto" and torch.cuda.is_available())
    unknown: list[str] = []
    if rows is None:
        rows, note, fault = measured_rows(recipe)
        unknown += [note] if note else []
        refused = refused or fault
    where = Where(gpus, cuda, library() is not None, resident() if not cuda else 1 << 30)
    found = plan_memory(recipe, shape, rows, where)
    limit = machine_memory(cuda) if memory is None else round(memory * 2**30)
    changes = [] if found.peak <= limit else advice(recipe, shape, rows, where, limit)
    seconds: dict[str, float] = {}
    if cuda and not torch.cuda.is_available() or gpus > 1:
        unknown.append("Time: the device is not available here, so nothing could be timed.")
    elif probe:
        seconds = step_seconds(recipe, shape, rows, "cuda" if cuda else "cpu")
    unknown += not_known(recipe, where)
    algorithm = config.algorithm_of(recipe)
    spread = worker_memory(recipe, shape, rows, where), recipe.cluster.backend == "processes"
    return Plan(algorithm, shape, rows, found, limit, changes, seconds, recipe.train.steps, unknown, refused, *spread)


def warning(recipe: Recipe) -> str:
    """One sentence if a run may not fit in this machine's memory, else empty. Arithmetic only, no probe.

    Checks rows of the maximum length first, which is cheap. Only if they do not fit, it reads the data and warns if the
    actual rows do not fit either. Empty if the model's shape is unknown.
    """
    with suppress(PosttrainError):
        recipe = _with_rank(recipe)
        shape, rows = shape_of(base_of(recipe.model.path)), longest_rows(recipe)
        where = Where(1, resolve(recipe.train.device).type == "cuda", library() is not None)
        found, limit = plan_memory(recipe, shape, rows, where), machine_memory(where.cuda)
        if found.peak > limit:
            rows = measured_rows(recipe)[0]
            found = plan_memory(recipe, shape, rows, where)
        if found.peak > limit:
            longest = f" with rows of {rows.longest:,} tokens"
            changes = advice(recipe, shape, rows, where, limit)
            settings = " or ".join(f"{c.setting} = {c.value}" for c in changes[:3]) or "a smaller model"
            return (
                f"This run may need {gib(found.peak)} of memory{longest}, but only {gib(limit)} is available. Try "
                f"{settings} (`posttrain plan` shows the breakdown)."
            )
    return ""


def _with_rank(recipe: Recipe) -> Recipe:
    """The recipe with the rank of the adapter that it trains further, which is what its memory depends on."""
    model = recipe.model
    if not model.continue_adapter:
        return recipe
    model = replace(model, continue_adapter=False, lora_rank=adapter_rank(model.path))
    return replace(cast(Any, recipe), model=model)


def gib(count: float) -> str:
    """Formats bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def machine_memory(cuda: bool) -> int:
    """Memory in bytes of this machine, its container, or its GPU."""
    if cuda and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        whole = min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole


def resident() -> int:
    """Resident bytes of this process now (all imports, no model); the planner's constant without /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return BASELINE
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))


def longest_rows(recipe: Recipe) -> Rows:
    """Rows of the maximum length that the settings allow."""
    if (most := recipe.facts().max_tokens) is None:
        return Rows(recipe.data.max_prompt_tokens, rollout_of(recipe).max_tokens)
    prompt = min(recipe.data.max_prompt_tokens, most // 2)
    return Rows(prompt, most - prompt)


def measured_rows(recipe: Recipe) -> tuple[Rows, str, str]:
    """Row lengths of the data if it and the tokenizer are local; else the maximum lengths and a note.

    The last value says why training would refuse the data or the chat template; empty if it would not.
    """
    worst = longest_rows(recipe)
    assumed = f"Assumes rows of the maximum length, {worst.longest} tokens"
    try:
        if not Path(base_of(recipe.model.path)).is_dir():
            return worst, f"{assumed} (the tokenizer is not on this machine).", ""
        tokenizer = load_tokenizer(base_of(recipe.model.path), recipe.model.path)
        return *_rows_of_data(recipe, tokenizer, worst), ""
    except PosttrainError as error:
        return worst, f"{assumed}, as the data cannot be read.", str(error)


def _rows_of_data(recipe: Recipe, tokenizer: Any, worst: Rows) -> tuple[Rows, str]:
    """Row lengths of the data, and a note on what is assumed."""
    chat, facts = ChatFormat(tokenizer, recipe.data.format, recipe.data.template_kwargs), recipe.facts()
    if facts.samples == "every step":
        sets = load_tasks(recipe.data, recipe.run.seed, None, needs_answer=False)
        own = isinstance(recipe, EnvRecipe) and recipe.env.name  # environments may write other prompts
        data = replace(recipe.data, overlong="drop") if own else recipe.data
        lengths = [n for _, n in fitting(sets.train, lambda task: task.messages, "training", chat, data, [])]
        rows = Rows(max(lengths), worst.answer, sum(lengths) / len(lengths), worst.answer)
        return rows, f"Assumes completions of {worst.answer} tokens (rollout.max_tokens); shorter ones need less."
    if facts.data == "conversations" and isinstance(recipe.algo, RowSettings):
        found = load_conversations(recipe.data, recipe.run.seed)
        return rows_of([row for s in found.sources for row in training_rows(s, chat, recipe.algo, [])]), ""
    if facts.data == "pairs" and facts.samples == "never" and isinstance(recipe, PairRecipe):
        policy = cast(Policy, SimpleNamespace(tokenizer=tokenizer))
        sets = load_pairs(Setup(recipe, policy, chat, Path("nowhere")))
        return rows_of(pair_rows(sets.train, chat, recipe.pairs.max_tokens)[0]), ""
    return worst, f"Assumes rows of the maximum length, {worst.longest} tokens (the run generates its training data)."


def rows_of(samples: Sequence[Sample]) -> Rows:
    """Longest and mean lengths of training rows."""
    lengths = [len(s.tokens) for s in samples]
    trained = [int(s.loss_mask.sum()) for s in samples]
    share, longest, mean = sum(trained) / sum(lengths), max(lengths), sum(lengths) / len(lengths)
    answer = max(1, round(longest * share))
    return Rows(longest - answer, answer, mean * (1 - share), mean * share)


# --- what to change ---------------------------------------------------------------------------------------------------


def advice(recipe: Recipe, shape: ModelShape, rows: Rows, where: Where, limit: int) -> list[Change]:
    """Suggests settings that reduce memory, least intrusive first, until the run fits with all of them.

    Each change reports what it saves alone; changes that save less than 1% of the peak are left out.
    """
    before, together, changes = plan_memory(recipe, shape, rows, where).peak, recipe, list[Change]()
    for setting, values, cost in ladder(recipe, rows):
        if plan_memory(together, shape, rows, where).peak <= limit:
            break
        best = None
        for value in values:
            with suppress(PosttrainError):
                alone, joined = (changed(r, setting, value) for r in (recipe, together))
                own = shortened(rows, setting, value)
                saves = before - plan_memory(alone, shape, own, where).peak
                best = (value, saves, joined, own)
                if plan_memory(joined, shape, own, where).peak <= limit:
                    break
        if best and best[1] > before / 100:
            value, saves, together, rows = best
            changes.append(Change(setting, str(value).lower() if isinstance(value, bool) else str(value), saves, cost))
    return changes


def ladder(recipe: Recipe, rows: Rows) -> list[tuple[str, list[Any], str]]:
    """(setting, values to try in order, cost), cheapest first."""
    unit = rows.longest * (2 if isinstance(recipe, PairRecipe) else 1)
    halves = [n for n in (recipe.train.micro_batch_tokens >> k for k in range(1, 12)) if n >= unit] or [unit]
    steps: list[tuple[str, list[Any], str]] = [("train.micro_batch_tokens", halves, "none: the gradient is the same")]
    rollout = rollout_of(recipe)
    if samples(recipe):
        slots = [n for n in (rollout.slots >> k for k in range(1, 8)) if n >= TILE]
        steps.append(("rollout.slots", slots, "slower sampling"))
    if not recipe.model.gradient_checkpointing:
        steps.append(("model.gradient_checkpointing", [True], "about a third more time in the training pass"))
    steps += [(saving.setting, [saving.value], saving.cost) for saving in recipe.facts().savings]
    if recipe.model.dtype == "float32":
        steps.append(("model.dtype", ["bfloat16"], "rounded weights; slower where the processor lacks bf16"))
    if not recipe.model.lora_rank:
        steps.append(("model.lora_rank", [16], "only adapters are trained"))
    if samples(recipe):
        steps.append(("rollout.max_tokens", [rollout.max_tokens // 2], "longer completions are truncated"))
    return steps


def changed(recipe: Recipe, setting: str, value: Any) -> Recipe:
    """A copy of the recipe with one setting changed. Raises ConfigError if it conflicts with other settings."""
    section, key = setting.split(".")
    changed_section = replace(getattr(recipe, section), **{key: value})
    return cast(Recipe, replace(cast(Any, recipe), **{section: changed_section}))


def shortened(rows: Rows, setting: str, value: Any) -> Rows:
    return replace(rows, answer=min(rows.answer, value)) if setting == "rollout.max_tokens" else rows


def not_known(recipe: Recipe, where: Where) -> list[str]:
    """Limitations of the estimate, as notes."""
    found: list[str] = []
    if where.gpus > 1:
        found.append("Sharding is calculated, not measured: runs here use one device.")
    elif where.cuda:
        found.append("GPU figures are calculated; the planner was validated on CPUs only.")
    if recipe.facts().teacher:
        found.append("Assumes that the teacher has the student's size.")
    if isinstance(recipe, config.Sampling) and ".py:" in recipe.reward.name:
        found.append("The memory and time of the reward function are unknown and not included.")
    if recipe.facts().samples == "every step":
        found.append("Evaluations (eval.*), checkpoints and the final export take additional time.")
    return found
