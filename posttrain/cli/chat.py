"""`posttrain sample` and `posttrain chat`: completions of one prompt, and a chat in the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TypedDict

from posttrain import api
from posttrain.cli.tables import printable
from posttrain.config import EvalRecipe
from posttrain.models.load import chat_format_of, stops_of
from posttrain.rollout.build import make_collector
from posttrain.rollout.engines.embedded import EmbeddedGenerator
from posttrain.rollout.generator import Request, completion_seed
from posttrain.rollout.text import Stream, text_of
from posttrain.search.build import check_name, make_engine, make_scorer, reads_gold, scorer_name
from posttrain.search.run import check, search
from posttrain.search.solve import check_separator
from posttrain.store.listing import recipe_behind, run_behind
from posttrain.train.device import resolve
from posttrain.types import ConfigError, Message, RolloutError, SamplingParams, Task, Verdict


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


def search_chat(model: str, recipe: EvalRecipe, system: str) -> None:
    """Like `chat`, but a search chooses each reply; after it, what that cost is printed.

    Raises ConfigError if the scorer needs a gold answer, which a chat does not have.
    """
    warn_about_environment(model)
    cfg = recipe.search
    check_name(cfg)
    if reads_gold(cfg.scorer):
        raise ConfigError(
            f"search.scorer={cfg.scorer!r} compares with a gold answer, which a chat does not have. Use `confidence`, "
            "`self-certainty`, a reward model (model:FOLDER) or a judge."
        )
    policy = api.open_policy(model, on=resolve("auto"))
    form = chat_format_of(policy, model, "chat")
    collector = make_collector(policy, form, no_verdict, recipe)
    params = replace(collector.params, temperature=recipe.eval.temperature, stop=stops_of(policy, model))
    collector = replace(collector, params=params)
    scorer = make_scorer(cfg, policy, collector, recipe.train.micro_batch_tokens, recipe.reward)
    check(cfg, scorer)
    engine = make_engine(collector, form, cfg, scorer)
    check_separator(engine, scorer)
    history = [Message("system", system)] if system else []
    by = f", scorer {scorer_name(cfg)}" if scorer else ""
    print(f"Chatting with {model}: {cfg.strategy}, budget {cfg.budget}{by}. An empty line or Ctrl-D quits.")
    while line := _ask():
        history.append(Message("user", line))
        found = search(Task(f"chat-{len(history)}", "chat", tuple(history), None), engine, scorer, cfg, 0)
        print(printable(found.answer) if found.answer else "(no completion ended)")
        print(f"[{len(found.completions)} completions, {found.generated} tokens generated, {found.scored} scored]")
        history.append(Message("assistant", found.answer))


def no_verdict(task: Task, text: str) -> Verdict:
    """The verifier of a chat, which has no gold answer and is never asked."""
    raise RolloutError("a chat has no gold answer to compare with.", boundary="reward")


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
