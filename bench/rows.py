"""The workloads that are compared, and the target for each."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench.models import SHAPES, model_folder, texts

Settings = Mapping[str, Any]
SMALL: Settings = {"model.dtype": "float32", "train.micro_batch_tokens": 2048}
LARGE: Settings = {"model.dtype": "float32", "train.micro_batch_tokens": 8192}  # our default
FP32: tuple[Settings, ...] = (SMALL, LARGE)
MIXED: Settings = {**SMALL, "rollout.dtype": "bfloat16", "algo.is_cap": 2.0}  # corrects the sampler's rounding
OURS: tuple[Settings, ...] = (*FP32, MIXED, {"model.dtype": "bfloat16", "train.micro_batch_tokens": 2048})
WHOLE: Settings = {"dtype": "float32"}  # all rows in one pass
PASSES: Settings = {"dtype": "float32", "rows_per_pass": 8}  # TRL's default number of rows
PACKED: Settings = {"dtype": "float32", "packing": 512, "rows_per_pass": 1}
PEER: tuple[Settings, ...] = (
    PASSES,
    WHOLE,
    {"dtype": "bfloat16", "rows_per_pass": 8},
    {"dtype": "float32", "rows_per_pass": 8, "continuous": True},
)
LR = 1e-5


@dataclass(frozen=True)
class Bar:
    """A row's target: a minimum speedup or a maximum memory ratio."""

    of: Literal["time", "memory"]
    limit: float

    def met(self, ratio: float) -> bool:
        """Whether a ratio meets the target: the peer's time over ours, or our memory over the peer's."""
        return ratio >= self.limit if self.of == "time" else ratio <= self.limit

    def __str__(self) -> str:
        return f"≥ {self.limit:g}×" if self.of == "time" else f"≤ {self.limit:g}×"


@dataclass(frozen=True)
class Row:
    """A comparison: the work, each side's candidate settings (the fastest is used), and the targets."""

    name: str
    bars: tuple[Bar, ...]
    model: str  # a name in SHAPES
    work: Mapping[str, Any]
    ours: Sequence[Settings] = FP32
    peer: Sequence[Settings] = (PASSES, WHOLE)
    rounds: int = 4

    def job(self, folder: Path) -> dict[str, Any]:
        """The job that both sides read, with texts and tokens generated for the model in `folder`."""
        work = dict(self.work)
        job: dict[str, Any] = {"kind": work["kind"], "folder": str(folder), "lr": LR}
        if work["kind"] in ("grpo", "generate"):
            return job | {
                "prompts": texts(folder, work["prompts"]),
                "group": work["group"],
                "lengths": list(work["lengths"]),
            }
        make = chats if work["kind"] == "sft" else pairs
        return job | make(SHAPES[self.model].vocab, work["count"])


