"""Asking a model things: samples for one prompt, and a chat in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from posttrain import api
from posttrain.cli.arguments import sections_of
from posttrain.cli.tables import printable
from posttrain.models.load import Policy
from posttrain.rollout.build import speak
from posttrain.rollout.engine import EmbeddedGenerator
from posttrain.rollout.generator import Request, attempt_seed
from posttrain.train import device as machine
from posttrain.types import Completion, Message, SamplingParams


def text_of(policy: Policy, completion: Completion) -> str:
    """A completion's text without its stop token."""
    tokens = completion.tokens[:-1] if completion.stop == "stop" else completion.tokens
    return policy.tokenizer.decode(tokens, skip_special_tokens=True)


def say_where_it_was_trained(model: str) -> None:
    """Tells on stderr where a run, or the model of one, was trained in a world: none is played here."""
    folder = Path(model)
    run = folder.parent if folder.name == "model" else folder
    if world := sections_of(str(run)).get("env", {}).get("name"):
        print(
            f"note: {run} was trained in the world {world!r}, which is not played here: what you read is answered to "
            f"your words alone. `posttrain eval {run}` plays and scores whole episodes.",
            file=sys.stderr,
        )


def sample(
    model: str,
    prompt: str,
    plain: bool,
    count: int,
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int,
    seed: int,
) -> list[dict[str, Any]]:
    """`count` answers: text, stop reason, tokens and log-probabilities."""
    say_where_it_was_trained(model)
    params = SamplingParams(temperature, top_p, top_k, max_tokens)
    policy = api.open_policy(model, device=machine.device("auto"))
    tokens = speak(policy, "plain" if plain else "chat").prompt_tokens((Message("user", prompt),))
    request = Request(tokens, tuple(attempt_seed(seed, "sample", 0, prompt, i) for i in range(count)))
    (completions,) = EmbeddedGenerator(policy, slots=min(count, 128)).generate([request], params)
    return [
        {
            "text": text_of(policy, c),
            "stop": c.stop,
            "tokens": c.tokens.tolist(),
            "logprobs": [round(float(x), 6) for x in c.logprobs],
        }
        for c in completions
    ]


def chat(model: str, temperature: float, max_tokens: int, system: str) -> None:
    """Reads lines and streams replies until an empty line or end of input."""
    say_where_it_was_trained(model)
    policy = api.open_policy(model, device=machine.device("auto"))
    form = speak(policy, "chat")
    engine = EmbeddedGenerator(policy, slots=1)
    history = [Message("system", system)] if system else []
    params = SamplingParams(temperature, max_tokens=max_tokens)
    print(f"Talking to {model}. An empty line or Ctrl-D ends.")
    while line := _ask():
        history.append(Message("user", line))
        request = Request(form.prompt_tokens(tuple(history)), (attempt_seed(0, "chat", len(history), line, 0),))
        ((reply,),) = engine.generate([request], params, on_token=Stream(policy, _print).add)
        print()
        history.append(Message("assistant", text_of(policy, reply)))


class Stream:
    """Hands on text as its tokens arrive, holding back characters that are not complete yet."""

    def __init__(self, policy: Policy, write: Callable[[str], None]) -> None:
        self.policy = policy
        self.write = write
        self.tokens: list[int] = []
        self.written = ""

    def add(self, request: int, index: int, token: int) -> None:
        """Writes what this token adds (there is one request with one completion)."""
        if token in self.policy.stop_ids:
            return
        self.tokens.append(token)
        text = self.policy.tokenizer.decode(np.array(self.tokens), skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text


def _print(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _ask() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""
