"""Memory and time of a run before it starts: the planner's arithmetic, with what has to be measured or read added.

Rows are measured on the data where it and the tokenizer are here, speeds by posttrain/planner/speed.py. Nothing of the run
itself is touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from posttrain import config
from posttrain.algos.sft import training_rows
from posttrain.data.chat import ChatFormat
from posttrain.data.conversations import load_conversations
from posttrain.data.tasks.load import load_tasks
from posttrain.models.kernels.build import library
from posttrain.models.load import Policy, resolve_path
from posttrain.models.shapes import ModelShape, shape_of
from posttrain.planner import memory as planner
from posttrain.planner.memory import Memory, Rows, Where
from posttrain.planner.speed import ROLLOUT, step_seconds
from posttrain.rollout.build import Setup
from posttrain.rollout.sample_pairs import load_pairs, pair_rows
from posttrain.train import device as machine
from posttrain.types import ConfigError, PosttrainError, Sample


@dataclass(frozen=True)
class Change:
    """A setting that needs less memory, and how many bytes of the peak it alone saves."""

    setting: str
    value: str
    saves: int
    cost: str


@dataclass(frozen=True)
class Plan:
    """What a run will take. `seconds` is by part of one step and empty where speeds were not measured."""

    algorithm: str
    shape: ModelShape
    rows: Rows
    memory: Memory
    limit: int
    changes: list[Change]
    seconds: dict[str, float]
    steps: int
    unknown: list[str]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; bytes and seconds."""
        step = sum(self.seconds.values()) if self.seconds else None
        return {
            "algorithm": self.algorithm,
            "parameters": self.shape.parameters,
            "rows": vars(self.rows),
            "held": dict(self.memory.held),
            "phases": {name: dict(parts) for name, parts in self.memory.phases.items()},
            "peak": self.memory.peak,
            "peak_phase": self.memory.peak_phase,
            "memory": self.limit,
            "fits": self.fits,
            "changes": [vars(change) for change in self.changes],
            "seconds": self.seconds,
            "seconds_step": step,
            "seconds_run": step * self.steps if step is not None and self.steps else None,
            "steps": self.steps,
            "unknown": self.unknown,
        }


def plan(
    recipe: Any, memory: float | None = None, gpus: int = 1, device: str = "auto", probe: bool = True, rows: Any = None
) -> Plan:
    """Memory and time of a resolved recipe, or of the recipe in a TOML file.

    `memory` is GiB of each device (None: this machine's); `gpus` shards weights, gradients and optimizer; `probe` times
    a small model, where the device is here; `rows` are a `planner.Rows` instead of the data's own. Raises ConfigError
    for numbers that no machine has and a model whose shape is not known.
    """
    if memory is not None and memory <= 0:
        raise ConfigError(f"memory={memory:g} GiB leaves no room for anything. Give the GiB of one device, such as 24.")
    if gpus < 1:
        raise ConfigError(f"gpus={gpus}, but a run needs a device. Give 1 or more.")
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise ConfigError(f"device={device!r} is not known. Give auto, cpu or cuda.")
    if isinstance(recipe, str | Path):
        algorithm, sections, _ = config.read_toml(recipe)
        recipe = config.resolve(algorithm, sections)
    algorithm = next(name for name, cls in config.RECIPES.items() if type(recipe) is cls)
    shape = shape_of(resolve_path(recipe.model.path))
    cuda = device.startswith("cuda") or gpus > 1 or (device == "auto" and torch.cuda.is_available())
    unknown: list[str] = []
    if rows is None:
        rows, note = measured_rows(algorithm, recipe)
        unknown += [note] if note else []
    where = Where(gpus, cuda, library() is not None, resident() if not cuda else 1 << 30)
    found = planner.memory(algorithm, recipe, shape, rows, where)
    limit = machine_memory(cuda) if memory is None else round(memory * 2**30)
    changes = [] if found.peak <= limit else advice(algorithm, recipe, shape, rows, where, limit)
    seconds: dict[str, float] = {}
    if cuda and not torch.cuda.is_available() or gpus > 1:
        unknown.append("Time: the device is not here, so nothing could be timed.")
    elif probe:
        seconds = step_seconds(algorithm, recipe, shape, rows, "cuda" if cuda else "cpu")
    unknown += not_known(algorithm, recipe, where)
    return Plan(algorithm, shape, rows, found, limit, changes, seconds, recipe.train.steps, unknown)


