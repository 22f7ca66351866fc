"""Task selection: in seeded order, or by a curriculum that prefers tasks with a medium pass rate.

The selection is a function of the seed, the position in the data and earlier pass rates. All of these are in the
checkpoint, so a resumed run selects the same tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np

from posttrain import rng
from posttrain.data.mixing import Draw
from posttrain.types import Episode, Json, JsonView, Task

LEVELS = ("difficulty", "level")  # task columns that give its difficulty
FORGET = 0.9  # decay of earlier results each time a level is sampled
FLOOR = 0.1  # smallest weight of a level, as a share of the largest


class Curriculum:
    """Selects tasks. With `how = "pass-rate"`, tasks of one level (a column `difficulty` or `level`; else each task is
    its own level) share a running pass rate p. Each level is drawn with weight p (1 − p) per task, the variance of a
    pass/fail reward, which is 0 where all rewards of a group would be equal. The weight per task is at least FLOOR
    times the largest. Otherwise tasks are drawn by `order`, by default at random, every task once per epoch.

    p is (1 + passes) / (2 + episodes), with older episodes decayed by FORGET, so it starts at ½.
    """

    def __init__(self, tasks: Sequence[Task], how: str, seed: int, order: Draw | None = None) -> None:
        self.how, self.seed = how, seed
        self._order = order or partial(rng.draw_order, len(tasks), seed=seed)
        names = [_level(task) for task in tasks]
        self._levels = list(dict.fromkeys(names))
        number = {name: i for i, name in enumerate(self._levels)}
        self._level_of = {task.id: number[name] for task, name in zip(tasks, names, strict=True)}
        self._members = [[i for i, name in enumerate(names) if name == level] for level in self._levels]
        self._seen = np.zeros((len(self._levels), 2))  # episodes, passes
        self._drawn = np.zeros(len(self._levels), np.int64)

    def order(self, cursor: int, skip: int, take: int) -> list[int]:
        """Indices of tasks `skip` … `skip + take − 1` of a step that begins at position `cursor` of the data."""
        if self.how == "none":
            return self._order(cursor + skip, take)
        cumulative = np.cumsum(self.weights())
        numbers = rng.uniforms(rng.key(self.seed, "curriculum", cursor), skip + take) * cumulative[-1]
        drawn, out = self._drawn.copy(), []
        for level in np.searchsorted(cumulative, numbers, side="right").tolist():
            members = self._members[level]
            key = rng.key(self.seed, "level", level)
            out.append(members[rng.draw_order(len(members), int(drawn[level]), 1, key)[0]])
            drawn[level] += 1
        return out[skip:]

    def weights(self) -> np.ndarray:
        """Unnormalised probability (levels,) of each level: its number of tasks times p (1 − p)."""
        p = (1 + self._seen[:, 1]) / (2 + self._seen[:, 0])
        variance = p * (1 - p)
        return np.array([len(m) for m in self._members]) * np.maximum(variance, FLOOR * variance.max())

    def learn(self, groups: Sequence[Sequence[Episode]]) -> dict[str, float]:
        """Updates the pass rates with a step's scored episodes; returns metrics `curriculum_…`."""
        if self.how == "none":
            return {}
        levels: list[int] = []
        for group in groups:
            level = self._level_of[group[0].task_id]
            scored = [e.passed for e in group if e.reward is not None]
            self._seen[level] = FORGET * self._seen[level] + (len(scored), sum(scored))
            levels.append(level)
        self.count(groups)
        p = (1 + self._seen[:, 1]) / (2 + self._seen[:, 0])
        return {"curriculum_pass_rate": float(p[levels].mean()), "curriculum_levels": float(len({*levels}))}

    def count(self, groups: Sequence[Sequence[Episode]]) -> None:
        """Counts the tasks of a step as drawn, so that the next draws of their levels give the tasks after them."""
        for group in groups:
            self._drawn[self._level_of[group[0].task_id]] += 1

    def copy(self) -> Curriculum:
        """A copy with a state of its own."""
        other = copy.copy(self)
        other._seen, other._drawn = self._seen.copy(), self._drawn.copy()
        return other

    def take_rates(self, state: JsonView) -> None:
        """Takes the pass rates of a `state`, and keeps its own count of what was drawn."""
        if state:
            self._seen = np.array(state["seen"])

    def state(self) -> Json:
        """The state for `load`, as exact JSON."""
        return {"seen": self._seen.tolist(), "drawn": self._drawn.tolist()} if self.how != "none" else {}

    def load(self, state: JsonView) -> None:
        """Restores what `state` returned."""
        if state:
            self._seen, self._drawn = np.array(state["seen"]), np.array(state["drawn"], np.int64)


def _level(task: Task) -> str:
    return next((f"{name}={task.meta[name]}" for name in LEVELS if name in task.meta), task.id)
