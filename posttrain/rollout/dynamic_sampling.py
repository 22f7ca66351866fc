"""Dynamic sampling (DAPO): replaces groups whose rewards are all equal with groups of new tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from posttrain.config import GRPORecipe
from posttrain.objectives.advantages import flat_groups, overlong_penalty
from posttrain.rollout.collector import Collector, rewards_tensor
from posttrain.rollout.curriculum import Curriculum
from posttrain.types import Episode, Task


@dataclass(frozen=True)
class SampledGroups:
    """A step's P groups in sampling order, their tasks, and which groups are trained on."""

    groups: list[list[Episode]]
    tasks: list[Task]
    kept: list[bool]
    version: int  # of the sampler's weights
    greedy: torch.Tensor | None = None  # (P, 1) rewards of greedy completions, for baseline = "greedy"


def sample_groups(
    recipe: GRPORecipe, collector: Collector, tasks: Sequence[Task], curriculum: Curriculum, cursor: int, step: int
) -> SampledGroups:
    """Samples `algo.prompts` groups of the tasks from `cursor` on; `algo.max_resamples` replaces flat groups.

    Each round samples as many groups as are missing (DAPO, arXiv 2503.14476, section 3.2), for up to
    `algo.max_resamples` extra rounds. If groups are still missing, the step trains on fewer.
    """
    cfg = recipe.algo
    out = SampledGroups([], [], [], collector.generator.version)
    for round_index in range(cfg.max_resamples + 1):
        missing = cfg.prompts - sum(out.kept)
        chosen = [tasks[i] for i in curriculum.order(cursor, len(out.groups), missing)]
        purpose = (
            f"train-{round_index}" if round_index else "train"
        )  # a task repeated in this step gets new completions
        groups = collector.groups(chosen, cfg.group_size, step, purpose)
        flat = flat_groups(shaped_rewards(recipe, groups)).tolist() if cfg.max_resamples else [False] * len(groups)
        out.groups.extend([replace(e, group=e.group + len(out.tasks)) for e in group] for group in groups)
        out.tasks.extend(chosen)
        out.kept.extend(not f for f in flat)
        if not any(flat):
            break
    return replace(out, greedy=greedy_rewards(collector, out.tasks, step)) if cfg.baseline == "greedy" else out


def shaped_rewards(recipe: GRPORecipe, groups: Sequence[Sequence[Episode]]) -> torch.Tensor:
    """Rewards (P, G), NaN where unscored, minus DAPO's penalty for completions close to max_tokens."""
    rewards, limit = rewards_tensor(groups), recipe.rollout.max_tokens
    if not recipe.algo.overlong_share:
        return rewards
    lengths = torch.tensor([[e.length for e in group] for group in groups])
    return rewards + overlong_penalty(lengths, limit, max(1, round(recipe.algo.overlong_share * limit)))


def greedy_rewards(collector: Collector, tasks: Sequence[Task], step: int) -> torch.Tensor:
    """Reward (P, 1) of the greedy completion of each task, ReMax's baseline (arXiv 2310.10505)."""
    greedy = replace(collector, params=replace(collector.params, temperature=0.0))
    return rewards_tensor(greedy.groups(tasks, 1, step, "greedy"))
