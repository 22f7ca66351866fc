"""Settings of a search: how many tokens a problem gets, and what they are spent on (posttrain/search)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from posttrain.config.choices import KeysOf
from posttrain.config.sections import require_positive
from posttrain.types import ConfigError

COMMON = ("strategy", "budget", "scorer", "separator", "aggregate", "choose")
"""Settings that every strategy uses; of the others, each strategy names those that it reads."""


@dataclass(frozen=True)
class SearchConfig:
    strategy: Annotated[str, KeysOf("search/strategies.py", "STRATEGIES", more=("",))] = ""
    """How the budget is spent (docs/guides/search.md); empty: no search."""
    budget: int = 16
    """Completions per problem that the search may sample, or as many unfinished ones; the report counts the tokens."""
    scorer: str = ""
    """A reward, PRM, `confidence`, `self-certainty`, `shown-tests` or `steps:arithmetic`; empty: the strategy's own."""
    separator: str = ""
    """Text that ends a step; empty: that of the process reward model that scores, else a line break."""
    aggregate: Literal["min", "product", "last", "mean"] = "min"
    """How the scores of a completion's steps are combined into one."""
    choose: Literal["auto", "vote", "weighted", "best"] = "auto"
    """The result: the most common answer, that with the largest sum of scores, or the best; `auto`: by strategy."""
    width: int = 0
    """Completions explored side by side; 0 takes the whole budget, fewer are repeated until it is spent."""
    expansions: int = 4
    """Next steps that are sampled from each step that is kept."""
    share_temperature: float = 0.2
    """Temperature of the softmax by which scores share out the next steps; `inf` gives equal shares."""
    exploration: float = 1.0
    """Weight of PUCT's exploration term."""
    resample_below: float = 0.5
    """Resample once the effective sample size is below this share of the particles."""
    confidence: float = 0.95
    """Probability that the leading answer stays the most common one, at which sampling stops."""
    reject: float = 0.0
    """Share of the unfinished completions that are dropped after each step, those with the lowest scores."""
    least_thinking: int = 0
    """Minimum tokens of thinking; an earlier end is replaced by `wait`."""
    most_thinking: int = 0
    """Maximum tokens of thinking, after which its end is forced; 0 for no maximum."""
    wait: str = "Wait"
    """Text that is put in place of an early end of thinking."""

    def __post_init__(self) -> None:
        require_positive(self, "budget", "expansions")
        for name in ("width", "least_thinking", "most_thinking"):
            if getattr(self, name) < 0:
                raise ConfigError(f"search.{name}={getattr(self, name)} is negative; use 0 or more.")
        if self.width > self.budget:
            raise ConfigError(f"search.width={self.width} exceeds search.budget={self.budget}; lower it.")
        for name, top in (("resample_below", 1), ("confidence", 1), ("reject", 1)):
            if not 0 <= getattr(self, name) <= top:
                raise ConfigError(f"search.{name}={getattr(self, name)} is not in [0, {top}].")
        if not self.share_temperature > 0:
            raise ConfigError(
                f"search.share_temperature={self.share_temperature} is not above 0; `inf` shares equally."
            )
        if not (math.isfinite(self.exploration) and self.exploration >= 0):
            raise ConfigError(f"search.exploration={self.exploration} is not a finite number ≥ 0.")

    def given(self) -> list[str]:
        """Names of the settings that differ from their defaults and are not common to all strategies."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        return [name for name in changed if name not in COMMON]


def parsed(text: str) -> dict[str, str]:
    """The settings that `STRATEGY` or `STRATEGY:BUDGET` stands for, such as `beam:16`."""
    strategy, colon, budget = text.partition(":")
    if colon and not budget.strip().isdecimal():
        raise ConfigError(f"search {text!r}: the budget {budget!r} is not a whole number; write {strategy}:16.")
    return {"search.strategy": strategy, **({"search.budget": budget} if colon else {})}


def rounds(cfg: SearchConfig) -> list[int]:
    """Widths of the rounds in which a budget is spent: `width` each, and the rest in the last one.

    A larger budget with the same width only adds rounds.
    """
    width = cfg.width or cfg.budget
    full, rest = divmod(cfg.budget, width)
    return [width] * full + [rest] * (rest > 0)
