"""Environments with the interface of Gymnasium (https://gymnasium.farama.org/api/env/) whose observations are text.

`env.name = "gymnasium:ID"` makes what is registered as ID, `gymnasium:MODULE:ID` imports the module first, and
`gymnasium:FILE.py:NAME` calls a class or function of a file, which needs no package. Actions are the replies' texts,
or the numbers in them where the action space is discrete.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.data.answers import final_part
from posttrain.envs.env import Turn
from posttrain.rewards.functions import load_function
from posttrain.rng import key
from posttrain.types import ConfigError, Message, RolloutError, Task

SUCCESS = ("is_success", "success")
"""Where `info` says whether the goal was reached; without them an episode passes that ends with a positive return."""


@dataclass(frozen=True)
class Gymnasium:
    """Every attempt makes an environment of its own and resets it with the task's seed."""

    name: str
    make: Callable[[], Any]

    def __call__(self, task: Task, seed: int) -> Adapted:
        return Adapted(self.make(), task, seed)

    def tasks(self, count: int, seed: int) -> list[Task]:
        """`count` tasks: seeds, each with the observation that the environment then begins with as its question."""
        env, found = self.make(), list[Task]()
        try:
            for i in range(count):
                own = key("gymnasium", self.name, seed, i) % 2**31
                observation, _ = env.reset(seed=own)
                question = Message("user", _text(observation))
                found.append(Task(f"{self.name}-{seed}-{i}", self.name, (question,), None, {"seed": own}))
        finally:
            env.close()
        return found


class Adapted:
    """One environment while it is played."""

    def __init__(self, env: Any, task: Task, seed: int) -> None:
        self.env, self.earned, self.turns = env, 0.0, 0
        observation, _ = env.reset(seed=int(task.meta.get("seed", seed)))
        first = _text(observation)
        if first not in task.prompt:  # a task from elsewhere, or one that its seed does not repeat
            self.opening = (*(m for m in task.messages if m.role == "system"), Message("user", first))

    def step(self, reply: str) -> Turn:
        action = _action(self.env, final_part(reply))
        if action is None:
            return Turn(done=True, parts={"valid": 0.0, "turns": float(self.turns)})
        result: Any = self.env.step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise RolloutError(
                f"step of the environment gave {type(result).__name__}, expected (observation, reward, terminated, "
                "truncated, info). Wrap it in one that follows the present interface of Gymnasium.",
                boundary="env",
            )
        observation, reward, terminated, truncated, info = result
        self.earned, self.turns = self.earned + float(reward), self.turns + 1
        parts = {"valid": 1.0, "turns": float(self.turns)}
        if not (terminated or truncated):
            return Turn((Message("user", _text(observation)),), float(reward), parts=parts)
        said = [bool(info[name]) for name in SUCCESS if name in info]
        passed = said[0] if said else bool(terminated) and self.earned > 0
        return Turn(reward=float(reward), done=True, passed=passed, parts=parts)

    def close(self) -> None:
        self.env.close()


def load_gymnasium(spec: str) -> Gymnasium:
    """The environment that `gymnasium:SPEC` names. Raises ConfigError where it, or the package, is not there."""
    if ".py:" in spec:
        return Gymnasium(f"gymnasium:{spec.rpartition(':')[2]}", load_function(spec, "environment"))
    try:
        import gymnasium
    except ImportError:
        raise ConfigError(
            f"env.name = gymnasium:{spec} needs the package gymnasium, which is not installed. "
            "Install it: pip install gymnasium. Or give gymnasium:FILE.py:CLASS."
        ) from None
    try:
        gymnasium.make(spec).close()
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(
            f"gymnasium cannot make {spec!r}: {error} Write gymnasium:MODULE:ID where MODULE registers ID."
        ) from None
    return Gymnasium(f"gymnasium:{spec}", lambda: gymnasium.make(spec))


def _text(observation: Any) -> str:
    if isinstance(observation, str):
        return observation
    raise RolloutError(
        f"an observation of the environment is {type(observation).__name__}, expected text. Wrap it, for example in "
        "gymnasium.wrappers.TransformObservation with a function that describes it.",
        boundary="env",
    )


def _action(env: Any, text: str) -> Any:
    """The text, or for a discrete action space the last whole number in it; None where that is no action."""
    space = getattr(env, "action_space", None)
    if space is None or not hasattr(space, "n"):
        return text
    numbers = re.findall(r"-?\d{1,9}", text)
    start = int(getattr(space, "start", 0))
    return int(numbers[-1]) if numbers and start <= int(numbers[-1]) < start + int(space.n) else None
