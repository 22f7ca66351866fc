"""Environments of the package verifiers (https://github.com/PrimeIntellect-ai/verifiers) that hold conversations.

`env.name = "verifiers:NAME"` loads NAME as `verifiers.load_environment` does, `verifiers:FILE.py:FUNCTION` calls a
function that returns one. What is adapted is the class `Environment` (version 0 of its interface) with
`rollout(input, client, model, sampling_args)`. A rollout asks a client for each reply; here the client waits until the
policy has written it. So whatever an environment does between two replies it does as it would elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import queue
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from posttrain.data.answers import final_part
from posttrain.envs.env import Turn
from posttrain.rewards.functions import load_function
from posttrain.types import ConfigError, Message, RolloutError, Task

PASSES = 1.0
"""The reward from which an episode passes where the environment has no `pass_threshold`."""
CLEAN_UP = 5.0  # seconds that a rollout which is given up may take to clean up


@dataclass(frozen=True)
class Verifiers:
    """One environment, whose rollouts all attempts share."""

    name: str
    env: Any
    package: Any  # `client` and `response`, the classes that a rollout expects

    def __call__(self, task: Task, seed: int) -> Rollout:
        return Rollout(self.env, self.package, task)

    def tasks(self, count: int, seed: int) -> list[Task]:
        """The first `count` rows of the environment's data set, shuffled with the seed."""
        rows = self.env.get_dataset(n=count, seed=seed)
        return [_task(self.name, number, dict(row)) for number, row in enumerate(rows)]


class Rollout:
    """One rollout, which goes on whenever a reply comes and stands still until then."""

    def __init__(self, env: Any, package: Any, task: Task) -> None:
        self._asked: queue.Queue[Any] = queue.Queue()  # prompts; at the end the state, or what was raised
        self._env, self._reply = env, asyncio.Queue[str]()
        self._read: list[Message] = []
        self._task: asyncio.Task[Any] | None = None
        row = json.loads(task.meta["row"])
        self._future = asyncio.run_coroutine_threadsafe(self._run(row, _client(package, self._answer)), _loop())
        self._future.add_done_callback(self._ended)
        first = self._next()
        if not isinstance(first, list):
            raise RolloutError(f"task {task.id!r} was over before the first reply.", boundary="env")
        self.opening, self._read = tuple(first), first

    def step(self, reply: str) -> Turn:
        said = [*self._read, Message("assistant", final_part(reply))]
        _loop().call_soon_threadsafe(self._reply.put_nowait, said[-1].content)
        found = self._next()
        if not isinstance(found, list):
            return _scored(found, getattr(self._env, "pass_threshold", PASSES))
        self._read = found
        kept = len(said)
        if found[:kept] == said and len(found) > kept:
            return Turn(tuple(found[kept:]))
        return Turn((found[-1],), history=tuple(found[:-1]))  # the environment has rewritten what was said

    def close(self) -> None:
        """Ends a rollout that is still under way, and lets it clean up."""
        asyncio.run_coroutine_threadsafe(self._stop(), _loop()).result(CLEAN_UP + 1)

    async def _stop(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CLEAN_UP)

    async def _run(self, row: Mapping[str, Any], client: Any) -> Any:
        self._task = asyncio.current_task()
        state = await self._env.rollout(row, client, "policy", {})
        if state.get("error") is not None:
            raise RolloutError(f"the environment's rollout failed: {state['error']!r}.", boundary="env")
        await self._env.rubric.score_rollout(state)
        return state

    async def _answer(self, prompt: Sequence[Any], tools: Any) -> str:
        if tools:
            raise RolloutError("the environment offers tools, which this adapter cannot pass on.", boundary="env")
        self._asked.put([_message(message) for message in prompt])
        return await self._reply.get()

    def _ended(self, future: Any) -> None:
        if future.cancelled():
            self._asked.put(RolloutError("the rollout was given up.", boundary="env"))
        else:
            self._asked.put(future.exception() or future.result())

    def _next(self) -> Any:
        found = self._asked.get()
        if isinstance(found, BaseException):
            raise found
        return found


def load_verifiers(spec: str) -> Verifiers:
    """The environment that `verifiers:SPEC` names. Raises ConfigError where it, or the package, is not there, and for
    one that cannot be played a turn at a time."""
    try:
        import verifiers  # pyright: ignore[reportMissingImports]
        from verifiers.clients import Client  # pyright: ignore[reportMissingImports]
        from verifiers.types import Response  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"env.name = verifiers:{spec} needs the package verifiers with the interface of version 0 "
            f"(pip install verifiers), but: {error}."
        ) from None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        env = load_function(spec, "environment")() if ".py:" in spec else verifiers.load_environment(spec)
    except ConfigError:
        raise
    except (ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"verifiers cannot load the environment {spec!r}: {error}") from None
    finally:
        for number, handler in handlers.items():  # the package sets its own; a signal must end a run as it always does
            signal.signal(number, handler)
    if not all(callable(getattr(env, name, None)) for name in ("rollout", "get_dataset")):
        raise ConfigError(f"verifiers environment {spec!r} has no rollout and get_dataset; it is a {type(env)}.")
    if getattr(env, "tool_defs", None):
        raise ConfigError(f"verifiers environment {spec!r} offers tools, which this adapter cannot pass on.")
    if getattr(env, "requires_group_rollouts", False):
        raise ConfigError(f"verifiers environment {spec!r} scores groups together, which this adapter cannot do.")
    name = f"verifiers:{spec.rpartition(':')[2]}"
    return Verifiers(name, env, SimpleNamespace(client=Client, response=Response))


def _client(package: Any, answer: Any) -> Any:
    """A client of the package whose replies `answer(prompt, tools)` gives."""

    async def get_response(self: Any, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
        message = {"role": "assistant", "content": await answer(prompt, tools), "finish_reason": "stop"}
        return package.response(id="reply", created=0, model=model, message={**message, "is_truncated": False})

    def never(self: Any, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("this client has no endpoint behind it")

    rest = dict.fromkeys(getattr(package.client, "__abstractmethods__", ()), never)
    return type("PolicyClient", (package.client,), {**rest, "get_response": get_response})(None)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all rollouts, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="verifiers", daemon=True).start()
    return loop


def _task(name: str, number: int, row: dict[str, Any]) -> Task:
    asked = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    messages = tuple(_message(message) for message in asked)
    meta = {"row": json.dumps(row, default=str)}
    return Task(f"{name}-{row.get('example_id', number)}", name, messages, row.get("answer"), meta)


def _message(message: Any) -> Message:
    """A message of the package, a mapping or an object that is read like one."""
    content = message["content"]
    if isinstance(content, list):
        content = "".join(str(part["text"]) for part in content if part["type"] == "text")
    return Message(message["role"], content or "")


def _scored(state: Any, passes: float) -> Turn:
    """The last turn. What each step earned, where the environment says so, is not part of its reward and not used."""
    reward = float(state["reward"])
    parts = {name: float(value) for name, value in (state.get("metrics") or {}).items()}
    return Turn(reward=reward, done=True, passed=reward >= passes, parts=parts)
