"""Worlds that answer a model: what an environment is, in messages and scores, never in tokens.

An environment makes a world for each attempt at a task. The world reads each reply and says what the model reads next,
what the reply earned, and whether the episode is over. Who wrote which token is settled elsewhere (play.py): a world
cannot get it wrong.

    class Guess:
        def __init__(self, task, seed):
            self.secret = int(task.answer)

        def step(self, reply):
            if reply.strip() == str(self.secret):
                return Turn(reward=1.0, passed=True, done=True)
            return Turn.say("higher" if int(reply) < self.secret else "lower")
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from posttrain.config import EnvConfig, nearest
from posttrain.envs.toolbox import load_tools
from posttrain.rewards.functions import load_function
from posttrain.rewards.sandbox.pool import Sandbox
from posttrain.rewards.verifiers import Verifier
from posttrain.types import ConfigError, Message, Role, RolloutError, Task


@dataclass(frozen=True)
class Turn:
    """What a world says to one reply.

    `messages` are what the model reads next; without any the episode is over, as with `done`. `reward` is what the
    reply earned; an episode's reward is the sum over its turns. `passed` and `parts` of the last turn are the
    episode's. `history` replaces the conversation so far (a summary in place of a long past): what was said before
    stays trained as it was sampled, and a new stretch of tokens begins.
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False
    passed: bool = False
    parts: Mapping[str, float] = field(default_factory=lambda: {})
    history: tuple[Message, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.reward, bool) or not isinstance(self.reward, int | float) or not math.isfinite(self.reward):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RolloutError(f"a turn's reward is {self.reward!r}, expected a finite number.", boundary="env")
        if wrong := [m.role for m in self.messages if m.role == "assistant"]:
            raise RolloutError(
                f"a turn has {len(wrong)} messages by the assistant, whose words only the model writes. Use the role "
                "user or tool.",
                boundary="env",
            )

    @staticmethod
    def say(content: str, role: Role = "user", reward: float = 0.0) -> Turn:
        """A turn of one message."""
        return Turn((Message(role, content),), reward)

    @property
    def over(self) -> bool:
        """Whether the episode ends here."""
        return self.done or not self.messages


class World(Protocol):
    """The world of one attempt. It may have `opening`, messages that replace the task's, and a method `close()`."""

    def step(self, reply: str) -> Turn:
        """Answers a reply; called by one thread at a time. What it raises leaves the attempt unscored."""
        ...


Env = Callable[[Task, int], World]
"""env(task, seed) → the world of one attempt. The seed is the attempt's own: randomness from it is reproducible."""


def load_env(
    spec: str,
    known: Mapping[str, Callable[..., Any]],
    verify: Verifier | None = None,
    settings: EnvConfig | None = None,
    sandbox: Callable[[], Sandbox] = Sandbox,
) -> Env:
    """The environment a recipe names: one of `known`, or `FILE.py:NAME` of a class or function.

    A name in `known` that ends in a colon is an adapter: called with what follows, it gives the environment.
    One that has a parameter `verify` gets the recipe's verifier, `settings` its section env, and `tools` the tools that
    `env.tools` names, of which `python` runs programs in the `sandbox`. Raises ConfigError for an unknown name, and for
    one that cannot be called with a task and a seed.
    """
    settings = settings or EnvConfig()
    if spec in known:
        made = known[spec]
    elif (adapter := spec.partition(":")[0] + ":") in known:
        made = known[adapter](spec.removeprefix(adapter))
    elif ".py" in spec:
        made = load_function(spec, "environment")
    else:
        raise ConfigError(f"unknown environment {spec!r}{nearest(spec, [*known])} Or give FILE.py:NAME.")
    try:
        parameters = inspect.signature(made).parameters
        offered: dict[str, Callable[[], Any]] = {
            "verify": lambda: verify,
            "settings": lambda: settings,
            "tools": lambda: load_tools(settings.tools, sandbox),
        }
        more = {name: get() for name, get in offered.items() if name in parameters}
        inspect.signature(made).bind(None, 0, **more)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"environment {spec!r} must take a task and a seed: {error}.") from None
    if inspect.isclass(made) and not callable(getattr(made, "step", None)):
        raise ConfigError(f"environment {spec!r} has no method step(reply).")
    return partial(made, **more) if more else made


def own_tasks(env: Env) -> Callable[[int, int], list[Task]] | None:
    """The environment's own tasks, `tasks(count, seed)`, if it has any."""
    return getattr(env.func if isinstance(env, partial) else env, "tasks", None)


def takes(env: Env, what: str) -> bool:
    """Whether the environment was given that: with `verify` its tasks need answers that pass the recipe's verifier."""
    return isinstance(env, partial) and what in env.keywords
