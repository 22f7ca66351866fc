"""The environment interface: multi-turn episodes in terms of messages and rewards, never tokens.

An `EnvFactory` creates one `Env` per rollout of a task. The environment reads each of the model's replies and returns
the next messages, the reward of the reply, and whether the episode is over. Which tokens the model generated and which
are trained is tracked by `posttrain.rollout.multi_turn`, so an environment cannot get it wrong.

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
    """An environment's response to one reply of the model.

    `messages` are what the model reads next; the episode ends if there are none or if `done` is set. `reward` is the
    reward of the reply; an episode's reward is the sum over its turns. The last turn's `passed` and `parts` are those
    of the episode. `history` replaces the conversation so far, e.g. by a summary: earlier turns are still trained as
    they were sampled, and a new token sequence begins.
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
                f"a turn has {len(wrong)} messages with the role assistant, which only the model may write. Use the "
                "role user or tool.",
                boundary="env",
            )

    @staticmethod
    def say(content: str, role: Role = "user", reward: float = 0.0) -> Turn:
        """A turn with a single message."""
        return Turn((Message(role, content),), reward)

    @property
    def over(self) -> bool:
        """Whether the episode ends with this turn."""
        return self.done or not self.messages


class Env(Protocol):
    """The environment of one rollout. Optional: `opening`, messages that replace the task's, and a method `close()`."""

    def step(self, reply: str) -> Turn:
        """Responds to the model's reply; called by one thread at a time. An exception leaves the rollout unscored."""
        ...


EnvFactory = Callable[[Task, int], Env]
"""env(task, seed) → the environment of one rollout. Each rollout has its own seed, which makes it reproducible."""


def load_env(
    spec: str,
    known: Mapping[str, Callable[..., Any]],
    verify: Verifier | None = None,
    settings: EnvConfig | None = None,
    sandbox: Callable[[], Sandbox] = Sandbox,
) -> EnvFactory:
    """Loads the environment that a recipe names: one of `known`, or `FILE.py:NAME` of a class or function.

    A name in `known` that ends in a colon is an adapter, called with the rest of `spec`. An environment with a
    parameter `verify` gets the recipe's verifier, with `settings` the recipe's section env, and with `tools` the tools
    of `env.tools`, whose `python` runs programs in the `sandbox`. Raises ConfigError for an unknown name and for an
    environment that cannot be called with a task and a seed.
    """
    settings = settings or EnvConfig()
    if spec in known:
        factory = known[spec]
    elif (adapter := spec.partition(":")[0] + ":") in known:
        factory = known[adapter](spec.removeprefix(adapter))
    elif ".py" in spec:
        factory = load_function(spec, "environment")
    else:
        raise ConfigError(f"unknown environment {spec!r}{nearest(spec, [*known])} Or give FILE.py:NAME.")
    try:
        parameters = inspect.signature(factory).parameters
        available: dict[str, Callable[[], Any]] = {
            "verify": lambda: verify,
            "settings": lambda: settings,
            "tools": lambda: load_tools(settings.tools, sandbox),
        }
        extra = {name: get() for name, get in available.items() if name in parameters}
        inspect.signature(factory).bind(None, 0, **extra)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"environment {spec!r} must accept a task and a seed: {error}.") from None
    if inspect.isclass(factory) and not callable(getattr(factory, "step", None)):
        raise ConfigError(f"environment {spec!r} has no method step(reply).")
    return partial(factory, **extra) if extra else factory


def own_tasks(env: EnvFactory) -> Callable[[int, int], list[Task]] | None:
    """The environment's own task generator `tasks(count, seed)`, or None."""
    return getattr(env.func if isinstance(env, partial) else env, "tasks", None)


def takes(env: EnvFactory, what: str) -> bool:
    """Whether `load_env` passed this argument; with `verify`, answers must suit the recipe's verifier."""
    return isinstance(env, partial) and what in env.keywords
