"""Gradients added in lanes: the order of the sum is written down, so it does not depend on who computes which part."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import posttrain as pt
from posttrain import api, config
from posttrain.config import TrainConfig
from posttrain.data import batching
from posttrain.models.policy import Policy
from posttrain.train import lanes
from posttrain.train.forward import token_stats
from posttrain.train.lane_learner import LaneLearner
from posttrain.train.learner import make_learner
from posttrain.train.learners.local import LocalLearner
from posttrain.train.ranks import shares
from posttrain.train.update import backward
from posttrain.types import ConfigError, ResumeError, TrainingDiverged
from tests import tiny
from tests.test_learner import loss, samples_for, snapshot

LANES = [1, 2, 4, 8]
CFG = TrainConfig(lr=1e-2, weight_decay=0.1, lanes=4)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def policy(folder: Path) -> Policy:
    return tiny.load(folder)


def vectors(count: int, seed: int) -> list[torch.Tensor]:
    """Vectors whose sum in float32 depends on the order."""
    draw = np.random.default_rng(seed)
    return [torch.from_numpy((draw.normal(size=64) * 10.0 ** draw.integers(-4, 5, 64)).astype(np.float32))
            for _ in range(count)]  # fmt: skip


def by_definition(parts: list[torch.Tensor], low: int, high: int) -> torch.Tensor:
    """The sum of the leaves low … high − 1 of the tree, with zeros for those that are not there."""
    if high - low == 1:
        return parts[low] if low < len(parts) else torch.zeros_like(parts[0])
    middle = (low + high) // 2
    return by_definition(parts, low, middle) + by_definition(parts, middle, high)


def tree(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one tensor by `lanes.Tree`."""
    adding = lanes.Tree()
    for part in parts:
        adding.add(part)
    total = adding.sum()
    assert total is not None
    return total


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# --- the order ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 16), st.integers(0, 99))
def test_a_tree_is_the_balanced_sum_over_numbers_and_missing_leaves_are_zeros(count: int, seed: int) -> None:
    parts = vectors(count, seed)
    assert same_bits(tree(part.clone() for part in parts), by_definition(parts, 0, 16))


def test_another_order_gives_other_bits() -> None:
    parts = vectors(8, 0)
    ahead = parts[0].clone()
    for part in parts[1:]:
        ahead += part
    assert not same_bits(tree(part.clone() for part in parts), ahead)


@given(st.sampled_from(LANES), st.integers(1, 30), st.integers(0, 99), st.data())
def test_any_number_of_processes_that_own_whole_subtrees_gives_the_same_bits(
    count: int, passes: int, seed: int, data: st.DataObject
) -> None:
    made = vectors(passes, seed)
    ranks = data.draw(st.sampled_from([r for r in LANES if r <= count]))

    def lane(numbers: list[int]) -> torch.Tensor:
        total = torch.zeros(64)
        for number in numbers:
            total += made[number]
        return total

    order = lanes.order(passes, count)
    assert sorted(number for numbers in order for number in numbers) == list(range(passes))
    own = count // ranks
    of_rank = [tree(lane(numbers) for numbers in order[r * own : (r + 1) * own]) for r in range(ranks)]
    assert same_bits(tree(of_rank), tree(lane(numbers) for numbers in order if numbers))


@given(st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=6), st.sampled_from(LANES))
def test_a_layout_holds_every_tensor_once_and_its_chunks_hold_every_element_once(
    shapes: list[list[int]], count: int
) -> None:
    named = {f"t{i}": torch.Size(shape) for i, shape in enumerate(shapes)}
    layout = lanes.Layout(named, count)
    tensors = {name: torch.randn(shape) for name, shape in named.items()}
    flat = layout.flat(tensors, "cpu")
    assert layout.size == len(flat) and int((flat != 0).sum()) == sum(t.numel() for t in tensors.values())
    assert all(torch.equal(view, tensors[name]) for name, view in layout.views(flat).items())
    for region, (start, end) in enumerate(layout.regions):
        assert (end - start) % (layout.chunks * lanes.ALIGNED) == 0
        assert layout.chunk_of(region) * layout.chunks == end - start
    for ranks in (n for n in LANES if n <= count):
        owned = sorted(span for rank in range(ranks) for span in shares(layout, rank, ranks) if span[0] < span[1])
        assert torch.equal(torch.cat([flat[start:end] for start, end in owned]), flat)
    for name, place in layout.places.items():
        assert (place.start < layout.matrices) == (len(named[name]) >= 2)


