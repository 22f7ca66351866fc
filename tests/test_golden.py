"""Values other projects publish, and their gradients, against every file in tests/golden."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.objectives import advantages, policy, tokens, values

FOLDER = Path(__file__).parent / "golden"
Inputs = dict[str, Any]


def policy_loss(name: str) -> Callable[[Inputs], torch.Tensor]:
    """The loss of that name; inputs beyond the shared six are its own constants."""
    return lambda i: getattr(policy, name)(**i)[0]


def call(function: Callable[..., Any]) -> Callable[[Inputs], torch.Tensor]:
    """A function whose parameters are the file's inputs."""
    return lambda i: function(**i)


def gae(i: Inputs) -> torch.Tensor:
    both = values.gae(i["rewards"], i["values"], i["mask"], i["gamma"], i["lam"])
    return both[("advantages", "returns").index(i["of"])]


def gdpo(i: Inputs) -> torch.Tensor:
    components = [advantages.group_relative(component, "sample") for component in i["rewards"]]
    return advantages.batch_relative(torch.stack(components).sum(0))


def cross_entropy(i: Inputs) -> torch.Tensor:
    advantage = torch.full_like(i["logp"], i["advantage"])
    loss, _ = policy.reinforce(i["logp"], i["logp"].detach(), advantage, i["mask"], 0, 0)
    return (tokens.token_weights(i["mask"], i["how"]) * loss).sum()


# file → the function whose value and gradient it states
CALLS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    **{
        name: policy_loss(name)
        for name in ("reinforce", "importance", "clip", "dual_clip", "gspo", "gspo_token", "cispo", "sapo")
    },
    "is_correction": call(policy.is_correction),
    "kl_k1": call(tokens.kl_k1),
    "kl_k2": call(tokens.kl_k2),
    "kl_k3": call(tokens.kl_k3),
    "kl_k3_plus": call(tokens.kl_k3_plus),
    "group_relative": call(advantages.group_relative),
    "leave_one_out": call(advantages.leave_one_out),
    "max_rl": call(advantages.max_rl),
    "batch_relative": call(advantages.batch_relative),
    "minus_baseline": call(advantages.minus_baseline),
    "gdpo": gdpo,
    "overlong_penalty": call(advantages.overlong_penalty),
    "returns_to_go": call(advantages.returns_to_go),
    "gae": gae,
    "token_rewards": call(values.token_rewards),
    "value_loss": lambda i: values.value_loss(**i)[0],
    "adaptive_kl": call(values.adaptive_kl),
    "whiten": call(tokens.whiten),
    "masked_var": call(tokens.masked_var),
    "token_weights": lambda i: (tokens.token_weights(i["mask"], i["how"], i["max_len"]) * i["losses"]).sum(),
    "cross_entropy": cross_entropy,
    "masked_mean": lambda i: torch.stack(
        [tokens.masked_mean(v, m) for v, m in zip(i["values"], i["mask"], strict=True)]
    ),
}
# advantages of a group sum to 0, so a gradient of their sum would say nothing: theirs is of each row's first entry
OF_THE_FIRST = {"group_relative", "leave_one_out", "max_rl", "batch_relative", "gdpo", "minus_baseline", "whiten"}


def cases() -> list[Any]:
    out: list[Any] = []
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for case in content["cases"]:
            name = f"{path.stem}: {case['title']}"
            out.append(pytest.param(path.stem, content["with_respect_to"], case, id=name))
    return out


def as_tensors(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Lists become tensors: bool where they hold booleans, else `dtype`, with NaN for null."""
    out: Inputs = {}
    for name, value in inputs.items():
        if not isinstance(value, list):
            out[name] = value
            continue
        array = np.array(value)
        out[name] = torch.tensor(array) if array.dtype == bool else torch.tensor(array.astype(float), dtype=dtype)
    return out


def test_every_file_is_read_and_says_where_each_case_is_from() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == CALLS.keys()
    for path in FOLDER.glob("*.json"):
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            assert case["source"] and case["title"] and "gradient" in case


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize(("file", "wrt", "case"), cases())
def test_value_and_gradient_are_the_stated_ones(
    file: str, wrt: str, case: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    if file in ("token_weights", "cross_entropy"):
        tolerance = max(tolerance, 1e-7)  # weights are float32, as in a Batch
    inputs = as_tensors(case["inputs"], dtype)
    leaf = inputs[wrt].requires_grad_()
    value = CALLS[file](inputs)
    stated = (torch.tensor(case[name], dtype=torch.float64) for name in ("value", "gradient"))
    torch.testing.assert_close(value.double(), next(stated), rtol=tolerance, atol=tolerance)
    summed = value[:, 0].sum() if file in OF_THE_FIRST else value.sum()
    gradient = torch.autograd.grad(summed, leaf)[0] if summed.requires_grad else torch.zeros_like(leaf)
    torch.testing.assert_close(gradient.double(), next(stated), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("file", "wrt", "case"), [c for c in cases() if "published" in c.values[2]])
def test_the_value_is_the_published_one_to_the_published_digits(file: str, wrt: str, case: dict[str, Any]) -> None:
    np.testing.assert_allclose(case["value"], case["published"], rtol=0, atol=0.51 * 10.0 ** -case["published_digits"])
