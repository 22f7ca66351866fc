"""Adapter for environments of the package verifiers (https://github.com/PrimeIntellect-ai/verifiers).

`env.name = "verifiers:NAME"` loads NAME with `verifiers.load_environment`; `verifiers:FILE.py:FUNCTION` calls a
function that returns an environment. It adapts the class `Environment` (version 0 of its interface) with
`rollout(input, client, model, sampling_args)`. A rollout asks a client for each reply; here the client waits until the
policy has generated it. What an environment does between two replies is therefore unchanged.
"""

from __future__ import annotations

import asyncio
import json
import queue
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from posttrain.data.answers import final_part
from posttrain.envs.env import Turn
from posttrain.rewards.functions import load_function
from posttrain.types import ConfigError, Json, JsonView, Message, RolloutError, Task

PASSES = 1.0
"""Minimum reward for an episode to pass if the environment has no `pass_threshold`."""
CLEAN_UP = 5.0  # seconds that a cancelled rollout may take to clean up


@dataclass(frozen=True)
class Verifiers:
    """A verifiers environment, shared by all rollouts."""

    name: str
    env: Any
    package: Any  # has `client` and `response`, the classes that a rollout expects

    def __call__(self, task: Task, seed: int) -> Rollout:
        return Rollout(self.env, self.package, task)

    def tasks(self, count: int, seed: int) -> list[Task]:
        """The first `count` rows of the environment's data set, shuffled with the seed."""
        rows = self.env.get_dataset(n=count, seed=seed)
        return [_task(self.name, number, dict(row)) for number, row in enumerate(rows)]


class Rollout:
    """One rollout, which runs in the event loop and waits there for each reply."""

    def __init__(self, env: Any, package: Any, task: Task) -> None:
        self._prompts: queue.Queue[Any] = queue.Queue()  # prompts, then the final state or the exception raised
        self._env, self._reply = env, asyncio.Queue[str]()
        self._prompt: list[Message] = []
        self._task: asyncio.Task[Any] | None = None
        row = json.loads(task.meta["row"])
        self._future = asyncio.run_coroutine_threadsafe(self._run(row, _client(package, self._answer)), _loop())
        self._future.add_done_callback(self._ended)
        first = self._next()
        if not isinstance(first, list):
            raise RolloutError(f"the environment ended task {task.id!r} before the first reply.", boundary="env")
        self.opening, self._prompt = tuple(first), first

    def step(self, reply: str) -> Turn:
        messages = [*self._prompt, Message("assistant", final_part(reply))]
        _loop().call_soon_threadsafe(self._reply.put_nowait, messages[-1].content)
        following = self._next()
        if not isinstance(following, list):
            return _last_turn(following, getattr(self._env, "pass_threshold", PASSES))
        self._prompt = following
        kept = len(messages)
        if following[:kept] == messages and len(following) > kept:
            return Turn(tuple(following[kept:]))
        return Turn((following[-1],), history=tuple(following[:-1]))  # the environment rewrote the conversation

    def close(self) -> None:
        """Cancels a rollout that is still running and lets it clean up."""
        asyncio.run_coroutine_threadsafe(self._stop(), _loop()).result(CLEAN_UP + 1)

    async def _stop(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=CLEAN_UP)

    async def _run(self, row: JsonView, client: Any) -> Any:
        self._task = asyncio.current_task()
        state = await self._env.rollout(row, client, "policy", {})
        if state.get("error") is not None:
            raise RolloutError(f"the environment's rollout failed: {state['error']!r}.", boundary="env")
        await self._env.rubric.score_rollout(state)
        return state

    async def _answer(self, prompt: Sequence[Any], tools: Any) -> str:
        if tools:
            raise RolloutError("the environment uses tools, which this adapter does not support.", boundary="env")
        self._prompts.put([_message(message) for message in prompt])
        return await self._reply.get()

    def _ended(self, future: Any) -> None:
        if future.cancelled():
            self._prompts.put(RolloutError("the rollout was cancelled.", boundary="env"))
        else:
            self._prompts.put(future.exception() or future.result())

    def _next(self) -> Any:
        item = self._prompts.get()
        if isinstance(item, BaseException):
            raise item
        return item


def load_verifiers(spec: str) -> Verifiers:
    """Loads the environment named by `verifiers:SPEC`.

    Raises ConfigError if it or the package is missing, or if it cannot be run one turn at a time.
    """
    try:
        import verifiers  # pyright: ignore[reportMissingImports]
        from verifiers.clients import Client  # pyright: ignore[reportMissingImports]
        from verifiers.types import Response  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"env.name = verifiers:{spec} needs the package verifiers with its version 0 interface, but importing it "
            f"failed: {error}. Run pip install verifiers."
        ) from None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        env = load_function(spec, "environment")() if ".py:" in spec else verifiers.load_environment(spec)
    except ConfigError:
        raise
    except (ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"verifiers cannot load the environment {spec!r}: {error}") from None
    finally:
        for number, handler in handlers.items():  # the package installs its own, which would prevent a clean shutdown
            signal.signal(number, handler)
    if not all(callable(getattr(env, name, None)) for name in ("rollout", "get_dataset")):
        raise ConfigError(
            f"verifiers environment {spec!r} is a {type(env)}, expected an object with methods rollout and get_dataset."
        )
    if getattr(env, "tool_defs", None):
        raise ConfigError(f"verifiers environment {spec!r} uses tools, which this adapter does not support.")
    if getattr(env, "requires_group_rollouts", False):
        raise ConfigError(
            f"verifiers environment {spec!r} scores groups together, which this adapter does not support."
        )
    name = f"verifiers:{spec.rpartition(':')[2]}"
    return Verifiers(name, env, SimpleNamespace(client=Client, response=Response))


def _client(package: Any, answer: Any) -> Any:
    """A client of the package that gets its replies from `answer(prompt, tools)`."""

    async def get_response(self: Any, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
        message = {"role": "assistant", "content": await answer(prompt, tools), "finish_reason": "stop"}
        return package.response(id="reply", created=0, model=model, message={**message, "is_truncated": False})

    def unsupported(self: Any, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("this client has no endpoint; it only supports get_response")

    abstract = dict.fromkeys(getattr(package.client, "__abstractmethods__", ()), unsupported)
    return type("PolicyClient", (package.client,), {**abstract, "get_response": get_response})(None)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all rollouts, running in a background thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="verifiers", daemon=True).start()
    return loop


def _task(name: str, number: int, row: Json) -> Task:
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    messages = tuple(_message(message) for message in prompt)
    meta = {"row": json.dumps(row, default=str)}
    return Task(f"{name}-{row.get('example_id', number)}", name, messages, row.get("answer"), meta)


def _message(message: Any) -> Message:
    """Converts a message of the package: a mapping, or an object that supports indexing."""
    content = message["content"]
    if isinstance(content, list):
        content = "".join(str(part["text"]) for part in content if part["type"] == "text")
    return Message(message["role"], content or "")


def _last_turn(state: Any, threshold: float) -> Turn:
    """The last turn of a rollout. Per-step rewards of the environment are not part of its reward and are ignored."""
    reward = float(state["reward"])
    parts = {name: float(value) for name, value in (state.get("metrics") or {}).items()}
    return Turn(reward=reward, done=True, passed=reward >= threshold, parts=parts)
