"""The checker of the laws of policy losses: it accepts ours, and names what is wrong with others before step 0."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain as pt
from posttrain import api, config
from posttrain.objectives.laws import LAWS, TRAITS, broken
from posttrain.objectives.policy import POLICY_LOSSES, clip
from posttrain.store.run import Run
from posttrain.types import ConfigError, ResumeError
from tests import tiny

Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, float]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_every_loss_of_the_package_obeys_every_law(name: str) -> None:
    assert broken(POLICY_LOSSES[name], LAWS | TRAITS) == []


def reduced(*given: Any) -> Any:
    loss, clipped = clip(*given)
    return loss.sum(), clipped


def constant(*given: Any) -> Any:
    loss, clipped = clip(*given)
    return loss.detach().requires_grad_(), clipped


def in_place(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, *rest: Any) -> Any:
    advantages.mul_(2)
    return clip(logp, old_logp, advantages, *rest)


def random(logp: torch.Tensor, *rest: Any) -> Any:
    loss, clipped = clip(logp, *rest)
    return loss * torch.rand_like(loss), clipped


def unmasked(logp: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *rest: Any) -> Any:
    return -(logp - old).exp() * advantages, torch.zeros_like(mask)


def by_width(logp: torch.Tensor, *rest: Any) -> Any:
    loss, clipped = clip(logp, *rest)
    return loss / logp.shape[1], clipped


def by_batch(logp: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *rest: Any) -> Any:
    return clip(logp, old, advantages - advantages.mean(), mask, *rest)


def crashing(*given: Any) -> Any:
    raise ZeroDivisionError("oh")


def speechless(*given: Any) -> Any:
    raise AssertionError


def shaped(logp: torch.Tensor, *rest: Any) -> Any:
    raise ValueError(f"rows of {logp.shape[1]} tokens\nand more")


def two_ways(logp: torch.Tensor, *rest: Any) -> Any:
    if logp.shape[1] > 7:
        raise ValueError("too wide")
    if logp.shape[0] == 1:
        raise ValueError("too few")
    return clip(logp, *rest)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "reduced": (reduced, "returns a loss per token: .* a loss of shape \\(\\)"),
    "constant": (constant, "learns: no token has a gradient"),
    "in place": (in_place, "leaves its inputs alone: it changes its input advantages"),
    "random": (random, "is a function of its inputs: the loss changes"),
    "unmasked": (unmasked, "ignores tokens outside the mask: tokens outside the mask have a loss"),
    "by width": (by_width, "does not depend on padding: the loss changes"),
    "by batch": (by_batch, "does not depend on the other rows: the loss changes"),
    "crashing": (crashing, f"{', '.join(LAWS)}: it raises ZeroDivisionError: oh$"),
    "crashing without a word": (speechless, f"{', '.join(LAWS)}: it raises AssertionError$"),
    "crashing with the shape": (shaped, f"{', '.join(LAWS)}: it raises ValueError: rows of 7 tokens$"),
    "crashing in two ways": (two_ways, "does not depend on padding: it raises ValueError: too wide"),
    "of two arguments": (lambda logp, mask: (logp, mask), f"{', '.join(LAWS)}: it raises TypeError: .*takes 2 pos"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_loss_that_breaks_a_law_is_named_with_the_law(name: str) -> None:
    loss, says = WRONG[name]
    found = broken(loss, LAWS)
    assert any(re.match(says, str(fault)) for fault in found), found
    names = [law for fault in found for law in fault.laws]
    assert len(names) == len({*names}) and {*names} <= {*LAWS}  # every law once


GOOD = """
import torch

def mine(logp, old_logp, advantages, mask, low, high):
    '''Twice the unclipped surrogate.'''
    ratio = torch.where(mask, logp - old_logp, 0).exp()
    return torch.where(mask, -2 * ratio * advantages, 0).where(mask, torch.zeros(())), torch.zeros_like(mask)

