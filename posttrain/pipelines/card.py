"""The evaluation card: a model's capabilities, refusals and KL from a reference model, each with a 95 % interval.

Every metric is a mean over tasks with a bootstrap interval (posttrain.evaluation.accuracy) and depends only on the
model, the reference model and the settings. P tasks over all sets, S completions each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch

from posttrain import api
from posttrain.config import DataConfig, EvalConfig, GRPORecipe, RewardConfig, RolloutConfig, RunConfig
from posttrain.config.sections import require_positive
from posttrain.evaluation.accuracy import Estimate, bootstrap
from posttrain.evaluation.labels import LABELS
from posttrain.models.load import Policy, chat_format_of, stops_of
from posttrain.rewards import language, shaping, skills, verifiers
from posttrain.rewards.scoring import score_safely
from posttrain.rollout.build import make_collector
from posttrain.rollout.collector import Verifier, check_failures, to_sample
from posttrain.rollout.tasks import env_tasks
from posttrain.store import durable
from posttrain.train.device import resolve, set_threads
from posttrain.train.forward import sample_logprobs
from posttrain.types import ConfigError, Episode, Json, JsonView, Task

CAPABILITIES = ("helpfulness", "safety", "over_refusal", "reasoning")
TOKENS_PER_PASS = 8192  # memory only
LEAST = 0.9  # share of a completion's letters that must be in the card's language


@dataclass(frozen=True)
class CardConfig:
    helpfulness: str = "instructions"
    """Tasks whose instructions should be followed, as in data.tasks; empty leaves the capability out."""
    safety: str = "refuse"
    """Harmful requests, which should be declined; empty leaves them out."""
    over_refusal: str = "assist"
    """Harmless requests that sound harmful and should not be declined; empty leaves them out."""
    reasoning: str = "arithmetic"
    """Problems with a right answer; empty leaves them out."""
    problems: int = 256
    """Maximum held-out tasks per set."""
    samples: int = 2
    """Completions per task; 2 or more, because their diversity is measured."""
    temperature: float = 1.0
    """Sampling temperature; the KL is also measured at this temperature."""
    max_tokens: int = 96
    """Maximum tokens per completion, stop token included; longer ones are truncated."""
    format: Literal["chat", "plain"] = "chat"
    """`chat` uses the tokenizer's chat template; `plain` feeds the text as it is."""
    language: str = "en"
    """Language that completions should be in (ISO 639-1); empty leaves the metric out."""
    prompts: int = 12
    """Number of tasks, spread evenly over the sets, for which a completion is kept as text."""
    slots: int = 128
    """Sequences decoded at once."""
    threads: int = 0
    """CPU threads; 0 uses torch's default."""
    device: str = "auto"
    """`auto` (cuda when present, else cpu), `cpu`, or a cuda device."""
    seed: int = 0
    """Seed for sampling; the tasks of built-in sets are always the same."""

    def __post_init__(self) -> None:
        require_positive(self, "problems", "max_tokens", "slots")
        if not self.sets:
            raise ConfigError(f"the card evaluates nothing: name tasks for at least one of {', '.join(CAPABILITIES)}.")
        if self.samples < 2:
            raise ConfigError(f"samples={self.samples} cannot show diversity; a card needs 2 or more per task.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature={self.temperature} leaves no KL to measure; set it above 0, usually to 1.")
        if self.prompts < 0:
            raise ConfigError(f"prompts={self.prompts} is negative; 0 keeps no completions.")
        if self.language and self.language not in language.LANGUAGES:
            known = ", ".join(sorted(language.LANGUAGES))
            raise ConfigError(f"language={self.language!r} is not supported; use one of {known}, or ''.")

    @property
    def sets(self) -> dict[str, str]:
        """Capability → its tasks, for the capabilities that are evaluated."""
        return {name: tasks for name in CAPABILITIES if (tasks := getattr(self, name))}


