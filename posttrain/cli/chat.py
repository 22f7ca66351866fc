"""`posttrain sample` and `posttrain chat`: completions of one prompt, and a chat in the terminal."""

from __future__ import annotations

import sys
from typing import TypedDict

from posttrain import api
from posttrain.cli.tables import printable
from posttrain.models.load import chat_format_of, stops_of
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.generator import Request, completion_seed
from posttrain.rollout.text import Stream, text_of
from posttrain.store.listing import recipe_behind, run_behind
from posttrain.train.device import resolve
from posttrain.types import Message, SamplingParams


def warn_about_environment(model: str) -> None:
    """Notes on stderr if a run, or the model of one, was trained in an environment, which is not used here."""
    run = run_behind(model)
    if env := recipe_behind(model).get("env", {}).get("name"):
        print(
            f"note: {run} was trained in the environment {env!r}, which is not used here: the model sees only your "
            f"prompt. `posttrain eval {run}` runs and scores whole episodes.",
            file=sys.stderr,
        )


class SampleRow(TypedDict):
    """A completion as JSON; `logprobs` are those of its tokens."""

    text: str
    stop: str
    tokens: list[int]
    logprobs: list[float]


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
) -> list[SampleRow]:
    """Samples `count` completions."""
    warn_about_environment(model)
    policy = api.open_policy(model, on=resolve("auto"))
    params = SamplingParams(temperature, top_p, top_k, max_tokens, stops_of(policy, model))
    form = chat_format_of(policy, model, "plain" if plain else "chat")
    asked = (Message("user", prompt),)
    tokens, opening = form.prompt_tokens(asked), form.opening(asked)
    request = Request(tokens, tuple(completion_seed(seed, "sample", 0, prompt, i) for i in range(count)))
    (completions,) = EmbeddedGenerator(policy, slots=min(count, 128)).generate([request], params)
    return [
        {
            "text": opening + text_of(policy, c),
            "stop": c.stop,
            "tokens": c.tokens.tolist(),
            "logprobs": [round(float(x), 6) for x in c.logprobs],
        }
        for c in completions
    ]


def chat(model: str, temperature: float, max_tokens: int, system: str) -> None:
    """Reads lines and streams replies until an empty line or end of input."""
    warn_about_environment(model)
    policy = api.open_policy(model, on=resolve("auto"))
    form = chat_format_of(policy, model, "chat")
    engine = EmbeddedGenerator(policy, slots=1)
    history = [Message("system", system)] if system else []
    params = SamplingParams(temperature, max_tokens=max_tokens, stop=stops_of(policy, model))
    print(f"Chatting with {model}. An empty line or Ctrl-D quits.")
    while line := _ask():
        history.append(Message("user", line))
        request = Request(form.prompt_tokens(tuple(history)), (completion_seed(0, "chat", len(history), line, 0),))
        _print(opening := form.opening(tuple(history)))
        stream = Stream(policy, _print, params.stop)
        ((reply,),) = engine.generate([request], params, on_token=stream.add)
        stream.finish(text_of(policy, reply))
        print()
        history.append(Message("assistant", opening + text_of(policy, reply)))


def _print(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _ask() -> str:
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""
