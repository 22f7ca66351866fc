"""A small text adventure: rooms made from a seed, a key in one of them, a chest to open in another."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from posttrain.data.answers import final_part
from posttrain.envs.env import Turn
from posttrain.types import Message, Task

STEPS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
ROOMS = "hall kitchen cellar attic library garden bedroom study pantry workshop".split()
COMMANDS = (*(f"go {way}" for way in STEPS), "take key", "open chest", "look")
LONGEST = 8  # commands of the shortest solution, at most: what `env.max_turns` is unless a recipe says otherwise
FOR_KEY = 0.2


@dataclass(frozen=True)
class Place:
    """Where the player is and what is done."""

    room: str
    has_key: bool = False
    opened: bool = False


class Adventure:
    """Find the key and open the chest, one command a turn. The key earns 0.2 and the chest 0.8.

    A task holds the map: `exits` (room → way → room), `start`, `key` and `chest`. Nothing but the open chest and
    `env.max_turns` ends the game.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.map, self.place = task.meta, Place(task.meta["start"])
        self.turns, self.understood = 0, 0

    def step(self, reply: str) -> Turn:
        command = " ".join(final_part(reply).lower().split()).rstrip(".!")
        self.turns += 1
        self.understood += command in COMMANDS
        before, self.place = self.place, after(self.map, self.place, command)
        reward = FOR_KEY * (self.place.has_key - before.has_key) + (1 - FOR_KEY) * self.place.opened
        parts = {"key": float(self.place.has_key), "chest": float(self.place.opened)}
        parts["understood"] = self.understood / self.turns
        if self.place.opened:
            return Turn(reward=reward, done=True, passed=True, parts=parts)
        said = described(self.map, self.place)
        if self.place == before and command != "look":
            said = f"That does not work. {said}" if command in COMMANDS else f"I do not know how to do that. {said}"
        elif self.place.has_key and not before.has_key:
            said = f"You take the key. {said}"
        return Turn((Message("user", said),), reward, parts=parts)

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """`count` games of four to six rooms; the answer is a shortest solution, `difficulty` its length."""
        draw, found = random.Random(seed), list[Task]()
        while len(found) < count:
            plan = drawn_map(draw)
            answer = solution(plan)
            if len(answer) > LONGEST:
                continue
            question = (
                "Find the key and open the chest. Reply with one command: go north, go east, go south, go west, "
                f"take key, open chest or look. {described(plan, Place(plan['start']))}"
            )
            meta = {**plan, "difficulty": len(answer)}
            found.append(Task(f"adventure-{len(found)}", "adventure", (Message("user", question),), answer, meta))
        return found


def after(plan: Mapping[str, Any], place: Place, command: str) -> Place:
    """Where a command leads; what does not work changes nothing."""
    if command.startswith("go ") and (room := plan["exits"][place.room].get(command.removeprefix("go "))):
        return replace(place, room=room)
    if command == "take key" and place.room == plan["key"]:
        return replace(place, has_key=True)
    if command == "open chest" and place.room == plan["chest"] and place.has_key:
        return replace(place, opened=True)
    return place


def described(plan: Mapping[str, Any], place: Place) -> str:
    """What the player sees."""
    things = ["a key"] * (place.room == plan["key"] and not place.has_key) + ["a chest"] * (place.room == plan["chest"])
    here = f" You see {' and '.join(things)}." if things else ""
    return f"You are in the {place.room}.{here} Exits: {', '.join(sorted(plan['exits'][place.room]))}."


def drawn_map(draw: random.Random) -> dict[str, Any]:
    """Rooms on a grid, each beside an earlier one and joined to it; key and chest lie in two rooms but the first."""
    names = draw.sample(ROOMS, draw.randint(4, 6))
    at, exits = {(0, 0): names[0]}, {name: dict[str, str]() for name in names}
    for name in names[1:]:
        free = [(x, y, w) for x, y in at for w, (dx, dy) in STEPS.items() if (x + dx, y + dy) not in at]
        x, y, way = draw.choice(free)
        dx, dy = STEPS[way]
        back = next(w for w, step in STEPS.items() if step == (-dx, -dy))
        exits[at[x, y]][way], exits[name][back] = name, at[x, y]
        at[x + dx, y + dy] = name
    key, chest = draw.sample(names[1:], 2)
    return {"exits": exits, "start": names[0], "key": key, "chest": chest}


def solution(plan: Mapping[str, Any]) -> list[str]:
    """A shortest list of commands that opens the chest, by breadth-first search."""
    start = Place(plan["start"])
    paths: dict[Place, list[str]] = {start: []}
    waiting = deque([start])
    while waiting:
        place = waiting.popleft()
        if place.opened:
            return paths[place]
        for command in COMMANDS:
            there = after(plan, place, command)
            if there not in paths:
                paths[there] = [*paths[place], command]
                waiting.append(there)
    raise ValueError("the chest of this map cannot be reached and opened; its rooms must be joined.")
