"""A small text adventure: seeded random rooms, a key in one of them and a chest to open in another."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

from posttrain.data.answers import final_part
from posttrain.envs.env import Turn
from posttrain.types import Json, JsonView, Message, Task

STEPS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
ROOMS = "hall kitchen cellar attic library garden bedroom study pantry workshop".split()
COMMANDS = (*(f"go {way}" for way in STEPS), "take key", "open chest", "look")
LONGEST = 8  # maximum length of a shortest solution: the default of `env.max_turns`
FOR_KEY = 0.2  # reward for picking up the key


@dataclass(frozen=True)
class Place:
    """Game state: the player's room and progress."""

    room: str
    has_key: bool = False
    opened: bool = False


class Adventure:
    """Find the key and open the chest, one command per turn. The key earns 0.2 and the chest 0.8.

    The task's `meta` holds the map: `exits` (room → direction → room), `start`, `key` and `chest`. The game ends only
    when the chest is open or after `env.max_turns`.
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
        text = described(self.map, self.place)
        if self.place == before and command != "look":
            text = f"That does not work. {text}" if command in COMMANDS else f"I do not know how to do that. {text}"
        elif self.place.has_key and not before.has_key:
            text = f"You take the key. {text}"
        return Turn((Message("user", text),), reward, parts=parts)

    @staticmethod
    def tasks(count: int, seed: int) -> list[Task]:
        """`count` games of four to six rooms; the answer is a shortest solution, `difficulty` its length."""
        rng, tasks = random.Random(seed), list[Task]()
        while len(tasks) < count:
            plan = drawn_map(rng)
            answer = solution(plan)
            if len(answer) > LONGEST:
                continue
            question = (
                "Find the key and open the chest. Reply with one command: go north, go east, go south, go west, "
                f"take key, open chest or look. {described(plan, Place(plan['start']))}"
            )
            meta = {**plan, "difficulty": len(answer)}
            tasks.append(Task(f"adventure-{len(tasks)}", "adventure", (Message("user", question),), answer, meta))
        return tasks


def after(plan: JsonView, place: Place, command: str) -> Place:
    """The state after a command; an invalid command leaves it unchanged."""
    if command.startswith("go ") and (room := plan["exits"][place.room].get(command.removeprefix("go "))):
        return replace(place, room=room)
    if command == "take key" and place.room == plan["key"]:
        return replace(place, has_key=True)
    if command == "open chest" and place.room == plan["chest"] and place.has_key:
        return replace(place, opened=True)
    return place


def described(plan: JsonView, place: Place) -> str:
    """Description of the room, as shown to the player."""
    things = ["a key"] * (place.room == plan["key"] and not place.has_key) + ["a chest"] * (place.room == plan["chest"])
    here = f" You see {' and '.join(things)}." if things else ""
    return f"You are in the {place.room}.{here} Exits: {', '.join(sorted(plan['exits'][place.room]))}."


def drawn_map(rng: random.Random) -> Json:
    """A random map: rooms on a grid, each connected to an earlier one; key and chest in two rooms, never the first."""
    names = rng.sample(ROOMS, rng.randint(4, 6))
    at, exits = {(0, 0): names[0]}, {name: dict[str, str]() for name in names}
    for name in names[1:]:
        free = [(x, y, w) for x, y in at for w, (dx, dy) in STEPS.items() if (x + dx, y + dy) not in at]
        x, y, way = rng.choice(free)
        dx, dy = STEPS[way]
        back = next(w for w, step in STEPS.items() if step == (-dx, -dy))
        exits[at[x, y]][way], exits[name][back] = name, at[x, y]
        at[x + dx, y + dy] = name
    key, chest = rng.sample(names[1:], 2)
    return {"exits": exits, "start": names[0], "key": key, "chest": chest}


def solution(plan: JsonView) -> list[str]:
    """A shortest list of commands that opens the chest, found by breadth-first search."""
    start = Place(plan["start"])
    paths: dict[Place, list[str]] = {start: []}
    queue = deque([start])
    while queue:
        place = queue.popleft()
        if place.opened:
            return paths[place]
        for command in COMMANDS:
            there = after(plan, place, command)
            if there not in paths:
                paths[there] = [*paths[place], command]
                queue.append(there)
    raise ValueError("the chest of this map cannot be opened; all rooms must be connected.")
