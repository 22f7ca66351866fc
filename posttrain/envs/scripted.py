"""Runs an environment with a scripted policy instead of a model, for tests, demonstrations and SFT data.

    python -m posttrain.envs.scripted number games.jsonl 2000

writes games as rows for `posttrain sft`, played by a beginner that makes legal but random moves.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.envs import ENVS
from posttrain.envs.env import EnvFactory
from posttrain.envs.games import HIGHEST
from posttrain.types import Message, Task

PlayedBy = Callable[[Sequence[Message]], str]
"""player(conversation so far) → next reply."""


@dataclass(frozen=True)
class Played:
    """A finished episode: its messages, the reward of each reply, and whether it passed."""

    messages: tuple[Message, ...]
    rewards: tuple[float, ...]
    passed: bool

    @property
    def reward(self) -> float:
        """Total reward of the episode."""
        return sum(self.rewards)


def played(env: EnvFactory, task: Task, player: PlayedBy, seed: int = 0, max_turns: int = 8) -> Played:
    """Runs one episode with a scripted player, by the rules of training: it ends after `max_turns` replies."""
    episode = env(task, seed)
    messages, rewards, passed = list(getattr(episode, "opening", task.messages)), list[float](), False
    try:
        while len(rewards) < max_turns:
            reply = player(messages)
            turn = episode.step(reply)
            messages.append(Message("assistant", reply))
            rewards.append(turn.reward)
            passed = turn.passed
            if turn.over:
                break
            messages = [*(messages if turn.history is None else turn.history), *turn.messages]
    finally:
        close = getattr(episode, "close", None)
        if close is not None:
            close()
    return Played(tuple(messages), tuple(rewards), passed)


BEGINNERS: dict[str, Callable[[random.Random], PlayedBy]] = {
    "number": lambda rng: lambda messages: str(rng.randint(1, HIGHEST)),
}
"""Environment → function from a random generator to a player that makes random legal moves."""


def write_games(name: str, path: Path, count: int, seed: int = 0) -> float:
    """Writes `count` games of a beginner as rows with `messages`; returns the fraction won."""
    rng, won = random.Random(f"beginner/{seed}"), 0  # independent of the seed that samples the tasks
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for task in ENVS[name].tasks(count, seed):
            game = played(ENVS[name], task, BEGINNERS[name](rng))
            won += game.passed
            rows = [{"role": m.role, "content": m.content} for m in game.messages]
            file.write(json.dumps({"messages": rows}) + "\n")
    return won / count


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in BEGINNERS:
        sys.exit(f"usage: python -m posttrain.envs.scripted {{{','.join(BEGINNERS)}}} FILE.jsonl COUNT")
    print(f"{write_games(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])):.1%} of the games were won.")
