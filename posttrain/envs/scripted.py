"""Playing a world without a model: a program writes the replies. For tests, demonstrations and a first look.

    python -m posttrain.envs.scripted number games.jsonl 2000

writes games as rows for `posttrain sft`, played by someone who knows the form of the game and nothing of its art.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.envs import ENVS
from posttrain.envs.env import Env
from posttrain.envs.games import HIGHEST
from posttrain.types import Message, Task

PlayedBy = Callable[[Sequence[Message]], str]
"""player(conversation so far) → the next reply."""


@dataclass(frozen=True)
class Played:
    """A conversation that is over: all of it, what each reply earned, and whether it passed."""

    messages: tuple[Message, ...]
    rewards: tuple[float, ...]
    passed: bool

    @property
    def reward(self) -> float:
        """What the episode earned."""
        return sum(self.rewards)


def played(env: Env, task: Task, player: PlayedBy, seed: int = 0, max_turns: int = 8) -> Played:
    """One episode of a scripted player, by the rules of training: after `max_turns` replies it is over."""
    world = env(task, seed)
    said, rewards, passed = list(getattr(world, "opening", task.messages)), list[float](), False
    try:
        while len(rewards) < max_turns:
            reply = player(said)
            turn = world.step(reply)
            said.append(Message("assistant", reply))
            rewards.append(turn.reward)
            passed = turn.passed
            if turn.over:
                break
            said = [*(said if turn.history is None else turn.history), *turn.messages]
    finally:
        close = getattr(world, "close", None)
        if close is not None:
            close()
    return Played(tuple(said), tuple(rewards), passed)


BEGINNERS: dict[str, Callable[[random.Random], PlayedBy]] = {
    "number": lambda draw: lambda said: str(draw.randint(1, HIGHEST)),
}
"""Environment → a player of it, from a source of randomness, who makes allowed moves at random."""


def write_games(name: str, path: Path, count: int, seed: int = 0) -> float:
    """Writes `count` games of a beginner as rows with `messages`; returns the share that was won."""
    draw, won = random.Random(f"beginner/{seed}"), 0  # not the source that the secrets are drawn from
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for task in ENVS[name].tasks(count, seed):
            game = played(ENVS[name], task, BEGINNERS[name](draw))
            won += game.passed
            rows = [{"role": m.role, "content": m.content} for m in game.messages]
            file.write(json.dumps({"messages": rows}) + "\n")
    return won / count


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in BEGINNERS:
        sys.exit(f"usage: python -m posttrain.envs.scripted {{{','.join(BEGINNERS)}}} FILE.jsonl COUNT")
    print(f"{write_games(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])):.1%} of the games were won.")
