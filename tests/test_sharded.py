"""Sharded learners: every number of processes has one process's gradient, updates, errors and checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from bench import zoo
from posttrain.cluster import sharded
from posttrain.cluster.sharded import ShardedLearner, layers_of
from posttrain.config import RECIPES, TrainConfig
from posttrain.models import decoder
from posttrain.models.policy import Policy
from posttrain.types import ConfigError, ResumeError
from tests import tiny
from tests.sharded_cases import BRIEF, CASES, RANKS, SETTINGS, load

WHOLE = os.environ.get("POSTTRAIN_CLUSTER_TESTS") == "1"
"""Set by `make test-cluster`: all losses and numbers of processes, variants, and a dozen architectures."""
MODELS: dict[str, list[int]] = {"abacus": [], "phi": [2]}
if WHOLE:
    MODELS = {"abacus": [1, 2, 4], "phi": [1, 2, 4], **{f"phi, {variant}": [2] for variant in SETTINGS},
              **{name: [] for name in zoo.DOZEN if name != "phi"}}  # fmt: skip
TRAINED = [name for name, every in MODELS.items() if every]
Found = dict[int, list[dict[str, Any]]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What tests/sharded_cases.py found, by number of processes, from every rank."""
    command = [sys.executable, "-m", "tests.sharded_cases", str(folder), json.dumps(MODELS)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        ranks: [json.loads((folder / f"found-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
        for ranks in RANKS
    }


def test_every_algorithm_has_a_case() -> None:
    assert CASES.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", [name for name in MODELS if "bfloat16" not in name])
def test_a_gradient_is_that_of_one_process(found: Found, name: str) -> None:
    for ranks in RANKS:
        differences = found[ranks][0][name]["gradients"]
        fused = differences.pop("fused")
        assert {case.split()[0] for case in differences} == set(CASES if MODELS[name] else BRIEF)
        for case, difference in differences.items():
            assert difference <= 1e-6, (ranks, case)
        assert fused <= 5e-6
    largest = max(found[4][0][name]["gradients"].values())
    assert largest > 0, "in float32 the order of a sum is seen"


@pytest.mark.parametrize("name", TRAINED)
def test_three_updates_are_those_of_one_process(found: Found, name: str) -> None:
    low = "bfloat16" in name
    for ranks in RANKS:
        got = found[ranks][0][name]["updates"]
        assert got["order"] and got["stats"], "the stats of all micro-batches, in order"
        for ours, theirs in got["norms"]:
            assert ours == pytest.approx(theirs, rel=0.05 if low else 1e-4)
        assert got["moved"] > 0.01, "log-probabilities after the updates are not those before"
        assert got["logp"] <= (0.5 if low else 1e-3) and got["scores"] <= (0.5 if low else 1e-3)
        assert got["weights"] <= (5e-3 if low else 5e-4)


@pytest.mark.parametrize("name", TRAINED)
def test_an_error_of_one_rank_is_raised_by_all_and_the_next_update_works(found: Found, name: str) -> None:
    for ranks in RANKS:
        for rank in found[ranks]:
            diverged, failed, finite = rank[name]["failures"]
            assert diverged.startswith("TrainingDiverged: the loss of update 4 is nan")
            assert failed == 'KeyError: "a loss of the user\'s"' and finite == "True"


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_does_not_know_the_number_of_processes(found: Found, folder: Path, name: str) -> None:
    assert all(rank[name]["resumed"] for ranks in RANKS for rank in found[ranks])
    stored = [load(folder / f"{name}-{ranks}") for ranks in (0, *RANKS)]  # 0: the learner of one process
    tensors, small = stored[0]
    for others, numbers in stored[1:]:
        assert numbers == small
        for kind, named in tensors.items():
            assert named.keys() == others[kind].keys()
            assert all(t.dtype == others[kind][n].dtype and torch.equal(t, others[kind][n]) for n, t in named.items())


@pytest.mark.parametrize("name", [name for name in MODELS if "lora" in name])
def test_a_model_without_its_adapters_is_the_reference(found: Found, name: str) -> None:
    assert all(found[ranks][0][name]["base"] <= (0.1 if "bfloat16" in name else 1e-4) for ranks in RANKS)


# --- in this process ---------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return tiny.load(tiny.make(tmp_path))


def test_lanes_are_refused(policy: Policy, group: None) -> None:
    with pytest.raises(ConfigError, match=r"train.lanes=4 fixes the order .* Set train.lanes = 1"):
        ShardedLearner(policy, TrainConfig(lanes=4), 1)


def test_a_model_whose_layers_share_weights_is_refused(policy: Policy, group: None) -> None:
    first, second = layers_of(policy)
    second.mlp = first.mlp
    with pytest.raises(ConfigError, match="cannot be sharded: its layers share weights"):
        ShardedLearner(policy, TrainConfig(), 1)


def test_a_layer_with_weights_in_two_precisions_is_refused(policy: Policy, group: None) -> None:
    layers_of(policy)[1].mlp.bfloat16()  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="cannot be sharded: a layer has weights in bfloat16, float32"):
        ShardedLearner(policy, TrainConfig(), 1)


def test_a_checkpoint_of_another_model_is_refused(policy: Policy, group: None) -> None:
    learner = ShardedLearner(policy, TrainConfig(), 1)
    tensors, small = learner.state()
    tensors["model"].popitem()
    with pytest.raises(ResumeError, match="does not fit the model"):
        learner.load(tensors, small)


def test_no_pass_and_nothing_to_judge_make_no_collective(policy: Policy, group: None) -> None:
    learner = ShardedLearner(policy, TrainConfig(), 1)
    assert learner.forward_backward([], lambda *_: pytest.fail("no loss is computed")) == []
    assert learner.logprobs([]) == []


def test_an_error_that_cannot_be_sent_to_another_process_is_sent_as_text() -> None:
    class Odd(Exception):
        pass

    found = sharded._portable(Odd("why"))  # pyright: ignore[reportPrivateUsage]
    assert type(found) is RuntimeError and str(found) == "Odd: why"
    same = sharded._portable(ValueError("why"))  # pyright: ignore[reportPrivateUsage]
    assert type(same) is ValueError and str(same) == "why"


def test_the_fused_pass_looks_at_every_layer(policy: Policy) -> None:
    """Within a sharded pass the embedding is a plain tensor and a layer's weights are not."""
    fits = decoder.fits(policy.body)
    layers_of(policy)[1].input_layernorm.bfloat16()  # type: ignore[union-attr]
    assert fits and not decoder.fits(policy.body)


def test_only_a_parameter_whose_name_is_given_gets_a_gradient(policy: Policy, group: None) -> None:
    learner = ShardedLearner(policy, replace(TrainConfig(), lr=1e-2, weight_decay=0.0), 1)
    before = learner.weights()
    for parameter in learner.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    name = next(iter(before))
    learner.step(only=name)
    assert [n for n, tensor in learner.weights().items() if not torch.equal(tensor, before[n])] == [name]
