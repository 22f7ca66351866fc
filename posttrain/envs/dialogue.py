"""Dialogue environment: a simulated user with a request, who reveals each fact only when asked for it.

The model is an assistant that takes a booking: it must ask questions and then place an order with exactly the facts it
was given. The user is a program or, with `env.name = "dialogue:FILE.toml"`, a model behind an OpenAI-compatible
endpoint. Either way a program scores the dialogue: which facts the user revealed, and whether the order is correct.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import read_settings
from posttrain.data.answers import final_part
from posttrain.envs.env import EnvFactory, Turn
from posttrain.rewards.endpoint import Endpoint, Limits, Replies, address, key_from
from posttrain.types import ConfigError, Message, Task

User = Callable[[Task, Sequence[Message]], str]
"""user(task, conversation) → the user's next message."""

FOR_FACTS = 0.5  # share of the full reward that is earned by eliciting the facts
WISHES: dict[str, dict[str, tuple[str, ...]]] = {
    "book a table": {"day": ("Monday", "Friday", "Sunday"), "people": ("2", "4", "6"), "name": ("Ada", "Bo", "Cleo")},
    "send a parcel": {"city": ("Bern", "Oslo", "Rome"), "weight": ("1 kg", "3 kg", "8 kg"), "name": ("Dora", "Emil")},
    "hire a bike": {"size": ("small", "large"), "hours": ("2", "5", "9"), "colour": ("red", "blue", "green")},
}
ALIKE = {
    "day": "day date when",
    "people": "people persons guests party many",
    "name": "name called",
    "city": "city where town destination",
    "weight": "weight heavy weigh kg",
    "size": "size small large tall",
    "hours": "hours long hour time",
    "colour": "colour color",
}
"""Words that count as asking for a fact."""


class Dialogue:
    """One conversation. Each fact the user reveals earns its share of 0.5; a correct order earns the other 0.5.

    An order ends the episode; it fails if it is wrong or contains a fact the user has not revealed. The user also gives
    up after `patience` replies (by default 3) that elicit nothing new.
    """

    def __init__(self, task: Task, seed: int, user: User | None = None) -> None:
        self.task, self.user, self.messages = task, user or scripted_user, list(task.messages)
        self.facts: Mapping[str, str] = task.meta["facts"]
        self.known, self.patience = set[str](), int(task.meta.get("patience", 3))

    def step(self, reply: str) -> Turn:
        text = final_part(reply)
        if (order := ordered(text)) is not None:
            passed = order == [fact.lower() for fact in self.facts.values()] and self.known == set(self.facts)
            return Turn(reward=(1 - FOR_FACTS) * passed, done=True, passed=passed, parts=self._parts(ordered=1.0))
        self.messages.append(Message("assistant", text))
        answer = self.user(self.task, self.messages)
        self.messages.append(Message("user", answer))
        new = {name for name, fact in self.facts.items() if name not in self.known and mentions(answer, fact)}
        self.known |= new
        self.patience -= not new
        if not self.patience:
            return Turn(done=True, parts=self._parts(ordered=0.0))
        return Turn((self.messages[-1],), FOR_FACTS * len(new) / len(self.facts), parts=self._parts(ordered=0.0))

    def _parts(self, ordered: float) -> dict[str, float]:
        return {"facts": len(self.known) / len(self.facts), "ordered": ordered}

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """`count` conversations, each with a request and its facts sampled from `seed`."""
        rng = random.Random(seed)
        return [_task(f"dialogue-{i}", rng) for i in range(count)]


def _task(name: str, rng: random.Random) -> Task:
    wish = rng.choice(list(WISHES))
    facts = {fact: rng.choice(values) for fact, values in WISHES[wish].items()}
    names = ", ".join(facts)
    job = f"Ask the user for one thing at a time: {names}. When you know all, reply: ORDER {' | '.join(facts)}"
    messages = (Message("system", job), Message("user", f"I would like to {wish}."))
    return Task(name, "dialogue", messages, "ORDER " + " | ".join(facts.values()), {"wish": wish, "facts": facts})


def scripted_user(task: Task, messages: Sequence[Message]) -> str:
    """The scripted user's reply: the first fact that the last message asks for, or that it did not understand."""
    words = set(re.findall(r"[a-z]+", messages[-1].content.lower()))
    for name, fact in task.meta["facts"].items():
        if words & {name, *ALIKE.get(name, "").split()}:
            return f"The {name}: {fact}."
    return "I do not understand."


def ordered(text: str) -> list[str] | None:
    """The parts of the last line that starts with ORDER, in lower case; None if there is no such line."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("ORDER ")]
    return [part.strip() for part in lines[-1].removeprefix("ORDER ").lower().split("|")] if lines else None


def mentions(text: str, fact: str) -> bool:
    """Whether the text contains the fact as whole words."""
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text, re.IGNORECASE) is not None


# --- model as the user -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UserConfig:
    """Settings of a simulated user's file; docs/guides/environments.md describes each one."""

    endpoint: str = ""
    model: str = ""
    key: str = ""  # the environment variable that holds the API key
    manner: str = ""
    reply_tokens: int = 128
    seed: int = 0
    cache: str = ""
    timeout: float = 10.0  # short enough that one retry still fits into `env.timeout`
    retries: int = 1
    max_requests: int = Limits.max_requests

    def __post_init__(self) -> None:
        address(self.endpoint)
        if not self.model or self.reply_tokens < 1:
            raise ConfigError("`model` must name the model that plays the user, and reply_tokens must be at least 1.")


def load_user(path: str) -> EnvFactory:
    """Loads the dialogue environment with the model described in a TOML file as its user.

    Raises ConfigError if the file is missing or invalid.
    """
    cfg = read_settings(UserConfig, Path(path), "user", "dialogue:FILE.toml")
    limits = Limits(timeout=cfg.timeout, retries=cfg.retries, max_requests=cfg.max_requests)
    params = {"temperature": 0, "seed": cfg.seed, "max_tokens": cfg.reply_tokens}
    endpoint = Endpoint(cfg.endpoint, cfg.model, params, limits, Replies.at(cfg.cache), key_from(cfg.key))
    return Simulated(endpoint, cfg.manner)


@dataclass(frozen=True)
class Simulated:
    """Dialogue environment with a model as its user; replies are cached, so equal conversations get equal replies."""

    endpoint: Endpoint
    manner: str

    def __call__(self, task: Task, seed: int) -> Dialogue:
        return Dialogue(task, seed, self.user)

    def user(self, task: Task, messages: Sequence[Message]) -> str:
        """The model's reply as the user. Raises RolloutError if there is none."""
        facts = "; ".join(f"{name}: {fact}" for name, fact in task.meta["facts"].items())
        role = (
            f"You play a customer who wants to {task.meta['wish']}. These facts are yours alone: {facts}. Tell one "
            "fact, word for word, only when you are asked for it. Answer in one sentence, as a customer would."
        )
        swapped = {"assistant": "user", "user": "assistant"}  # the model plays the user, so the roles are swapped
        conversation = [(swapped[m.role], m.content) for m in messages if m.role in swapped]
        return self.endpoint.reply((("system", f"{role} {self.manner}".strip()), *conversation))

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """The same tasks as with the scripted user."""
        return Dialogue.tasks(count, seed)
