"""Builds the engine and the scorer of a search from a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from posttrain.config import RewardConfig, nearest
from posttrain.config.search import SearchConfig
from posttrain.data.chat import ChatFormat
from posttrain.models.heads import about
from posttrain.models.policy import Policy
from posttrain.rewards import combine, judge
from posttrain.rewards.auto import verifier_for
from posttrain.rewards.code import shown_tests
from posttrain.rewards.functions import reward_from
from posttrain.rewards.models import PREFIX, load_reward_model
from posttrain.rewards.step_checks import has_check, step_check
from posttrain.rewards.verifiers import VERIFIERS
from posttrain.rollout.collector import Collector
from posttrain.rollout.tasks import GOLD_DECIDES, GOLD_MAY_BE_GIVEN
from posttrain.search.engine import Engine
from posttrain.search.run import needed
from posttrain.search.scorers import Confidence, Program, Reward, Scorer, SelfCertainty, Steps
from posttrain.train.forward import LOGITS_PER_CHUNK, before_trained, outputs, per_token, scatter
from posttrain.types import Batch, ConfigError, Sample, Task

PROGRAM = "steps:"
SHOWN_TESTS = "shown-tests"
OWN = ("confidence", "self-certainty", SHOWN_TESTS)
"""Scorers that need neither a model nor a gold answer."""
PROGRAMS = {"arithmetic": Program(step_check, has_check, reads_gold=True, separator=", ")}
"""Programs that check the steps of an unfinished completion, for `search.scorer = "steps:NAME"`."""


def make_engine(collector: Collector, chat: ChatFormat, cfg: SearchConfig, scorer: Scorer | None) -> Engine:
    """The engine that samples with a collector's generator, in steps as the scorer reads them."""
    return Engine(collector, chat.written_tokens, cfg.separator or (scorer.separator if scorer else "") or "\n")


def make_scorer(
    cfg: SearchConfig, policy: Policy, collector: Collector, micro_batch_tokens: int, reward: RewardConfig | None = None
) -> Scorer | None:
    """The scorer that `search.scorer` names; None if it is empty and the strategy needs none.

    Raises ConfigError for a name that is none of OWN, `steps:NAME`, or a reward.
    """
    name = scorer_name(cfg)
    if not name:
        return None
    if name == "confidence":
        return Confidence()
    if name == "self-certainty":
        rows = partial(certainties, policy, micro_batch_tokens)
        return SelfCertainty(rows, collector.encode)
    if name.startswith(PROGRAM):
        return _program(name.removeprefix(PROGRAM))
    if name.startswith(PREFIX):
        model = load_reward_model(name, reward or RewardConfig(), policy.device, None, micro_batch_tokens)
        if model.kind != "step":
            return Reward(model)
        return Steps(model, about(model.members[0].policy)["separator"])
    if name == SHOWN_TESTS:
        return Reward(shown_tests, words=True)
    words = scorer_file(name)  # a reward model has none
    return Reward(reward_from(name, verifier_for, lambda _: None, ()), words)


def scorer_name(cfg: SearchConfig) -> str:
    """`search.scorer`; `confidence` if it is empty and the strategy needs scores."""
    return cfg.scorer or ("" if needed(cfg) == "none" else "confidence")


def scorer_file(name: str) -> bool:
    """Whether a scorer is read from files: a trained model, a judge or a user's function."""
    return name.startswith((PREFIX, judge.PREFIX)) or ".py:" in name


def check_name(cfg: SearchConfig) -> None:
    """Raises ConfigError if `search.scorer` is a name that nothing has."""
    known = [*OWN, *(PROGRAM + name for name in PROGRAMS), "auto", *VERIFIERS]
    plain = re.fullmatch(r"[\w-]+", cfg.scorer) or cfg.scorer.startswith(PROGRAM)
    if plain and cfg.scorer not in known:
        raise ConfigError(
            f"unknown search.scorer {cfg.scorer!r}{nearest(cfg.scorer, known)} FILE.py:FUNCTION, model:FOLDER and "
            "judge:FILE.toml work, too."
        )


def reads_gold(name: str) -> bool:
    """Whether a scorer compares with the gold answer, which a user does not have."""
    if name.startswith(PROGRAM):
        return _program(name.removeprefix(PROGRAM)).reads_gold
    if not name or name in OWN or name.startswith((PREFIX, judge.PREFIX)):
        return False
    return any(leaf.name in (*GOLD_DECIDES, *GOLD_MAY_BE_GIVEN) for leaf in combine.leaves_of(name))


def check_tasks(scorer: Scorer | None, tasks: Sequence[Task]) -> None:
    """Raises ConfigError if the scorer is a program that cannot check the steps of a task."""
    if isinstance(scorer, Program) and (unfit := [task.id for task in tasks if not scorer.fits(task)]):
        raise ConfigError(
            f"search.scorer checks steps of arithmetic and countdown, but {len(unfit)} of {len(tasks)} tasks are not "
            f"of that kind (such as {unfit[0]!r}). Use other tasks, a process reward model or `confidence`."
        )


def _program(name: str) -> Program:
    if name not in PROGRAMS:
        raise ConfigError(f"search.scorer='steps:{name}' is none of {', '.join(PROGRAM + n for n in PROGRAMS)}.")
    return PROGRAMS[name]


def certainties(policy: Policy, micro_batch_tokens: int, samples: Sequence[Sample]) -> list[np.ndarray]:
    """KL(uniform ‖ policy) in nats at each masked token [L] of each sample, by a pass without gradient."""
    return per_token(samples, lambda rows: outputs(policy, rows, micro_batch_tokens, token_certainty))


def token_certainty(policy: Policy, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor]:
    """KL(uniform ‖ policy) (B, T) at the trained tokens: −log V − mean over the vocabulary of log p."""
    hidden = before_trained(policy, batch)
    size = max(1, LOGITS_PER_CHUNK // policy.vocab)
    parts = [
        -torch.log_softmax(policy.logits(part).float() / temperature, -1).mean(-1) - float(np.log(policy.vocab))
        for part in hidden.split(size)
    ]
    return (scatter(torch.cat(parts), batch.mask),)
