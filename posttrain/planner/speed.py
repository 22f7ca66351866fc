"""Estimates step time by part: FLOPs from the model's shape divided by measured speeds.

Speeds are measured with the real training and sampling code, on a few layers of the same shape with random weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM

from posttrain.config import Recipe
from posttrain.data import batching
from posttrain.models.attention import NAME
from posttrain.models.load import Policy, llama_config
from posttrain.models.shapes import ModelShape
from posttrain.planner import memory
from posttrain.planner.memory import Rows
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.generator import Request
from posttrain.train.learner import make_learner
from posttrain.types import Batch, Sample, SamplingParams, Stat

PROBE_LAYERS, PROBE_TOKENS, PROBE_ANSWER = 2, 512, 12


@dataclass(frozen=True)
class Work:
    """FLOPs of one step by part, with the number of decode steps and rows per step (which determine their speed)."""

    prefill: float = 0.0
    decode: float = 0.0
    scoring: float = 0.0
    training: float = 0.0
    decode_steps: float = 0.0
    decode_rows: float = 0.0


def forward_flops(shape: ModelShape, tokens: float, mean_context: float, logits: float) -> float:
    """FLOPs of a forward pass, 2 per multiply-add: matrices, attention, and the output layer at `logits` tokens."""
    attention = 4 * shape.layers * shape.attention * mean_context
    return tokens * (2 * shape.matrices + attention) + 2 * logits * shape.head


def work(recipe: Recipe, shape: ModelShape, rows: Rows) -> Work:
    """FLOPs of one step, for rows of mean length."""
    facts, prompt, answer = recipe.facts(), rows.mean_prompt or rows.prompt, rows.mean_answer or rows.answer
    context = rows.mean / 2
    tokens = answer + prompt / memory.sharing(recipe, rows)
    one = forward_flops(shape, tokens, context, 0 if facts.trains == "scorer" else answer)
    backward = 1 if recipe.model.lora_rank else 2
    again = 1 if recipe.model.gradient_checkpointing else 0
    training = facts.step_rows * facts.epochs * one * (1 + backward + again)
    if facts.samples != "every step":
        return Work(training=training, scoring=facts.step_rows * one * facts.scoring_passes)
    count = facts.prompts * facts.group_size
    slots = min(memory.rollout_of(recipe).slots, count)
    return Work(
        prefill=facts.prompts * forward_flops(shape, prompt, prompt / 2, 1),
        decode=count * forward_flops(shape, answer, prompt + answer / 2, answer),
        scoring=count * one * facts.scoring_passes,
        training=training * (2 if facts.critic == "separate" else 1),
        decode_steps=math.ceil(count / slots) * answer,
        decode_rows=slots,
    )


def step_seconds(recipe: Recipe, shape: ModelShape, rows: Rows, device: str) -> dict[str, float]:
    """Seconds of one step by part, from speeds measured on `PROBE_LAYERS` layers of this shape."""
    small = replace(shape, layers=min(PROBE_LAYERS, shape.layers))
    policy = random_policy(small, recipe, device)
    todo = work(recipe, shape, rows)
    speed = training_speed(policy, small, recipe, rows)
    out = {"training pass": todo.training / speed[0]}
    if todo.scoring:
        out["scoring pass"] = todo.scoring / speed[1]
    if todo.decode:
        prefill, step = sampling_speed(policy, small, recipe, rows, int(todo.decode_rows))
        out["prompts"] = todo.prefill / prefill
        out["sampling"] = todo.decode / step
    return out


def random_policy(shape: ModelShape, recipe: Recipe, device: str) -> Policy:
    """A Llama model of a given shape with random weights and no tokenizer."""
    model = LlamaForCausalLM(llama_config(shape, max_position_embeddings=1 << 20))
    model.set_attn_implementation(NAME)
    dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
    cast(nn.Module, model).to(device=torch.device(device), dtype=dtype)
    return Policy(model, None, "random", ())


def training_speed(policy: Policy, shape: ModelShape, recipe: Recipe, rows: Rows) -> tuple[float, float]:
    """FLOP/s of a training pass and of a no-grad pass, on about PROBE_TOKENS tokens in rows like the run's."""
    length = min(max(2, round(rows.mean)), PROBE_TOKENS)
    answer = max(1, min(length - 1, round(length * (rows.mean_answer or rows.answer) / rows.mean)))
    count = max(1, min(PROBE_TOKENS, recipe.train.micro_batch_tokens) // length)
    draw = np.random.default_rng(0)
    blank, mask = np.zeros(length, np.float32), np.arange(length) >= length - answer
    samples = [Sample(draw.integers(3, shape.vocab, length), mask, blank, blank) for _ in range(count)]
    (batch,) = batching.micro(samples, count * length, "token-mean", device=policy.device)
    learner = make_learner(policy, recipe.train, 1)
    flops = count * forward_flops(shape, length, length / 2, answer)

    def loss(logp: torch.Tensor, entropy: torch.Tensor, b: Batch) -> tuple[torch.Tensor, dict[str, Stat]]:
        return -(b.weights * logp).sum(), {}

    trained = best_time(lambda: learner.forward_backward([batch], loss))
    scored = best_time(lambda: learner.logprobs(samples))
    return 3 * flops / trained, flops / scored  # the probe trains all weights


def sampling_speed(policy: Policy, shape: ModelShape, recipe: Recipe, rows: Rows, slots: int) -> tuple[float, float]:
    """FLOP/s of prefill and of decoding with `slots` sequences at the run's mean context."""
    prompt, answer = max(1, round(rows.mean_prompt or rows.prompt)), rows.mean_answer or rows.answer
    generator = EmbeddedGenerator(policy, slots)
    middle = min(prompt + max(0, round(answer / 2) - PROBE_ANSWER // 2), 4 * PROBE_TOKENS)
    tokens = np.random.default_rng(0).integers(3, shape.vocab, max(prompt, middle)).astype(np.int32)

    def run(length: int, count: int, limit: int) -> None:
        generator.generate([Request(tokens[:length], tuple(range(count)))], SamplingParams(max_tokens=limit))

    alone = best_time(lambda: run(prompt, 1, 1))
    first = best_time(lambda: run(middle, slots, 1))
    more = best_time(lambda: run(middle, slots, 1 + PROBE_ANSWER))
    decode = slots * forward_flops(shape, PROBE_ANSWER, middle + PROBE_ANSWER / 2, PROBE_ANSWER)
    return forward_flops(shape, prompt, prompt / 2, 1) / alone, decode / max(more - first, 1e-6)


def best_time(action: Callable[[], object], budget: float = 1.5) -> float:
    """Median seconds of a call after one warm-up call; at most 5 calls within about `budget` seconds."""
    action()
    times: list[float] = []
    deadline = time.monotonic() + budget
    while not times or (time.monotonic() < deadline and len(times) < 5):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