def summed(logp, old_logp, advantages, mask, low, high):
    return (logp * advantages).sum(), torch.zeros_like(mask)

def importance(logp, old_logp, advantages, mask, low, high):
    ratio = torch.where(mask, logp - old_logp, 0).clamp(-20, 20).exp()
    return -ratio * torch.where(mask, advantages, 0), torch.zeros_like(mask)
"""
SMALL: dict[str, Any] = {"steps": 1, "rollout__max_tokens": 6, "rollout__slots": 32, "prompts": 2, "group_size": 4,
                         "problems": 2, "count": 16, "threads": 1, "lr": 1e-2}  # fmt: skip


def odd(completion: str, **task: Any) -> float:
    return float(len(completion) % 2)


def test_a_run_trains_with_a_loss_from_a_file_after_checking_it(tmp_path: Path) -> None:
    model, file = str(tiny.chatty(tmp_path / "model")), tmp_path / "loss.py"
    file.write_text(GOOD)
    ours = pt.grpo(model, "sums", odd, tmp_path / "ours", policy_loss="importance", **SMALL)
    same = pt.grpo(model, "sums", odd, tmp_path / "same", policy_loss=f"{file}:importance", **SMALL)
    assert ours.summary and same.summary and ours.summary["weights"] == same.summary["weights"]
    mine = pt.grpo(model, "sums", odd, tmp_path / "mine", policy_loss=f"{file}:mine", **SMALL)
    with Run.read(mine.folder) as run:
        notes = [event.message for event in run.events() if event.kind == "data"]
    assert any("its gradient on-policy is not REINFORCE's" in note for note in notes)
    with pytest.raises(ConfigError, match=r"the loss .*:summed breaks \d of 7 laws: returns a loss per token"):
        pt.grpo(model, "sums", odd, tmp_path / "summed", policy_loss=f"{file}:summed", **SMALL)
    assert not (tmp_path / "summed").exists()
    with pytest.raises(ConfigError, match="has no function 'mien'. Did you mean 'mine'"):
        pt.grpo(model, "sums", odd, tmp_path / "none", policy_loss=f"{file}:mien", **SMALL)
    file.write_text(GOOD + "\n# changed\n")
    header = json.loads((same.folder / "run.json").read_text())
    assert "+" in header["data"]
    with pytest.raises(ResumeError, match="have changed since the run started"):
        pt.resume(same.folder, odd, steps=2)


def test_from_python_a_loss_is_named_like_the_option_and_a_function_is_refused_with_the_way(tmp_path: Path) -> None:
    for name in ("loss", "policy_loss", "algo__policy_loss"):
        (tmp_path / f"{name}.py").write_text(GOOD)
        spec = f"{tmp_path / name}.py:mine"
        assert config.resolve("grpo", {}, {name.replace("__", "."): spec}).algo.policy_loss == spec
        with pytest.raises(ConfigError, match="algo.policy_loss is the Python object 'crashing', .*'FILE.py:crashing'"):
            pt.grpo("abacus", "sums", odd, tmp_path / "run", **{name: crashing})
    with pytest.raises(ConfigError, match="reward.name is the Python object 'odd', .* Pass it as reward="):
        pt.grpo("abacus", "sums", out=tmp_path / "run", reward__name=odd)
    with pytest.raises(ConfigError, match="reward is given as a Python object and as reward__name"):
        pt.grpo("abacus", "sums", odd, tmp_path / "run", reward__name="exact")
    with pytest.raises(ConfigError, match="reward.name='sadly' .*is not|unknown reward 'sadly'"):  # not the default
        pt.grpo("abacus", "sums", out=tmp_path / "run", reward__name="sadly")
    with pytest.raises(ConfigError, match="algo.loss is the Python object 'crashing'"):
        api.train("dpo", "abacus", "sums", out=tmp_path / "run", loss=crashing)
    assert not (tmp_path / "run").exists()