def warning(algorithm: str, recipe: Any) -> str:
    """One sentence where a run may not fit in this machine's memory, else nothing. Arithmetic only, no probe.

    Rows as long as the settings allow come first, because they cost nothing to look at; only where those do not fit is
    the data read, and nothing said if its own rows do. A shape that is not known says nothing.
    """
    with suppress(PosttrainError):
        shape, rows = shape_of(resolve_path(recipe.model.path)), longest_rows(algorithm, recipe)
        where = Where(1, machine.device(recipe.train.device).type == "cuda", library() is not None)
        found, limit = planner.memory(algorithm, recipe, shape, rows, where), machine_memory(where.cuda)
        if found.peak > limit:
            rows = measured_rows(algorithm, recipe)[0]
            found = planner.memory(algorithm, recipe, shape, rows, where)
        if found.peak > limit:
            longest = f" with rows of {rows.longest:,} tokens"
            changes = advice(algorithm, recipe, shape, rows, where, limit)
            settings = " or ".join(f"{c.setting} = {c.value}" for c in changes[:3]) or "a smaller model"
            return (
                f"This run may need {gib(found.peak)} of memory{longest} and {gib(limit)} are here; try {settings} "
                "(`posttrain plan` has the parts)."
            )
    return ""


def gib(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def machine_memory(cuda: bool) -> int:
    """Bytes this machine, its container or its GPU has."""
    if cuda and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        whole = min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return whole


def resident() -> int:
    """Bytes resident in this process now, with all imports and no model; the planner's figure where /proc is not."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return planner.BASELINE
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS"))


def longest_rows(algorithm: str, recipe: Any) -> Rows:
    """Rows as long as the settings allow."""
    if hasattr(recipe, "pairs"):
        most = recipe.pairs.max_tokens
    elif algorithm in ("sft", "prm"):
        most = recipe.algo.max_tokens
    else:
        return Rows(recipe.data.max_prompt_tokens, recipe.rollout.max_tokens)
    prompt = min(recipe.data.max_prompt_tokens, most // 2)
    return Rows(prompt, most - prompt)


def measured_rows(algorithm: str, recipe: Any) -> tuple[Rows, str]:
    """Rows of the data itself where it and the tokenizer are here, else as long as the settings allow and a note."""
    worst = longest_rows(algorithm, recipe)
    try:
        if not Path(resolve_path(recipe.model.path)).is_dir():
            raise OSError("the tokenizer is not on this machine")
        tokenizer = AutoTokenizer.from_pretrained(resolve_path(recipe.model.path))
        chat = ChatFormat(tokenizer, recipe.data.format)
        if algorithm in ROLLOUT:
            sets = load_tasks(recipe.data, recipe.run.seed, None, needs_answer=False)
            lengths = [len(chat.prompt_tokens(task.messages)) for task in sets.train]
            lengths = [n for n in lengths if n <= recipe.data.max_prompt_tokens] or [worst.prompt]
            rows = Rows(max(lengths), worst.answer, sum(lengths) / len(lengths), worst.answer)
            return (
                rows,
                f"Answers are taken to be {worst.answer} tokens long (rollout.max_tokens); shorter ones need less.",
            )
        if algorithm == "sft":
            found = load_conversations(recipe.data, recipe.run.seed)
            samples = [row for s in found.sources for row in training_rows(s, chat, recipe.algo, [])]
        elif algorithm in ("dpo", "reward") and not planner.samples(algorithm, recipe):
            policy = cast(Policy, SimpleNamespace(tokenizer=tokenizer))
            sets = load_pairs(Setup(recipe, policy, chat, Path("nowhere")))
            samples = pair_rows(sets.train, chat, recipe.pairs.max_tokens)[0]
        else:
            raise OSError("what it learns from is made by the run")
    except (PosttrainError, OSError, ValueError) as error:
        return worst, f"Rows are taken to be as long as the settings allow, {worst.longest} tokens ({error})."
    return rows_of(samples), ""


def rows_of(samples: Sequence[Sample]) -> Rows:
    """Longest and mean lengths of training rows."""
    lengths = [len(s.tokens) for s in samples]
    trained = [int(s.loss_mask.sum()) for s in samples]
    share, longest, mean = sum(trained) / sum(lengths), max(lengths), sum(lengths) / len(lengths)
    answer = max(1, round(longest * share))
    return Rows(longest - answer, answer, mean * (1 - share), mean * share)


# --- what to change ---------------------------------------------------------------------------------------------------


def advice(algorithm: str, recipe: Any, shape: ModelShape, rows: Rows, where: Where, limit: int) -> list[Change]:
    """Settings that need less memory, those that change least about the run first, until together they are enough.

    Each is credited with what it saves alone, and left out where that is below a hundredth of the peak.
    """
    before, together, changes = planner.memory(algorithm, recipe, shape, rows, where).peak, recipe, list[Change]()
    for setting, values, cost in ladder(algorithm, recipe, rows):
        if planner.memory(algorithm, together, shape, rows, where).peak <= limit:
            break
        best = None
        for value in values:
            with suppress(PosttrainError):
                alone, joined = (changed(r, setting, value) for r in (recipe, together))
                own, all_ = (shortened(rows, setting, value), planner.memory)
                saves = before - all_(algorithm, alone, shape, own, where).peak
                best = (value, saves, joined, own)
                if all_(algorithm, joined, shape, own, where).peak <= limit:
                    break
        if best and best[1] > before / 100:
            value, saves, together, rows = best
            changes.append(Change(setting, str(value).lower() if isinstance(value, bool) else str(value), saves, cost))
    return changes


def ladder(algorithm: str, recipe: Any, rows: Rows) -> list[tuple[str, list[Any], str]]:
    """(setting, values to try in turn, what it costs), cheapest first."""
    cfg, unit = recipe.algo, rows.longest * (2 if hasattr(recipe, "pairs") else 1)
    halves = [n for n in (recipe.train.tokens_per_pass >> k for k in range(1, 12)) if n >= unit] or [unit]
    steps: list[tuple[str, list[Any], str]] = [("train.tokens_per_pass", halves, "nothing: the gradient is the same")]
    if planner.samples(algorithm, recipe):
        slots = [n for n in (recipe.rollout.slots >> k for k in range(1, 8)) if n >= planner.TILE]
        steps.append(("rollout.slots", slots, "slower sampling"))
    if not recipe.model.gradient_checkpointing:
        steps.append(("model.gradient_checkpointing", [True], "about a third more time in the training pass"))
    if algorithm == "grpo" and cfg.overlap:
        steps.append(("algo.overlap", [False], "sampling no longer runs beside learning"))
    if algorithm == "ppo" and cfg.critic == "separate":
        steps.append(("algo.critic", ["shared"], "the critic's loss also moves the policy"))
    if recipe.model.dtype == "float32":
        steps.append(("model.dtype", ["bfloat16"], "rounded weights; slower where the processor lacks bf16"))
    if not recipe.model.lora_rank:
        steps.append(("model.lora_rank", [16], "only adapters learn"))
    if hasattr(recipe, "rollout") and planner.samples(algorithm, recipe):
        steps.append(("rollout.max_tokens", [recipe.rollout.max_tokens // 2], "longer answers are cut"))
    return steps


def changed(recipe: Any, setting: str, value: Any) -> Any:
    """The recipe with one setting changed. Raises ConfigError where that does not go with the others."""
    section, key = setting.split(".")
    return replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})


def shortened(rows: Rows, setting: str, value: Any) -> Rows:
    return replace(rows, answer=min(rows.answer, value)) if setting == "rollout.max_tokens" else rows


def not_known(algorithm: str, recipe: Any, where: Where) -> list[str]:
    """What the numbers leave out."""
    found: list[str] = []
    if where.gpus > 1:
        found.append("Sharding is arithmetic: runs here use one device, and no sharded run was measured.")
    elif where.cuda:
        found.append("GPU figures are arithmetic; they were held against measurements on a CPU only.")
    if algorithm == "distill":
        found.append("The teacher is taken to have the student's size.")
    if ".py:" in getattr(getattr(recipe, "reward", None), "name", ""):
        found.append("What the reward function itself holds and how long it takes is not known.")
    if algorithm in ROLLOUT:
        found.append(
            "Examinations (eval.*), checkpoints and the final export take more time than the steps named here."
        )
    return found


# --- what a person sees --------------------------------------------------------------------------------------------


def show_plan(out: Console, found: Plan) -> None:
    """The parts of the peak, whether it fits, what to change, and the time of a step."""
    most = found.memory.peak
    title = f"{found.algorithm}, {found.shape.parameters / 1e6:,.0f}M weights"
    table = Table(title=title, title_justify="left")
    table.add_column("memory")
    for name in ("size", "share"):
        table.add_column(name, justify="right")
    for name, count in {**found.memory.held, **found.memory.phases[found.memory.peak_phase]}.items():
        if count >= 1 << 20:
            table.add_row(name, gib(count), f"{count / most:.0%}")
    table.add_section()
    table.add_row(f"peak, in the {found.memory.peak_phase}", gib(most), "100%")
    for name in found.memory.phases:
        if name != found.memory.peak_phase:
            table.add_row(f"peak while {name}", gib(found.memory.of(name)), f"{found.memory.of(name) / most:.0%}")
    out.print(table)
    verdict = "fits" if found.fits else "does NOT fit"
    style = "green" if found.fits else "red"
    out.print(Text(f"{verdict} in {gib(found.limit)} of memory", style=style))
    if found.changes:
        changes = Table(title="what to change, cheapest first", title_justify="left")
        for name in ("setting", "alone saves", "costs"):
            changes.add_column(name, overflow="fold")
        for change in found.changes:
            changes.add_row(f"--{change.setting} {change.value}", gib(change.saves), change.cost)
        out.print(changes)
    elif not found.fits:
        out.print("No setting makes it fit: take a smaller model, a larger machine, or more devices.")
    if found.seconds:
        times = Table(title="time of a step, from speeds measured just now", title_justify="left")
        times.add_column("part")
        times.add_column("seconds", justify="right")
        for name, seconds in found.seconds.items():
            times.add_row(name, f"{seconds:.2f}")
        times.add_section()
        step = sum(found.seconds.values())
        times.add_row("step", f"{step:.2f}")
        if found.steps:
            times.add_row(f"{found.steps} steps", f"{step * found.steps:,.0f}")
        out.print(times)
    for text in found.unknown:
        out.print(Text(f"not known: {text}", style="yellow"), soft_wrap=True)
