"""Opens any model that commands accept: a folder, a hub id, a run or one of its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from posttrain import config, rng
from posttrain.models import heads, weights
from posttrain.models.load import Policy, load_policy, load_weights
from posttrain.store.listing import run_of


def open_policy(path: str, cfg: config.ModelConfig | None = None, on: torch.device | str = "cpu") -> Policy:
    """Loads a model from a folder, hub id, `abacus`, a PEFT adapter, a run or one of its checkpoints.

    A run stands for its newest checkpoint, finished or not, or for its best one if it kept that (`run.keep_best`).
    """
    run = run_of(path)
    if run is None:
        return load_policy(replace(cfg or config.ModelConfig(), path=path), on)
    recipe, saved = weights.recipe_of(run), weights.chosen(run, Path(path))
    if saved is None:  # finished, and its checkpoints were removed; or no checkpoint yet
        return load_policy(replace(recipe.model, path=path, lora_rank=0, continue_adapter=False), on)
    rng.seed_global(recipe.run.seed, "init")
    policy = load_policy(recipe.model, on)
    tensors = weights.load_checkpoint(saved)
    if (head := tensors.get("scalar.weight")) is not None:
        heads.attach_scalar(policy, len(head))
        if recipe.facts().trains == "scorer":
            heads.as_critic(policy)
    load_weights(policy, tensors)
    return policy
