"""Checks a cluster for `posttrain doctor --cluster`: starts workers of each kind and asks about their machines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from posttrain.cluster.actors import WorkerDied, call
from posttrain.cluster.launch import BACKENDS, Cluster
from posttrain.cluster.worker import versions
from posttrain.config import GRPORecipe
from posttrain.models.load import load_policy
from posttrain.rollout.tasks import make_verifier
from posttrain.train.device import resolve, set_threads
from posttrain.types import PosttrainError

Finding = tuple[str, str, bool | None]  # what, what was found, whether it is as it should be


def check(recipe: GRPORecipe) -> list[Finding]:
    """Starts the learners, samplers and judges of `[cluster]`, at least 2, 1 and 1; one finding for each.

    With Ray, every node is asked, too. Raises ConfigError if the cluster cannot be used.
    """
    own = recipe.cluster
    asked = replace(own, learners=max(2, own.learners), samplers=max(1, own.samplers), judges=max(1, own.judges))
    recipe = replace(recipe, cluster=asked)
    set_threads(recipe.train.threads)
    began = time.monotonic()
    with Cluster(recipe) as cluster:
        findings: list[Finding] = [
            ("the run's process", f"{_text(versions())}, threads {torch.get_num_threads()}", None)
        ]
        if asked.backend == "ray":
            findings += _nodes(asked.timeout)
        cluster.generator(load_policy(recipe.model, resolve(recipe.train.device)), recipe.rollout)
        cluster.verifier(make_verifier(recipe, None)[0])
        try:
            cluster.start_ranks()
        except (WorkerDied, PosttrainError) as error:
            findings.append(("learners", str(error), False))
        actors = [actor for _, actor, _ in cluster.record.workers]
        answers = [_said(call(actor, "about"), asked.timeout) for actor in actors]
        for (said, ok), row in zip(answers, cluster.record.as_dict()["workers"], strict=True):
            took = f", started in {row['ready'] - row['started']:.1f} s" if row["ready"] else ""
            findings.append((row["name"], f"{row['where']}{took}: {said}", ok))
    return [*findings, ("time", f"{time.monotonic() - began:.1f} s", None)]


def _nodes(timeout: float) -> list[Finding]:
    """Every node of the Ray cluster with its resources and versions."""
    backend = import_module(BACKENDS["ray"])
    findings: list[Finding] = []
    for node in backend.nodes():
        name = f"node {node['NodeManagerAddress']}"
        if not node["Alive"]:
            findings.append((name, f"dead: {node['DeathReasonMessage'] or 'Ray does not say why'}", False))
            continue
        there = node["Resources"]
        has = f"{there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs, {there.get('memory', 0) / 2**30:.0f} GiB"
        actor = backend.RayActor(name, "builtins:object", (), node["NodeID"])
        said, ok = _said(call(actor, "about"), timeout)
        actor.kill("the check has ended")
        findings.append((name, f"alive, {has}: {said}", ok))
    return findings


def _said(answer: Future[Any], timeout: float) -> tuple[str, bool]:
    """A worker's answer to `about`, and whether it has the versions of the run's process; or why there is none."""
    try:
        found, threads, tiers = answer.result(timeout)
    except (WorkerDied, PosttrainError) as error:
        return str(error), False
    except TooLate:
        return f"no answer within {timeout:g} s", False
    works = [name for name, ok in tiers.items() if ok]
    text = f"{_text(found)}, threads {threads}, sandbox: {', '.join(works) or 'none works'}"
    other = [name for name, own in versions().items() if found[name] != own]
    return text + (f"; differs from the run's process: {', '.join(other)}" if other else ""), not other


def _text(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
