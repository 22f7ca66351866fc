"""Examples whose numbers were measured by a bundled recipe, or come from the memory planner."""

from __future__ import annotations

import json
from functools import cache

from posttrain.config.resolve import resolve
from posttrain.lab.course.source import PACKAGE
from posttrain.lab.course.working import Example, Worked, one
from posttrain.models.shapes import shape_of
from posttrain.planner.memory import Where, states
from posttrain.types import Json

SHARES = ("helpfulness", "safety", "reasoning")
METHODS = ("sft", "dpo", "ipo", "kto", "orpo", "simpo", "grpo", "ppo")
SIZE = "qwen2.5-7b"


@cache
def results(recipe: str) -> Json:
    """The contents of posttrain/config/recipes/results/RECIPE.json: {date, results}."""
    return json.loads((PACKAGE / "config" / "recipes" / "results" / f"{recipe}.json").read_text(encoding="utf-8"))


def card_row(found: dict[str, float], name: str, shown: str) -> tuple[str, ...]:
    """A model's metrics: three shares in per cent, and the mean length in tokens."""
    shares = [f"{100 * found[f'{name}.{figure}']:.1f} %" for figure in SHARES]
    return shown, *shares, one(found[f"{name}.length"], 1)


def stages() -> Worked:
    """The three-stage pipeline on the bundled model."""
    record = results("rlhf")
    rows = [
        card_row(record["results"], name, shown)
        for name, shown in (("base", "pretrained"), ("sft", "after SFT"), ("ppo", "after PPO"))
    ]
    return Worked(
        title="Three stages of a small model, measured",
        given="The recipe rlhf on abacus, this library's bundled model. Helpfulness: harmless requests fulfilled; "
        f"safety: harmful requests refused; reasoning: sums that are right. Recorded {record['date']}.",
        calls=("recipe rlhf",),
        head=("model", *SHARES, "tokens per answer"),
        rows=tuple(rows),
    )


def methods() -> Worked:
    """The methods of chapter 3 on the same preferences."""
    record = results("preference-methods")
    found = record["results"]
    rows = [
        (
            *card_row(found, name, name.upper().replace("SIMPO", "SimPO")),
            "–" if name == "sft" else one(found[f"{name}.kl"], 1),
        )
        for name in METHODS
    ]
    return Worked(
        title="Seven methods on the same preferences, measured",
        given="The recipe preference-methods: each method once, from the same SFT model, most for about the same "
        f"processor time. One seed and a toy model: an example, not a ranking. Recorded {record['date']}.",
        calls=("recipe preference-methods",),
        head=("method", *SHARES, "tokens per answer", "KL to SFT, nats"),
        rows=tuple(rows),
    )


def both_fall() -> Worked:
    """How four methods changed the log-probabilities of both answers of held-out pairs."""
    found = results("preference-methods")["results"]
    rows: list[tuple[str, ...]] = []
    for name in ("dpo", "ipo", "simpo", "orpo"):
        before, after = (
            [found[f"{name}.{when}.eval/{side}_logp"] for side in ("chosen", "rejected")]
            for when in ("before", "after")
        )
        shown = name.upper().replace("SIMPO", "SimPO")
        rows.append((shown, *(one(value, 2) for pair in zip(before, after, strict=True) for value in pair)))
    return Worked(
        title="What happens to the probability of both answers, measured",
        given="Mean log-probability of the better and the worse answer of held-out pairs, before and after training, "
        "in the same recipe. SimPO and ORPO measure it per token.",
        calls=("recipe preference-methods",),
        head=("method", "better, before", "better, after", "worse, before", "worse, after"),
        rows=tuple(rows),
    )


def probed() -> Worked:
    """What the reward model of the recipe rlhf rewards besides correctness."""
    found = results("rlhf")["results"]
    said = (
        ("length", "four sentences without new information are added", " SD"),
        ("format", "a heading, bullets and bold type around the same words", " SD"),
        ("position", "the answer comes first, not last", " SD"),
        ("sycophancy", "the user said to expect the wrong answer: how much more often it wins", ""),
    )
    rows = [
        (
            name,
            what,
            f"{found[f'probes.{name}']:+.2f}{unit}" if unit else f"{100 * found[f'probes.{name}']:+.0f} points",
        )
        for name, what, unit in said
    ]
    return Worked(
        title="A real reward model, probed",
        given="The reward model of the recipe rlhf. SD is the standard deviation of its scores over plain answers; 0 "
        "would be no bias.",
        calls=("evaluation.bias_probes.probe",),
        head=("probe", "what is changed", "change of the score"),
        rows=tuple(rows),
    )


def four_models() -> Worked:
    """Memory held throughout training, by method."""
    shape = shape_of(SIZE)
    rows: list[tuple[str, ...]] = []
    for name, algorithm, settings in (
        ("PPO", "ppo", {"algo": {"kl_coef": 0.05}, "reward": {"name": f"model:{SIZE}"}}),
        ("GRPO with a KL penalty", "grpo", {"algo": {"kl_coef": 0.04}}),
        ("GRPO without", "grpo", {"algo": {"kl_coef": 0.0}}),
        ("DPO", "dpo", {"data": {"tasks": "preferences.jsonl"}}),
    ):
        recipe = resolve(algorithm, {"model": {"path": SIZE, "dtype": "bfloat16"}, **settings})
        held = states(recipe, shape, Where(cuda=True))
        policy = sum(held.get(part, 0) for part in ("weights", "float32 masters", "optimizer"))
        others = [held.get(part, 0) for part in ("critic", "reference model", "reward model")]
        sizes = [policy, *others, policy + sum(others)]
        rows.append((name, *(f"{size / 2**30:.0f} GiB" if size else "–" for size in sizes)))
    return Worked(
        title="Models in memory, planned for seven billion weights",
        given=f"{SIZE}, {shape.parameters / 1e9:.2f} billion weights in bfloat16, all trained with AdamW and "
        "float32 master weights. Activations, gradients and the KV cache come on top.",
        calls=("planner.memory.states",),
        head=("method", "policy", "critic", "reference", "reward model", "total"),
        rows=tuple(rows),
        after="DPO’s reference runs once before training and only its log-probabilities are kept, so the model is not "
        "in memory; an implementation that keeps it holds two models.",
    )


EXAMPLES: dict[str, Example] = {
    "stages": stages,
    "methods": methods,
    "both-fall": both_fall,
    "probed": probed,
    "four-models": four_models,
}
