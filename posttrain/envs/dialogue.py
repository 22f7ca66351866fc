"""A conversation with a simulated user, who has a wish and tells each fact only when asked for it.

The model is an assistant that takes a booking: it must ask, and then order with exactly what it was told. The user is
a program, or, with `env.name = "dialogue:FILE.toml"`, a model behind an OpenAI-compatible endpoint. What is scored is
the same either way, and a program does it: which facts the user has told, and whether the order is right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import read_settings
from posttrain.data.answers import final_part
from posttrain.envs.env import Env, Turn
from posttrain.rewards.endpoint import Endpoint, Limits, Replies, address, key_from
from posttrain.types import ConfigError, Message, Task

User = Callable[[Task, Sequence[Message]], str]
"""user(task, conversation) → what the user says next."""

FOR_FACTS = 0.5  # of a whole success is earned by the turns that bring the facts out
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
"""Words by which a fact is asked for."""


class Dialogue:
    """One conversation. Each fact that the user tells earns its share of 0.5, the right order the other half.

    A wrong order ends it, and so does one that guesses a fact the user has not told. So does lost patience: `patience`
    replies (3 unless the task says) in which the assistant learns nothing new.
    """

    def __init__(self, task: Task, seed: int, user: User | None = None) -> None:
        self.task, self.user, self.said = task, user or told, list(task.messages)
        self.facts: Mapping[str, str] = task.meta["facts"]
        self.known, self.patience = set[str](), int(task.meta.get("patience", 3))

    def step(self, reply: str) -> Turn:
        spoken = final_part(reply)
        if (order := ordered(spoken)) is not None:
            passed = order == [fact.lower() for fact in self.facts.values()] and self.known == set(self.facts)
            return Turn(reward=(1 - FOR_FACTS) * passed, done=True, passed=passed, parts=self._parts(ordered=1.0))
        self.said.append(Message("assistant", spoken))
        answer = self.user(self.task, self.said)
        self.said.append(Message("user", answer))
        fresh = {name for name, fact in self.facts.items() if name not in self.known and mentions(answer, fact)}
        self.known |= fresh
        self.patience -= not fresh
        if not self.patience:
            return Turn(done=True, parts=self._parts(ordered=0.0))
        return Turn((self.said[-1],), FOR_FACTS * len(fresh) / len(self.facts), parts=self._parts(ordered=0.0))

    def _parts(self, ordered: float) -> dict[str, float]:
        return {"facts": len(self.known) / len(self.facts), "ordered": ordered}

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """`count` conversations: a wish and its facts, drawn with a seed."""
        draw = random.Random(seed)
        return [_task(f"dialogue-{i}", draw) for i in range(count)]


def _task(name: str, draw: random.Random) -> Task:
    wish = draw.choice(list(WISHES))
    facts = {fact: draw.choice(values) for fact, values in WISHES[wish].items()}
    names = ", ".join(facts)
    job = f"Ask the user for one thing at a time: {names}. When you know all, reply: ORDER {' | '.join(facts)}"
    messages = (Message("system", job), Message("user", f"I would like to {wish}."))
    return Task(name, "dialogue", messages, "ORDER " + " | ".join(facts.values()), {"wish": wish, "facts": facts})


def told(task: Task, said: Sequence[Message]) -> str:
    """What the user who is a program says: one fact that the last message asks for, or that nothing was understood."""
    asked = set(re.findall(r"[a-z]+", said[-1].content.lower()))
    for name, fact in task.meta["facts"].items():
        if asked & {name, *ALIKE.get(name, "").split()}:
            return f"The {name}: {fact}."
    return "I do not understand."


def ordered(text: str) -> list[str] | None:
    """What the last line that begins with ORDER orders, in small letters; None where there is no such line."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("ORDER ")]
    return [part.strip() for part in lines[-1].removeprefix("ORDER ").lower().split("|")] if lines else None


def mentions(text: str, fact: str) -> bool:
    """Whether a text has the fact in it as whole words."""
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text, re.IGNORECASE) is not None


# --- a user who is a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UserConfig:
    """What a simulated user's file says. See docs/guides/environments.md for each setting."""

    endpoint: str = ""
    model: str = ""
    key: str = ""  # the environment variable that holds the API key
    manner: str = ""
    reply_tokens: int = 128
    seed: int = 0
    cache: str = ""
    timeout: float = 10.0  # with one more try, `env.timeout` is not reached
    retries: int = 1
    max_requests: int = Limits.max_requests

    def __post_init__(self) -> None:
        address(self.endpoint)
        if not self.model or self.reply_tokens < 1:
            raise ConfigError("`model` must name the model that plays the user, and reply_tokens be 1 or more.")


def load_user(path: str) -> Env:
    """The dialogue environment whose user is the model that a TOML file names. Raises ConfigError for the file."""
    cfg = read_settings(UserConfig, Path(path), "user", "dialogue:FILE.toml")
    limits = Limits(timeout=cfg.timeout, retries=cfg.retries, max_requests=cfg.max_requests)
    params = {"temperature": 0, "seed": cfg.seed, "max_tokens": cfg.reply_tokens}
    endpoint = Endpoint(cfg.endpoint, cfg.model, params, limits, Replies.at(cfg.cache), key_from(cfg.key))
    return Simulated(endpoint, cfg.manner)


@dataclass(frozen=True)
class Simulated:
    """The dialogue environment with a model as its user; equal conversations get equal words, from a cache."""

    endpoint: Endpoint
    manner: str

    def __call__(self, task: Task, seed: int) -> Dialogue:
        return Dialogue(task, seed, self.user)

    def user(self, task: Task, said: Sequence[Message]) -> str:
        """What the model says as the user. Raises RolloutError where it says nothing."""
        facts = "; ".join(f"{name}: {fact}" for name, fact in task.meta["facts"].items())
        role = (
            f"You play a customer who wants to {task.meta['wish']}. These facts are yours alone: {facts}. Tell one "
            "fact, word for word, only when you are asked for it. Answer in one sentence, as a customer would."
        )
        turned = {"assistant": "user", "user": "assistant"}
        talk = [(turned[m.role], m.content) for m in said if m.role in turned]
        return self.endpoint.reply((("system", f"{role} {self.manner}".strip()), *talk))

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """The tasks of the user who is a program."""
        return Dialogue.tasks(count, seed)
