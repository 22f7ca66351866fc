"""Builds generators and collectors from a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import groupby
from typing import cast

import numpy as np

from posttrain.config import EnvConfig, EnvRecipe, RolloutConfig, Sampling
from posttrain.data.chat import ChatFormat
from posttrain.data.messages import continued
from posttrain.data.thoughts import hidden_tokens, shown_text
from posttrain.envs.env import EnvFactory
from posttrain.models.load import Policy, add_stop_ids
from posttrain.rewards.verifiers import Verifier
from posttrain.rollout.collector import Collector
from posttrain.rollout.generator import Generator
from posttrain.rollout.multi_turn import MultiTurn
from posttrain.rollout.stopping import check_strings
from posttrain.train.job import Workers
from posttrain.types import ConfigError, Message, SamplingParams, Task


def make_generator(policy: Policy, rollout: RolloutConfig) -> Generator:
    """Makes the engine named by `rollout.engine`: a module of posttrain/rollout/engines with a function `make`.

    Raises ConfigError if the engine cannot run on this machine.
    """
    return import_module(f"posttrain.rollout.engines.{rollout.engine}").make(policy, rollout)


def engine_versions(rollout: RolloutConfig) -> dict[str, str]:
    """Package versions that the engine's completions depend on, for the fingerprint; empty for built-in engines."""
    return import_module(f"posttrain.rollout.engines.{rollout.engine}").versions(rollout)


def make_collector(
    policy: Policy,
    chat: ChatFormat,
    verify: Verifier,
    recipe: Sampling,
    env: EnvFactory | None = None,
    workers: Workers | None = None,
) -> Collector:
    """Makes the collector of a recipe: engine, chat format, and verifier or environment; `workers` make the first and
    the last in processes of their own."""
    rollout = recipe.rollout

    def encode(task: Task) -> np.ndarray:
        return chat.prompt_tokens(task.messages)

    decode = partial(shown_text, policy.tokenizer)
    odd = [token for token in rollout.stop_token_ids if not 0 <= token < policy.vocab]
    if odd:
        raise ConfigError(f"rollout.stop_token_ids has {odd[0]}, but the model's ids are below {policy.vocab}.")
    add_stop_ids(policy, rollout.stop_token_ids)
    check_strings(rollout.stop, hidden_tokens(policy.tokenizer), policy.stop_ids)
    context = getattr(policy.config, "max_position_embeddings", None) or sys.maxsize
    return Collector(
        generator=workers.generator(policy, rollout) if workers else make_generator(policy, rollout),
        encode=encode,
        decode=decode,
        verify=verify if workers is None or env else workers.verifier(verify),
        params=SamplingParams(rollout.temperature, max_tokens=rollout.max_tokens, stop=rollout.stop),
        seed=recipe.run.seed,
        workers=max(rollout.reward_workers, recipe.cluster.judges if workers and not env else 0),
        multi_turn=env and _multi_turn(env, chat, decode, cast(EnvRecipe, recipe).env, context),
        opening=lambda task: chat.opening(task.messages),
    )


def _multi_turn(
    env: EnvFactory, chat: ChatFormat, decode: Callable[[np.ndarray], str], limits: EnvConfig, context: int
) -> MultiTurn:
    """Environment rollouts. Tool messages become user messages if the chat template has no tool role."""
    has_tool_role = chat.format == "plain" or chat.knows("tool")

    def readable(messages: Sequence[Message]) -> tuple[Message, ...]:
        if has_tool_role:
            return tuple(messages)
        runs = [(tool, list(run)) for tool, run in groupby(messages, lambda m: m.role == "tool")]
        as_user = [[Message("user", "\n".join(m.content for m in run))] if tool else run for tool, run in runs]
        return tuple(message for run in as_user for message in run)

    def encode(task: Task) -> np.ndarray:
        return chat.prompt_tokens(readable(task.messages))

    def follow(messages: Sequence[Message]) -> np.ndarray:
        return chat.continuation_tokens(readable(messages))

    def opening(messages: Sequence[Message]) -> str:
        return chat.opening(readable(messages))

    return MultiTurn(env, encode, follow, decode, limits, context, opening)


def with_opening(collector: Collector, chat: ChatFormat, opening: str) -> Collector:
    """A copy of the collector whose completions begin with a fixed text."""
    if not opening:
        return collector
    return replace(
        collector,
        encode=lambda task: chat.prompt_tokens(continued(task.messages, opening)),
        opening=lambda task: chat.opening(continued(task.messages, opening)),
    )
