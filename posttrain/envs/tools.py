"""Questions that a model may answer with the help of tools: it calls, reads what came of it, and answers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial

from posttrain.config import EnvConfig
from posttrain.data.answers import final_part
from posttrain.data.tool_calls import describe, parse_calls, with_system_text
from posttrain.data.tool_schema import Tool
from posttrain.envs.env import Env, Turn
from posttrain.envs.toolbox import Result, run_call
from posttrain.rewards.functions import score_safely
from posttrain.rewards.verifiers import Verifier
from posttrain.types import Message, RolloutError, Task

MOST_CALLS = 8
"""Calls of one reply that are made."""


class Tools:
    """A task with tools (`env.tools`): a reply's calls are made and their results shown; one without is the answer.

    The answer earns what the recipe's verifier gives it. The first call that succeeds earns `env.call_reward`, and no
    later one does, so that calling for its own sake pays nothing.
    """

    def __init__(self, task: Task, seed: int, verify: Verifier, settings: EnvConfig, tools: Mapping[str, Tool]) -> None:
        self.task, self.verify, self.settings, self.tools = task, verify, settings, tools
        self.calls, self.failed = 0, 0
        told = describe([tool.schema for tool in tools.values()], settings.call_syntax)
        self.opening = with_system_text(task.messages, told)

    def step(self, reply: str) -> Turn:
        calls = parse_calls(final_part(reply), list(self.tools))
        if not calls:
            return self._judge(reply)
        before = self.calls - self.failed
        results = [run_call(call, self.tools) for call in calls[:MOST_CALLS]]
        if len(calls) > MOST_CALLS:
            results.append(Result(f"Error: only the first {MOST_CALLS} calls of a reply are made.", False))
        self.calls += len(results)
        self.failed += sum(not result.ok for result in results)
        earned = self.settings.call_reward if not before and any(result.ok for result in results) else 0.0
        messages = tuple(Message("tool", result.text) for result in results)
        return Turn(messages, earned, parts=self._parts(0.0))

    def _judge(self, reply: str) -> Turn:
        verdict, error = score_safely(self.verify, self.task, reply)
        if verdict is None:
            raise RolloutError(error or "the answer could not be judged.", boundary="reward")
        parts = {**verdict.parts, **self._parts(verdict.score)}
        return Turn(reward=verdict.score, done=True, passed=verdict.passed, parts=parts)

    def _parts(self, answer: float) -> dict[str, float]:
        return {"calls": float(self.calls), "failed_calls": float(self.failed), "answer": answer}


def opening_of(env: Env | None, task: Task) -> Sequence[Message]:
    """What a model reads of a task before its first reply: in a world of tools their descriptions too.

    What another kind of world puts in its `opening` is only known once it is played.
    """
    made = env.func if isinstance(env, partial) else env
    if env is None or not inspect.isclass(made) or not issubclass(made, Tools):
        return task.messages
    world = env(task, 0)
    assert isinstance(world, Tools)
    return world.opening