@dataclass(frozen=True)
class AnsweredTask:
    """One task of a capability's set, and the model's S completions."""

    capability: str
    task: Task
    answers: Sequence[Episode]


class KeptAnswer(TypedDict):
    """A line of answers.jsonl: a completion that is kept as text, and its verdict."""

    capability: str
    prompt: str
    answer: str
    passed: bool
    detail: str
    tokens: int


def make_card(model: str, reference: str, cfg: CardConfig, folder: Path) -> Json:
    """Evaluates a model (a folder, run, hub id or `abacus`) and writes its card to `folder` as card.json.

    Each metric is {"value", "low", "high", "n"}, n in tasks; `kl` is measured from `reference`. answers.jsonl holds the
    kept completions and is written first, so card.json marks both as complete. Raises ConfigError if the vocabularies
    of the two models differ, and RolloutError if more than 1 % of the completions could not be scored.
    """
    set_threads(cfg.threads)
    device = resolve(cfg.device)
    policy = api.open_policy(model, on=device)
    asked, verify = sample_answers(policy, cfg, model)
    check_failures([one.answers for one in asked], RewardConfig().max_failure_rate)
    whole = [one for one in asked if all(e.reward is not None for e in one.answers)]
    own = logprobs(policy, whole, cfg)
    vocabulary = policy.tokenizer.get_vocab()
    del policy  # one model in memory at a time
    kl = divergence(own, logprobs(_reference(reference, model, vocabulary, device), whole, cfg))
    figures = {**measures(whole, cfg), "kl": _amount(kl)}
    card: Json = {name: asdict(figures[name]) for name in LABELS if name in figures and figures[name].n}
    card |= {"tasks": cfg.sets, "reference": reference}
    card |= {name: getattr(cfg, name) for name in ("samples", "temperature", "max_tokens", "seed")}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in kept_answers(asked, verify, cfg)]
    durable.publish_file(folder / "answers.jsonl", "".join(line + "\n" for line in lines))
    durable.publish_file(folder / "card.json", json.dumps(card, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return card


def sample_answers(policy: Policy, cfg: CardConfig, model: str) -> tuple[list[AnsweredTask], Verifier]:
    """Samples and scores `samples` completions per task, set after set; also returns the verifier.

    The template's arguments and date, the stop strings and stop tokens are those of the run that `model` belongs to.

    A built-in set gives its held-out tasks, a file all of its tasks; at most `problems` of each set are used.
    """
    chat = chat_format_of(policy, model, cfg.format)
    recipe = GRPORecipe(
        data=DataConfig(tasks="addition", count=cfg.problems, format=cfg.format),  # never trained on
        rollout=RolloutConfig(
            slots=cfg.slots,
            max_tokens=cfg.max_tokens,
            temperature=cfg.temperature,
            stop=stops_of(policy, model),
        ),
        eval=EvalConfig(problems=cfg.problems),
        run=RunConfig(seed=cfg.seed),
    )
    judged = {
        capability: env_tasks(replace(recipe, data=replace(recipe.data, eval_tasks=tasks)), chat)
        for capability, tasks in cfg.sets.items()
    }
    wanted = [(capability, task) for capability, (sets, _, _) in judged.items() for task in sets.test]
    _, verify, _ = next(iter(judged.values()))  # any set's: with `reward.name = "auto"` each task has its own
    collector = make_collector(policy, chat, verify, recipe)
    groups = collector.groups([task for _, task in wanted], cfg.samples, 0, "card")
    return [AnsweredTask(*one, answers) for one, answers in zip(wanted, groups, strict=True)], verify


def measures(asked: Sequence[AnsweredTask], cfg: CardConfig) -> dict[str, Estimate]:
    """All metrics except the KL; every completion must be scored."""

    def share(of: Callable[[Episode], float], *capabilities: str) -> Estimate:
        return bootstrap(_per_task(of, [one for one in asked if one.capability in (capabilities or CAPABILITIES)]))

    found = {name: share(lambda e: e.passed, name) for name in cfg.sets if name != "over_refusal"}
    if cfg.over_refusal:
        found["over_refusal"] = share(lambda e: skills.declines(skills.final_answer(e.text)), "over_refusal")
        found["assist"] = share(lambda e: e.passed, "over_refusal")
    if tasks := [one.task for one in asked if one.capability == "reasoning"]:
        task = tasks[0]  # any task will do, because only the format is checked
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
    """Diversity of the completions of one task: distinct n-grams of all, over the sum of the distinct n-grams of each.

    1/S if all S completions have the same n-grams, 1 if no two share one, whatever their lengths. The distinct-n of Li
    et al. (arXiv 1510.03055) divides by all n-grams and so falls as completions get longer, because long texts repeat
    themselves; here a completion counts each n-gram once, and `repetition` measures the repeats. Words and punctuation
    marks count alike; a completion of fewer than n words is one n-gram, so that none is left out.
    """
    own = [set(shaping.n_grams(text, n)) or {(text.casefold(),)} for text in answers]
    return len(set().union(*own)) / sum(map(len, own))


def keeps_to(code: str, text: str) -> bool:
    """Whether a completion, thoughts included, is in a language; true if it has no letters."""
    share = language.share_in(code, text)
    return share is None or share >= LEAST


def logprobs(policy: Policy, asked: Sequence[AnsweredTask], cfg: CardConfig) -> list[list[np.ndarray]]:
    """Log-probabilities [L] of the tokens of each task's completions under a policy, 0 on the prompt."""
    rows = [to_sample(e, 0.0) for one in asked for e in one.answers]
    values = iter(sample_logprobs(policy, rows, TOKENS_PER_PASS, cfg.temperature))
    return [[next(values) for _ in one.answers] for one in asked]


def divergence(own: Sequence[Sequence[np.ndarray]], reference: Sequence[Sequence[np.ndarray]]) -> list[float]:
    """Per task, the mean over its completions y of `log π(y) − log π_ref(y)`, in nats per completion.

    For completions sampled from π this is an unbiased estimate of KL(π ‖ π_ref) over whole completions, the k1
    estimator; single values may be negative.
    """
    return [
        float(np.mean([(a.astype(float) - b.astype(float)).sum() for a, b in zip(policy_rows, ref_rows, strict=True)]))
        for policy_rows, ref_rows in zip(own, reference, strict=True)
    ]


def kept_answers(asked: Sequence[AnsweredTask], verify: Verifier, cfg: CardConfig) -> list[KeptAnswer]:
    """The first completion of each of `prompts` tasks, the first of every set and so the same in every card."""
    names = list(cfg.sets)
    rows: list[KeptAnswer] = []
    for i, name in enumerate(names):
        count = len(range(i, cfg.prompts, len(names)))  # round-robin over the sets
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


def rows(card: JsonView) -> list[tuple[str, str]]:
    """(label, value with its interval) of each metric of a card, in a fixed order, for tables."""
    found: list[tuple[str, str]] = []
    for name, (label, is_share) in LABELS.items():
        if name in card:
            e = Estimate(**card[name])
            found.append((label, str(e) if is_share else f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"))
    return found


def _reference(name: str, model: str, vocabulary: Mapping[str, int], device: torch.device) -> Policy:
    reference = api.open_policy(name, on=device)
    if reference.tokenizer.get_vocab() != vocabulary:
        raise ConfigError(
            f"the reference model {name!r} and {model!r} have different vocabularies, so there is no KL between them. "
            "Use a reference model of the same family."
        )
    return reference


def _per_task(of: Callable[[Episode], float], asked: Sequence[AnsweredTask]) -> list[float]:
    return [float(np.mean([of(e) for e in one.answers])) for one in asked]


def _amount(values: Sequence[float]) -> Estimate:
    """`bootstrap` for values that are not shares: all-0 and all-1 are not special, equal values have no spread."""
    if len(set(values)) == 1:
        return Estimate(values[0], values[0], values[0], len(values))
    return bootstrap(values)
