"""Chat with a checkpoint: one WebSocket per answer, which streams new text and ends with the stop reason.

The page sends one object: the model's name, the conversation and the sampling settings. Closing the socket stops the
answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from posttrain.lab.checkpoints import Reply, describe_model, list_models, open_model
from posttrain.lab.folders import Place
from posttrain.lab.routing import get, named
from posttrain.types import ConfigError, Json, JsonView, Message, PosttrainError, SamplingParams

OPEN, CLOSE = "<think>", "</think>"
GAP = 0.03  # seconds between two messages of one answer
AT_ONCE = 8  # answers generated at the same time; more wait
LONGEST = 8192  # tokens per answer
MOST = 400  # messages per conversation


class Unfolder:
    """Splits streamed text into the thought, between <think> and </think>, and the answer."""

    def __init__(self) -> None:
        self.thinking = False
        self._held = ""  # may be the beginning of a tag

    def add(self, piece: str) -> tuple[str, str]:
        """(thought, answer) text added by a piece."""
        found = {True: "", False: ""}
        text = self._held + piece
        while True:
            mark = CLOSE if self.thinking else OPEN
            before, met, rest = text.partition(mark)
            if not met:
                break
            found[self.thinking] += before
            self.thinking, text = not self.thinking, rest
        kept = max(n for n in range(len(mark)) if text.endswith(mark[:n]))
        self._held = text[len(text) - kept :]
        found[self.thinking] += text[: len(text) - kept]
        return found[True], found[False]

    def end(self) -> tuple[str, str]:
        """(thought, answer) text that was held back because it looked like the beginning of a tag."""
        held, self._held = self._held, ""
        return (held, "") if self.thinking else ("", held)


def unfold(text: str) -> tuple[str, str]:
    """(thought, answer) of a whole text."""
    unfolder = Unfolder()
    parts = unfolder.add(text), unfolder.end()
    return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


@dataclass(frozen=True)
class Asked:
    """A request for an answer."""

    model: str
    messages: tuple[Message, ...]
    params: SamplingParams
    seed: int

    @staticmethod
    def of(text: str) -> Asked:
        """Parses the page's JSON. Raises ConfigError or DataError if it is invalid."""
        try:
            given = json.loads(text)
            rows = [(row["role"], row["content"]) for row in given["messages"]]
            sampling = given.get("temperature", 1.0), given.get("top_p", 1.0)
            whole = given.get("max_tokens", 256), given.get("seed", 0)
            model = given["model"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"this is not a valid chat request ({error!r}). Reload the page.") from None
        if not (isinstance(model, str) and all(_is_number(x) for x in sampling) and all(type(x) is int for x in whole)):
            raise ConfigError("the model must be a name, and the sampling settings numbers. Reload the page.")
        if not 1 <= whole[0] <= LONGEST or not 0 <= whole[1] < 1 << 53:
            raise ConfigError(
                f"max_tokens={whole[0]}, seed={whole[1]}; expected 1 to {LONGEST} tokens and a seed of 0 or more."
            )
        messages = tuple(Message(role, content) for role, content in rows)
        if not messages or len(messages) > MOST or messages[-1].role != "user" or not messages[-1].content.strip():
            raise ConfigError(
                f"a conversation needs 1 to {MOST} messages, the last one a user message that is not empty."
            )
        return Asked(model, messages, SamplingParams(*sampling, max_tokens=whole[0]), whole[1])


class Draft:
    """An answer in progress: one thread writes, another takes what is new."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._unfolder = Unfolder()
        self._new: Json = {"state": "waiting"}
        self._counts = {"tokens": 0, "thoughts": 0}

    def say(self, **news: Any) -> None:
        """Adds fields to the next message."""
        with self._lock:
            self._new |= news

    def write(self, text: str, tokens: int) -> None:
        """Appends text and the number of tokens it took."""
        with self._lock:
            thinking = self._unfolder.thinking
            self._add(text, *self._unfolder.add(text))
            self._counts["tokens"] += tokens
            self._counts["thoughts"] += tokens if thinking or self._unfolder.thinking else 0
            self._new |= {**self._counts, "thinking": self._unfolder.thinking}

    def end(self, **news: Any) -> None:
        """Flushes held-back text and adds the final fields."""
        with self._lock:
            self._add("", *self._unfolder.end())
            self._new |= news

    def take(self) -> Json:
        """Returns what is new since the last call."""
        with self._lock:
            new, self._new = self._new, {}
        return new

    def _add(self, raw: str, thought: str, answer: str) -> None:
        for name, text in (("raw", raw), ("thought", thought), ("answer", answer)):
            if text:
                self._new[name] = self._new.get(name, "") + text


def write_reply(place: Place, text: str, draft: Draft) -> Reply:
    """Writes the answer to a request into a draft until the draft's `stop` is set.

    Raises the errors of `open_model` and of sampling.
    """
    asked = Asked.of(text)
    draft.say(state="opening")
    opened = open_model(place, asked.model)
    draft.say(state="answering")
    began = time.monotonic()
    reply = opened.reply(asked.messages, asked.params, asked.seed, draft.write, draft.stop.is_set)
    seconds = round(time.monotonic() - began, 3)
    draft.end(state="done", stop=reply.stop, read=reply.read, written=reply.written, seconds=seconds)
    return reply


def routes(place: Place) -> list[BaseRoute]:
    """The routes that list and describe models, and the socket that answers."""
    limiter = CapacityLimiter(AT_ONCE)  # its own threads, so that pages keep theirs

    async def answer(socket: WebSocket) -> None:
        await socket.accept()
        draft = Draft()
        with suppress(WebSocketDisconnect):
            asked = await socket.receive_text()
            sending = asyncio.create_task(_send(socket, draft, lambda: write_reply(place, asked, draft), limiter))
            try:
                while True:
                    await socket.receive_text()  # no message is expected; this detects that the page was closed
            finally:
                draft.stop.set()
                with suppress(WebSocketDisconnect, RuntimeError):
                    await sending

    return [
        get("/api/models", lambda request: list_models(place)),
        get("/api/models/{model}", lambda request: describe_model(place, named(request, "model"))),
        WebSocketRoute("/api/reply", answer),
    ]


async def _send(socket: WebSocket, draft: Draft, work: Callable[[], Reply], limiter: CapacityLimiter) -> None:
    """Runs `work` in a thread and sends its draft until it ends; then closes the socket."""
    working = asyncio.create_task(to_thread.run_sync(work, limiter=limiter))
    try:
        while not working.done():
            await _tell(socket, draft.take())
            await asyncio.wait([working], timeout=GAP)
        await working
        await _tell(socket, draft.take())
    except (PosttrainError, OSError, RuntimeError) as error:  # torch reports a lack of memory as RuntimeError
        await _tell(socket, {**draft.take(), "state": "failed", "error": (str(error) or repr(error)).splitlines()[0]})
    finally:
        draft.stop.set()
    await socket.close()


async def _tell(socket: WebSocket, news: JsonView) -> None:
    if news:
        await socket.send_text(json.dumps(news, allow_nan=False))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
