"""Games that a small model can learn to play, each with tasks of its own."""

from __future__ import annotations

import random
import re

from posttrain.envs.env import Turn
from posttrain.types import Message, Task

HIGHEST = 15


class Number:
    """Guess a number; after each guess the model reads whether it is higher or lower.

    A right guess earns 1, less a twentieth for each guess before it; what is no number in range ends the game.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.secret, self.guesses = int(task.answer), 0

    def step(self, reply: str) -> Turn:
        match = re.fullmatch(r"\s*(\d{1,3})\s*", reply.rpartition("</think>")[2])
        guess = int(match[1]) if match else 0
        if not 1 <= guess <= HIGHEST:
            return Turn(done=True, parts={"found": 0.0, "in_range": 0.0})
        self.guesses += 1
        if guess == self.secret:
            parts = {"found": 1.0, "in_range": 1.0, "guesses": float(self.guesses)}
            return Turn(reward=1.0 - 0.05 * (self.guesses - 1), done=True, passed=True, parts=parts)
        answer = "higher" if self.secret > guess else "lower"
        return Turn((Message("user", answer),), parts={"found": 0.0, "in_range": 1.0})

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """`count` games; the secrets are drawn from 1 to HIGHEST."""
        draw = random.Random(seed)
        question = Message("user", f"Guess my number from 1 to {HIGHEST}.")
        return [Task(f"number-{i}", "number", (question,), draw.randint(1, HIGHEST)) for i in range(count)]
