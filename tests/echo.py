"""A world for whole runs: it pays vowels, talks back twice, and once puts a summary in place of the past."""

from __future__ import annotations

from posttrain.envs.env import Turn
from posttrain.types import Message, Task


class Echo:
    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.turns = task, 0

    def step(self, reply: str) -> Turn:
        self.turns += 1
        reward = sum(letter in "aeiou" for letter in reply) / 8
        if self.turns == 3:
            return Turn(reward=reward, done=True, passed=reward > 0.5, parts={"last": reward})
        history = (Message("user", "in short"),) if self.turns == 2 else None
        return Turn((Message("user", f"{len(reply)}, and?"),), reward, history=history)

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        return [
            Task(f"echo-{i}", "echo", (Message("user", f"say {i}"),), "", {"difficulty": i % 3}) for i in range(count)
        ]