@pytest.mark.parametrize("wrong", [0, -1, 3, 12])
def test_lanes_are_a_power_of_two(wrong: int) -> None:
    with pytest.raises(ConfigError, match=rf"train.lanes={wrong} is not a power of two. Use 1, 2, 4"):
        config.resolve("sft", {}, {"train.lanes": wrong})
    with pytest.raises(ValueError, match="not a power of two"):
        lanes.Layout({}, wrong)


# --- the learner -------------------------------------------------------------------------------------------------


def learner(policy: Policy, cfg: TrainConfig = CFG) -> LaneLearner:
    return LaneLearner(policy, cfg, 10, 1.0, token_stats)


def test_processes_that_compute_their_own_lanes_have_the_bits_of_one(folder: Path) -> None:
    policy = tiny.load(folder)
    batches = batching.micro(samples_for(policy, 12), 24, "token-mean")
    assert len(batches) >= 7
    one = learner(policy)
    one.forward_backward(batches, loss)
    assert one.gradient is not None
    for ranks in (1, 2, 4):
        halves: list[torch.Tensor] = []
        for rank in range(ranks):
            mine = tiny.load(folder)  # weights of its own, as in a process of its own
            own = learner(mine)
            of_lanes: list[torch.Tensor] = []
            for numbers in lanes.order(len(batches), 4)[rank * 4 // ranks : (rank + 1) * 4 // ranks]:
                total = torch.zeros(own.layout.size)
                for number in reversed(range(len(batches))):  # other micro-batches in between leave no trace
                    if number not in numbers:
                        backward(mine, batches[number], loss, token_stats, 1.0, 1)
                        mine.model.zero_grad(set_to_none=True)
                for number in numbers:
                    backward(mine, batches[number], loss, token_stats, 1.0, 1)
                    own._add_gradients(total)  # pyright: ignore[reportPrivateUsage]
                of_lanes.append(total)
            halves.append(tree(of_lanes))
        assert same_bits(tree(halves), torch.cat(one.gradient)), ranks


@pytest.mark.parametrize("count", LANES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_in_lanes_is_that_without_to_rounding(folder: Path, count: int, dtype: Any) -> None:
    plain, cut = tiny.load(folder, dtype=dtype), tiny.load(folder, dtype=dtype)
    batches = batching.micro(samples_for(plain, 12), 64, "token-mean")
    one = LocalLearner(plain, replace(CFG, lanes=1), 10)
    several = learner(cut, replace(CFG, lanes=count))
    for _ in range(3):
        a = one.forward_backward(batches, loss)
        b = several.forward_backward(batches, loss)
        assert [s["loss"].total for s in a] == pytest.approx([s["loss"].total for s in b], abs=1e-4)
        first, second = one.step(), several.step()
        assert first["lr"] == second["lr"]
        assert first["grad_norm"].value == pytest.approx(second["grad_norm"].value, rel=1e-4)
    for name, tensor in one.state()[0]["model"].items():
        torch.testing.assert_close(several.state()[0]["model"][name], tensor, rtol=0, atol=2e-4)


def test_two_calls_before_a_step_are_added_in_order(policy: Policy) -> None:
    batches = batching.micro(samples_for(policy, 12), 64, "token-mean")
    apart = []
    for part in (batches, batches[:2]):
        one = learner(policy)
        one.forward_backward(part, loss)
        apart.append(torch.cat(one.gradient or []))
    both = learner(policy)
    both.forward_backward(batches, loss)
    both.forward_backward([], loss)
    both.forward_backward(batches[:2], loss)
    assert both.gradient is not None and same_bits(torch.cat(both.gradient), apart[0] + apart[1])


def test_what_a_loss_draws_depends_on_the_micro_batch_and_not_on_the_order_of_passes(policy: Policy) -> None:
    batches = batching.micro(samples_for(policy, 24), 48, "token-mean")

    def drawn(count: int) -> list[float]:
        torch.manual_seed(7)
        noisy = lambda logp, entropy, b: (loss(logp, entropy, b)[0] * 0 + torch.rand(()), {})
        stats = learner(policy, replace(CFG, lanes=count)).forward_backward(batches, noisy)
        return [stat["loss"].total for stat in stats] + [float(torch.rand(()))]

    assert drawn(2) == drawn(8) and len(set(drawn(2))) == len(batches) + 1


def test_a_restored_learner_continues_to_the_same_bits_with_or_without_lanes(folder: Path) -> None:
    def trained(one: Any, steps: int) -> Any:
        for step in range(steps):
            one.forward_backward(batching.micro(samples_for(one.policy, 12, step), 64, "token-mean"), loss)
            one.step()
        return one

    whole, begun = learner(tiny.load(folder)), learner(tiny.load(folder))
    for one in (whole, begun):
        trained(one, 2)
    kept, small = snapshot(begun)  # type: ignore[arg-type]
    again = learner(tiny.load(folder))
    again.load(kept, small)
    for one in (whole, again):
        trained(one, 2)
    for kind, tensors in snapshot(whole)[0].items():  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            assert torch.equal(tensor, again.state()[0][kind][name]), name
    plain = LocalLearner(tiny.load(folder), replace(CFG, lanes=1), 10)
    plain.load(kept, small)  # the same names and shapes
    back = learner(tiny.load(folder))
    back.load(*copy.deepcopy(plain.state()))
    assert all(torch.equal(t, kept["optim"][name]) for name, t in back.state()[0]["optim"].items())
    fresh = learner(tiny.load(folder))
    fresh.load(*LocalLearner(tiny.load(folder), CFG, 10).state())  # before the first update there are no moments
    assert fresh.steps == 0 and not any(part.any() for parts in fresh.moments.values() for part in parts)
    with pytest.raises(ResumeError, match="does not fit the model"):
        fresh.load({"model": {}, "optim": {}}, small)


def test_only_the_named_parameters_get_a_gradient_and_bad_ones_are_refused(policy: Policy) -> None:
    one = learner(policy, replace(CFG, weight_decay=0.0))
    batches = batching.micro(samples_for(policy, 6), 64, "token-mean")
    before = {name: tensor.clone() for name, tensor in one.weights().items()}
    one.forward_backward(batches, loss)
    name = next(iter(before))
    one.step(only=name)
    assert [n for n, tensor in one.weights().items() if not torch.equal(tensor, before[n])] == [name]
    one.forward_backward(batches, loss)
    assert one.gradient is not None
    one.gradient[0][0] = float("nan")
    with pytest.raises(TrainingDiverged, match="gradient norm of update 2 is nan"):
        one.step()


def test_the_setting_chooses_the_learner(policy: Policy) -> None:
    assert isinstance(make_learner(policy, CFG, 10), LaneLearner)
    assert isinstance(make_learner(policy, replace(CFG, lanes=1), 10), LocalLearner)


@pytest.mark.parametrize("name", ["grpo", "ppo", "sft", "dpo"])
def test_a_run_in_lanes_that_is_resumed_ends_in_the_same_weights(name: str, tmp_path: Path) -> None:
    odd = None if name in ("sft", "dpo") else lambda completion, **task: float(len(completion) % 2)
    pairs = [{"prompt": f"{i}?", "chosen": f"{i * i}", "rejected": f"{i + 3}"} for i in range(24)]
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, answers if name == "sft" else pairs)) + "\n")
    settings: dict[str, Any] = {
        "model.path": str(tiny.chatty(tmp_path / "model")), "train.threads": 1, "train.lanes": 4,
        "train.micro_batch_tokens": 48, "run.checkpoint_every": 1,
    }  # fmt: skip
    if odd:
        settings |= {"rollout.max_tokens": 6, "rollout.slots": 32, "algo.prompts": 4, "eval.problems": 2,
                     "data.tasks": "sums", "data.count": 16}  # fmt: skip
        settings |= {"algo.group_size": 4} if name == "grpo" else {}
    else:
        settings |= {"data.tasks": str(rows), "data.holdout": 0}

    def run(out: str, steps: int) -> Any:
        given = settings | {"run.out": str(tmp_path / out), "train.steps": steps}
        return api.start(name, config.resolve(name, {}, given), reward=odd)

    whole = run("whole", 2)
    run("again", 1)
    resumed = pt.resume(tmp_path / "again", reward=odd, steps=2)
    assert whole.summary and resumed.summary and resumed.summary["weights"] == whole.summary["weights"]