def quarter(row: Row) -> Row:
    """The same row with a quarter of the work: every fourth length by size, so that the longest one is kept."""
    work = dict(row.work)
    if "count" in work:
        return replace(row, work=work | {"count": max(2, work["count"] // 4)})
    prompts = work["prompts"][: max(1, len(work["prompts"]) // 4)]
    count = len(prompts) * work["group"]
    step = len(work["lengths"]) // count
    lengths = sorted(work["lengths"])[step - 1 :: step]
    random.Random(0).shuffle(lengths)
    return replace(row, work=work | {"prompts": prompts, "lengths": lengths})


def long_tailed(count: int, shortest: int, longest: int, mean: float, seed: int = 0) -> list[int]:
    """Exponentially distributed lengths, shifted to `shortest` and capped at `longest`, which occurs at least once."""
    draw = random.Random(seed)
    lengths = [min(longest, shortest + round(draw.expovariate(1 / (mean - shortest)))) for _ in range(count)]
    lengths[draw.randrange(count)] = longest
    return lengths


def chats(vocab: int, count: int) -> dict[str, Any]:
    """Tokenized two-turn chats. The first third of each turn is the user's; the assistant's tokens are trained."""
    draw = random.Random(1)
    rows: list[dict[str, Any]] = []
    for length in long_tailed(count, 16, 512, 120, seed=1):
        half, asked = length // 2, max(1, length // 6)
        trained = [t % half >= asked for t in range(length)]
        rows.append({"ids": [draw.randrange(3, vocab) for _ in range(length)], "trained": trained})
    return {"rows": rows}


def pairs(vocab: int, count: int) -> dict[str, Any]:
    """Prompts of 256 to 384 tokens with two completions of 16 to 64 tokens, stop token included."""
    draw = random.Random(2)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(count)]

    made: list[dict[str, list[int]]] = []
    for _ in range(count):
        prompt = tokens(draw.randint(256, 384))
        answers = {side: [*tokens(draw.randint(15, 63)), 2] for side in ("chosen", "rejected")}
        made.append({"prompt": prompt, **answers})
    return {"pairs": made}


def short_prompts(count: int) -> list[int]:
    draw = random.Random(3)
    return [draw.randint(12, 18) for _ in range(count)]


FIXED = {"kind": "grpo", "prompts": short_prompts(8), "group": 8, "lengths": [64] * 64}
RAGGED_LENGTHS = long_tailed(64, 8, 512, 90)
RAGGED = {"kind": "grpo", "prompts": short_prompts(8), "group": 8, "lengths": RAGGED_LENGTHS}
LONG_PROMPT = {"kind": "grpo", "prompts": [512] * 4, "group": 16, "lengths": [32] * 64}
MANY_WORDS = {"kind": "grpo", "prompts": short_prompts(4), "group": 8, "lengths": [64] * 32}
CHATS = {"kind": "sft", "count": 64}
GENERATE = {"kind": "generate", "prompts": short_prompts(8), "group": 8, "lengths": RAGGED_LENGTHS}
SMOLLM2 = {"kind": "grpo", "prompts": [100] * 4, "group": 8, "lengths": long_tailed(32, 16, 128, 56)}

ROWS = (
    Row("GRPO step, fixed length, fp32 against fp32", (Bar("time", 1.5),), "5M", FIXED),
    Row("GRPO step, fixed length, best against best", (Bar("time", 2.5),), "5M", FIXED, OURS, PEER),
    Row("GRPO step, ragged lengths", (Bar("time", 5.0),), "5M", RAGGED, rounds=2),
    Row("GRPO step, long shared prompt", (Bar("time", 6.0),), "5M", LONG_PROMPT, rounds=2),
    Row("GRPO step, 150k vocabulary, one pass", (Bar("memory", 0.4),), "150k words", MANY_WORDS, (LARGE,), (WHOLE,), 2),
    Row(
        "GRPO step, 150k vocabulary, TRL in passes",
        (Bar("memory", 0.4),),
        "150k words",
        MANY_WORDS,
        (SMALL,),
        (PASSES,),
        1,
    ),
    Row("generation, ragged, against model.generate", (Bar("time", 4.0),), "5M", GENERATE, (SMALL,), (WHOLE,)),
    Row(
        "generation, ragged, against continuous batching",
        (Bar("time", 1.5),),
        "5M",
        GENERATE,
        (SMALL,),
        ({"dtype": "float32", "continuous": True},),
    ),
    Row("SFT on ragged chats", (Bar("time", 2.0), Bar("memory", 0.6)), "5M", CHATS, peer=(PACKED, PASSES, WHOLE)),
    Row("SFT on ragged chats, TRL without packing", (Bar("time", 2.0), Bar("memory", 0.6)), "5M", CHATS, rounds=2),
    Row("DPO, shared prompts", (Bar("time", 2.0), Bar("memory", 0.6)), "5M", {"kind": "dpo", "count": 16}),
    Row("GRPO step, SmolLM2-135M", (Bar("time", 2.5),), "SmolLM2-135M", SMOLLM2, (SMALL,), (PASSES,), 2),
)


def folder_of(row: Row, root: Path, given: Mapping[str, Path]) -> Path:
    """The model's folder: the one given for this shape, or random weights."""
    return given.get(row.model) or model_folder(SHAPES[row.model], root)
