"""Tool use environment: the model calls tools, reads their results, and gives a final answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial

from posttrain.config import EnvConfig
from posttrain.data.answers import final_part
from posttrain.data.tool_calls import describe, parse_calls, with_system_text
from posttrain.data.tool_schema import Tool
from posttrain.envs.env import EnvFactory, Turn
from posttrain.envs.toolbox import Result, run_call
from posttrain.rewards.scoring import score_safely
from posttrain.rewards.verifiers import Verifier
from posttrain.types import Message, RolloutError, Task

MOST_CALLS = 8
"""Maximum number of tool calls executed per reply."""


class Tools:
    """A task with tools (`env.tools`): a reply's tool calls are run and their results returned to the model.

    A reply without calls is the final answer, scored by the recipe's verifier. Only the first successful call earns
    `env.call_reward`, so calls for their own sake earn nothing.
    """

    def __init__(self, task: Task, seed: int, verify: Verifier, settings: EnvConfig, tools: Mapping[str, Tool]) -> None:
        self.task, self.verify, self.settings, self.tools = task, verify, settings, tools
        self.calls, self.failed = 0, 0
        description = describe([tool.schema for tool in tools.values()], settings.call_syntax)
        self.opening = with_system_text(task.messages, description)

    def step(self, reply: str) -> Turn:
        calls = parse_calls(final_part(reply), list(self.tools))
        if not calls:
            return self._judge(reply)
        succeeded_before = self.calls - self.failed
        results = [run_call(call, self.tools) for call in calls[:MOST_CALLS]]
        if len(calls) > MOST_CALLS:
            results.append(Result(f"Error: only the first {MOST_CALLS} calls of a reply are made.", False))
        self.calls += len(results)
        self.failed += sum(not result.ok for result in results)
        reward = self.settings.call_reward if not succeeded_before and any(result.ok for result in results) else 0.0
        messages = tuple(Message("tool", result.text) for result in results)
        return Turn(messages, reward, parts=self._parts(0.0))

    def _judge(self, reply: str) -> Turn:
        verdict, error = score_safely(self.verify, self.task, reply)
        if verdict is None:
            raise RolloutError(error or "the verifier could not score the answer.", boundary="reward")
        parts = {**verdict.parts, **self._parts(verdict.score)}
        return Turn(reward=verdict.score, done=True, passed=verdict.passed, parts=parts)

    def _parts(self, answer: float) -> dict[str, float]:
        return {"calls": float(self.calls), "failed_calls": float(self.failed), "answer": answer}


def opening_of(env: EnvFactory | None, task: Task) -> Sequence[Message]:
    """The messages before the model's first reply; with tools they include the tool descriptions.

    The `opening` of any other environment is only known once an episode starts.
    """
    factory = env.func if isinstance(env, partial) else env
    if env is None or not inspect.isclass(factory) or not issubclass(factory, Tools):
        return task.messages
    episode = env(task, 0)
    assert isinstance(episode, Tools)
    return episode.opening
