"""Adapter for Gymnasium environments (https://gymnasium.farama.org/api/env/) with text observations.

`env.name = "gymnasium:ID"` creates the environment registered as ID, `gymnasium:MODULE:ID` imports the module first,
and `gymnasium:FILE.py:NAME` calls a class or function from a file, for which the package gymnasium is not needed.
Actions are the replies' texts or, for a discrete action space, the numbers in them.
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
"""Keys of `info` for success; without them an episode passes if it terminates with a positive return."""


@dataclass(frozen=True)
class Gymnasium:
    """Creates a new Gymnasium environment per rollout and resets it with the task's seed."""

    name: str
    make: Callable[[], Any]

    def __call__(self, task: Task, seed: int) -> Adapted:
        return Adapted(self.make(), task, seed)

    def tasks(self, count: int, seed: int) -> list[Task]:
        """`count` tasks: a reset seed each, with the environment's first observation as the prompt."""
        env, tasks = self.make(), list[Task]()
        try:
            for i in range(count):
                reset_seed = key("gymnasium", self.name, seed, i) % 2**31
                observation, _ = env.reset(seed=reset_seed)
                question = Message("user", _text(observation))
                tasks.append(Task(f"{self.name}-{seed}-{i}", self.name, (question,), None, {"seed": reset_seed}))
        finally:
            env.close()
        return tasks


class Adapted:
    """One rollout of a Gymnasium environment."""

    def __init__(self, env: Any, task: Task, seed: int) -> None:
        self.env, self.earned, self.turns = env, 0.0, 0
        observation, _ = env.reset(seed=int(task.meta.get("seed", seed)))
        first = _text(observation)
        if first not in task.prompt:  # a user's own task, or an environment that is not reproducible from its seed
            self.opening = (*(m for m in task.messages if m.role == "system"), Message("user", first))

    def step(self, reply: str) -> Turn:
        action = _action(self.env, final_part(reply))
        if action is None:
            return Turn(done=True, parts={"valid": 0.0, "turns": float(self.turns)})
        result: Any = self.env.step(action)
        if not isinstance(result, tuple) or len(result) != 5:
            raise RolloutError(
                f"the environment's step returned {type(result).__name__}, expected (observation, reward, terminated, "
                "truncated, info). Wrap it so that it follows the current Gymnasium interface.",
                boundary="env",
            )
        observation, reward, terminated, truncated, info = result
        self.earned, self.turns = self.earned + float(reward), self.turns + 1
        parts = {"valid": 1.0, "turns": float(self.turns)}
        if not (terminated or truncated):
            return Turn((Message("user", _text(observation)),), float(reward), parts=parts)
        successes = [bool(info[name]) for name in SUCCESS if name in info]
        passed = successes[0] if successes else bool(terminated) and self.earned > 0
        return Turn(reward=float(reward), done=True, passed=passed, parts=parts)

    def close(self) -> None:
        self.env.close()


def load_gymnasium(spec: str) -> Gymnasium:
    """Loads the environment named by `gymnasium:SPEC`. Raises ConfigError if it or the package is missing."""
    if ".py:" in spec:
        return Gymnasium(f"gymnasium:{spec.rpartition(':')[2]}", load_function(spec, "environment"))
    try:
        import gymnasium
    except ImportError:
        raise ConfigError(
            f"env.name = gymnasium:{spec} needs the package gymnasium, which is not installed. "
            "Run pip install gymnasium, or give gymnasium:FILE.py:CLASS."
        ) from None
    try:
        gymnasium.make(spec).close()
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(
            f"gymnasium cannot make {spec!r}: {error} If a module registers the ID, give gymnasium:MODULE:ID."
        ) from None
    return Gymnasium(f"gymnasium:{spec}", lambda: gymnasium.make(spec))


def _text(observation: Any) -> str:
    if isinstance(observation, str):
        return observation
    raise RolloutError(
        f"the environment's observation is {type(observation).__name__}, expected text. Wrap the environment, e.g. in "
        "gymnasium.wrappers.TransformObservation, to describe observations in words.",
        boundary="env",
    )


def _action(env: Any, text: str) -> Any:
    """The text or, for a discrete action space, the last whole number in it; None if that is not a valid action."""
    space = getattr(env, "action_space", None)
    if space is None or not hasattr(space, "n"):
        return text
    numbers = re.findall(r"-?\d{1,9}", text)
    start = int(getattr(space, "start", 0))
    return int(numbers[-1]) if numbers and start <= int(numbers[-1]) < start + int(space.n) else None
