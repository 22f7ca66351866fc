"""Memory of a run's processes when learners, samplers or judges have their own (posttrain/cluster)."""

from __future__ import annotations

from dataclasses import replace

from posttrain.config import Recipe
from posttrain.models.shapes import ModelShape
from posttrain.planner import memory
from posttrain.planner.memory import Rows, Where


def worker_memory(recipe: Recipe, shape: ModelShape, rows: Rows, where: Where) -> dict[str, tuple[int, int]]:
    """(number, peak bytes of each) by kind of process; empty if all is done in the run's own process."""
    cfg = recipe.cluster
    if cfg.learners == 1 and not (cfg.samplers or cfg.judges):
        return {}
    found = {"the run's process": (1, _driver(recipe, shape, rows, where))}
    if cfg.learners > 1:
        found["learner"] = cfg.learners, _learner(recipe, shape, rows, where)
    if cfg.samplers:
        own = {**memory.generator(recipe, shape, rows, where), **memory.sampling_phase(recipe, shape, rows, where)}
        weights = memory.states(recipe, shape, where)["weights"]
        found["sampler"] = cfg.samplers, where.baseline + weights + sum(own.values())
    if cfg.judges:
        found["judge"] = cfg.judges, where.baseline
    return found


def _learner(recipe: Recipe, shape: ModelShape, rows: Rows, where: Where) -> int:
    """A rank: the whole model and 1/R of the optimizer, or 1/R of everything (train/ranks.py, cluster/sharded.py)."""
    ranks, full = recipe.cluster.learners, recipe.cluster.shard == "full"
    held = memory.states(recipe, shape, where)
    model, critic = held["weights"], held.get("critic", 0) and held["weights"]
    divided = sum(held.get(name, 0) for name in ("float32 masters", "optimizer", "critic")) - critic
    update, learns, lanes = memory.largest_pass(recipe, rows), memory.trainable(recipe, shape), recipe.train.lanes
    one = memory.training_pass(recipe, shape, update, replace(where, gpus=ranks) if full else where)
    fewer = 0 if full else learns * 4 * (lanes.bit_length() - (lanes // ranks).bit_length())  # lanes of other ranks
    whole = 0 if full else learns * 4  # the ranks' shares, gathered after an update
    share = (model + critic + divided) // ranks if full else model + critic + divided // ranks
    return where.baseline + share + max(sum(one.values()) - fewer, whole)


def _driver(recipe: Recipe, shape: ModelShape, rows: Rows, where: Where) -> int:
    """The run's own process, without what others hold and do."""
    cfg, learns = recipe.cluster, memory.trainable(recipe, shape)
    here = memory.plan_memory(recipe, shape, rows, where)
    held, phases = dict(here.held), {name: dict(parts) for name, parts in here.phases.items()}
    if cfg.samplers:
        for name in memory.generator(recipe, shape, rows, where):
            held.pop(name, None)
        phases.pop("sampling", None)
        held.pop("sampler's copy", None)
        copies = 1 + recipe.facts().sampler_copies  # of what is trained: to send, and of steps that wait
        held["weights of the samplers"] = copies * learns * (4 if recipe.model.lora_rank else memory.width_of(recipe))
    if cfg.learners > 1:
        for name in ("float32 masters", "optimizer", "critic"):
            held.pop(name, None)
        phases.pop("training pass", None)
        phases["checkpoint"] = {"master weights and moments": learns * 12}
    return sum(held.values()) + max((sum(parts.values()) for parts in phases.values()), default=0)
