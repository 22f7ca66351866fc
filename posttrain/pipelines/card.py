"""The evaluation card: what a model can do, what it refuses, and how far it has moved, each with a 95 % interval.

Every figure is a mean over tasks with a bootstrap over tasks (posttrain.evaluation.accuracy), and a function of the model, the
reference and the settings alone. P tasks of all sets together, S answers each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from posttrain import api
from posttrain.config import DataConfig, EvalConfig, GRPORecipe, RewardConfig, RolloutConfig, RunConfig
from posttrain.config.sections import require_positive
from posttrain.evaluation.accuracy import Estimate, bootstrap
from posttrain.evaluation.labels import LABELS
from posttrain.models.load import Policy
from posttrain.rewards import language, shaping, skills, verifiers
from posttrain.rewards.functions import score_safely
from posttrain.rollout.build import make_collector, speak, world_tasks
from posttrain.rollout.collector import Verifier, check_failures, to_sample
from posttrain.store import durable
from posttrain.train import device as machine
from posttrain.train.forward import sample_logprobs
from posttrain.types import ConfigError, Episode, Task

CAPABILITIES = ("helpfulness", "safety", "over_refusal", "reasoning")
TOKENS_PER_PASS = 8192  # memory only
LEAST = 0.9  # of an answer's letters are in the card's language, or it does not keep to it


@dataclass(frozen=True)
class CardConfig:
    helpfulness: str = "instructions"
    """Tasks whose instructions should be followed, as data.tasks names them; empty leaves the capability out."""
    safety: str = "refuse"
    """Harmful requests, which should be declined; empty leaves them out."""
    over_refusal: str = "assist"
    """Harmless requests that sound like harmful ones and should not be declined; empty leaves them out."""
    reasoning: str = "arithmetic"
    """Problems that have a right answer; empty leaves them out."""
    problems: int = 256
    """Most held-out tasks of each set."""
    samples: int = 2
    """Answers to each task; how different they are is measured, so 2 or more."""
    temperature: float = 1.0
    """Sampling temperature; the KL is between the two models at this temperature."""
    max_tokens: int = 96
    """Longest answer, stop token included; longer ones are cut."""
    format: Literal["chat", "plain"] = "chat"
    """`chat` uses the tokenizer's chat template; `plain` feeds the text as it is."""
    language: str = "en"
    """Language that answers should keep to (ISO 639-1); empty leaves the figure out."""
    prompts: int = 12
    """Tasks, the first of each set in equal number, of which an answer is kept as text."""
    slots: int = 128
    """Sequences decoded at once."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"
    """`auto` (cuda when present, else cpu), `cpu`, or a cuda device."""
    seed: int = 0
    """Which answers are drawn is a function of this number; the tasks of built-in sets are always the same."""

    def __post_init__(self) -> None:
        require_positive(self, "problems", "max_tokens", "slots")
        if not self.sets:
            raise ConfigError(f"the card examines nothing: name tasks for one of {', '.join(CAPABILITIES)}.")
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} shows no diversity; a card needs 2 or more answers to a task.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature={self.temperature} leaves no KL to measure; set it above 0, usually 1.")
        if self.prompts < 0:
            raise ConfigError(f"prompts={self.prompts} is negative; 0 keeps no answers.")
        if self.language and self.language not in language.LANGUAGES:
            known = ", ".join(sorted(language.LANGUAGES))
            raise ConfigError(f"language={self.language!r} cannot be told from others; use one of {known}, or ''.")

    @property
    def sets(self) -> dict[str, str]:
        """capability → its tasks, of those that are examined."""
        return {name: tasks for name in CAPABILITIES if (tasks := getattr(self, name))}


@dataclass(frozen=True)
class Asked:
    """One task of a capability's set, and the model's S answers."""

    capability: str
    task: Task
    answers: Sequence[Episode]


def examine(model: str, reference: str, cfg: CardConfig, folder: Path) -> dict[str, Any]:
    """The card of a model (a folder, run, hub id or `abacus`), written to `folder` as card.json.

    Each figure is {"value", "low", "high", "n"}, n in tasks; `kl` is from `reference`. answers.jsonl has the kept
    answers and is written first, so that card.json says both are whole. Raises ConfigError where the two models'
    vocabularies differ, and RolloutError where more than 1 % of the answers could not be scored.
    """
    machine.set_threads(cfg.threads)
    device = machine.device(cfg.device)
    policy = api.open_policy(model, device=device)
    asked, verify = ask(policy, cfg)
    check_failures([one.answers for one in asked], RewardConfig().max_failure_rate)
    whole = [one for one in asked if all(e.reward is not None for e in one.answers)]
    own = logprobs(policy, whole, cfg)
    vocabulary = policy.tokenizer.get_vocab()
    del policy  # one model in memory at a time
    kl = divergence(own, logprobs(_reference(reference, model, vocabulary, device), whole, cfg))
    figures = {**measures(whole, cfg), "kl": _amount(kl)}
    card: dict[str, Any] = {name: asdict(figures[name]) for name in LABELS if name in figures and figures[name].n}
    card |= {"tasks": cfg.sets, "reference": reference}
    card |= {name: getattr(cfg, name) for name in ("samples", "temperature", "max_tokens", "seed")}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in kept_answers(asked, verify, cfg)]
    durable.publish_file(folder / "answers.jsonl", "".join(line + "\n" for line in lines))
    durable.publish_file(folder / "card.json", json.dumps(card, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return card


def ask(policy: Policy, cfg: CardConfig) -> tuple[list[Asked], Verifier]:
    """`samples` judged answers of a model to every task, set after set, and what judged them.

    Of a built-in set the held-out tasks are asked, of a file all: the first `problems`.
    """
    chat = speak(policy, cfg.format)
    recipe = GRPORecipe(
        data=DataConfig(tasks="addition", count=cfg.problems, format=cfg.format),  # trained on by nobody
        rollout=RolloutConfig(slots=cfg.slots, max_tokens=cfg.max_tokens, temperature=cfg.temperature),
        eval=EvalConfig(problems=cfg.problems),
        run=RunConfig(seed=cfg.seed),
    )
    judged = {
        capability: world_tasks(replace(recipe, data=replace(recipe.data, eval_tasks=tasks)), chat)
        for capability, tasks in cfg.sets.items()
    }
    wanted = [(capability, task) for capability, (sets, _, _) in judged.items() for task in sets.test]
    _, verify, _ = next(iter(judged.values()))  # all alike: with `reward.name = "auto"` each task has its own
    collector = make_collector(policy, chat, verify, recipe)
    groups = collector.groups([task for _, task in wanted], cfg.samples, 0, "card")
    return [Asked(*one, answers) for one, answers in zip(wanted, groups, strict=True)], verify


def measures(asked: Sequence[Asked], cfg: CardConfig) -> dict[str, Estimate]:
    """Every figure but the KL, of answers that were all scored."""

    def share(of: Callable[[Episode], float], *capabilities: str) -> Estimate:
        return bootstrap(_per_task(of, [one for one in asked if one.capability in (capabilities or CAPABILITIES)]))

    found = {name: share(lambda e: e.passed, name) for name in cfg.sets if name != "over_refusal"}
    if cfg.over_refusal:
        found["over_refusal"] = share(lambda e: skills.declines(skills.final_answer(e.text)), "over_refusal")
        found["assist"] = share(lambda e: e.passed, "over_refusal")
    if tasks := [one.task for one in asked if one.capability == "reasoning"]:
        task = tasks[0]  # any will do: the form is judged alone
        found["format"] = share(lambda e: verifiers.format(task, e.text).passed, "reasoning")
        found["think"] = share(lambda e: skills.thinks(e.text), "reasoning")
    if cfg.language:
        found["language"] = share(lambda e: keeps_to(cfg.language, e.text))
    found["length"] = _amount(_per_task(lambda e: e.length, asked))
    found["truncated"] = share(lambda e: e.stop == "length")
    found["repetition"] = share(lambda e: shaping.repeated_share(e.text, 3))
    texts = [[e.text for e in one.answers] for one in asked]
    found["unique"] = bootstrap([len(set(own)) / len(own) for own in texts])
    return found | {f"distinct_{n}": bootstrap([distinct(own, n) for own in texts]) for n in (1, 2, 3)}


def distinct(answers: Sequence[str], n: int) -> float:
    """How different the answers to one task are: their distinct n-grams, over those of each answer added up.

    1/S where all S answers have the same n-grams, 1 where no two share one, whatever their lengths. The distinct-n of
    Li et al. (arXiv 1510.03055) divides by all n-grams, and so falls as answers grow longer, because a long text
    repeats itself; here an answer counts an n-gram once, and what it repeats is `repetition`. Words and signs count
    alike; an answer of fewer than n words is one n-gram, so that none is left out.
    """
    own = [set(shaping.n_grams(text, n)) or {(text.casefold(),)} for text in answers]
    return len(set().union(*own)) / sum(map(len, own))


def keeps_to(code: str, text: str) -> bool:
    """Whether an answer is in a language, thoughts included; one without any letter is."""
    share = language.share_in(code, text)
    return share is None or share >= LEAST


def logprobs(policy: Policy, asked: Sequence[Asked], cfg: CardConfig) -> list[list[np.ndarray]]:
    """For each task and answer the log-probabilities [L] of its tokens under a policy, 0 on the prompt."""
    rows = [to_sample(e, 0.0) for one in asked for e in one.answers]
    values = iter(sample_logprobs(policy, rows, TOKENS_PER_PASS, cfg.temperature))
    return [[next(values) for _ in one.answers] for one in asked]


def divergence(own: Sequence[Sequence[np.ndarray]], reference: Sequence[Sequence[np.ndarray]]) -> list[float]:
    """For each task the mean over its answers of `log π(answer) − log π_ref(answer)`, in nats per answer.

    Over answers that π wrote this is an unbiased estimate of KL(π ‖ π_ref) between distributions over whole answers,
    the estimator called k1; single values may be negative.
    """
    return [
        float(np.mean([(a.astype(float) - b.astype(float)).sum() for a, b in zip(mine, theirs, strict=True)]))
        for mine, theirs in zip(own, reference, strict=True)
    ]


def kept_answers(asked: Sequence[Asked], verify: Verifier, cfg: CardConfig) -> list[dict[str, Any]]:
    """The first answer to each of `prompts` tasks: the first of every set, the same ones in every card."""
    names = list(cfg.sets)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        count = len(range(i, cfg.prompts, len(names)))  # dealt in turn
        for one in [one for one in asked if one.capability == name][:count]:
            answer = one.answers[0]
            verdict, error = score_safely(verify, one.task, answer.text)  # an episode does not keep the detail
            rows.append(
                {
                    "capability": name,
                    "prompt": one.task.prompt,
                    "answer": answer.text,
                    "passed": answer.passed,
                    "detail": verdict.detail if verdict else str(error),
                    "tokens": answer.length,
                }
            )
    return rows


def rows(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value with its interval) of each figure that a card has, in a fixed order, for tables."""
    found: list[tuple[str, str]] = []
    for name, (label, is_share) in LABELS.items():
        if name in card:
            e = Estimate(**card[name])
            found.append((label, str(e) if is_share else f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"))
    return found


def _reference(name: str, model: str, vocabulary: Mapping[str, int], device: torch.device) -> Policy:
    reference = api.open_policy(name, device=device)
    if reference.tokenizer.get_vocab() != vocabulary:
        raise ConfigError(
            f"the reference {name!r} has another vocabulary than {model!r}, so there is no KL between them. "
            "Use a reference of the same model family."
        )
    return reference


def _per_task(of: Callable[[Episode], float], asked: Sequence[Asked]) -> list[float]:
    return [float(np.mean([of(e) for e in one.answers])) for one in asked]


def _amount(values: Sequence[float]) -> Estimate:
    """`bootstrap` for what is no share: there 0 and 1 are values like others, and equal values have no spread."""
    if len(set(values)) == 1:
        return Estimate(values[0], values[0], values[0], len(values))
    return bootstrap(values)
