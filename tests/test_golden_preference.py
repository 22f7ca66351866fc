"""Values worked by hand or published elsewhere, and their gradients, against every file in tests/golden/preference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.objectives import preference, reward

FOLDER = Path(__file__).parent / "golden" / "preference"
Inputs = dict[str, Any]


def called(function: Callable[..., Any]) -> Callable[[Inputs], torch.Tensor]:
    return lambda inputs: function(**inputs)


# file → the function whose value and gradient it states; inputs are its arguments, by name
CALLS: dict[str, Callable[[Inputs], torch.Tensor]] = {
    **{name: called(loss) for name, loss in preference.PAIR_LOSSES.items()},
    "sequence_logp": called(preference.sequence_logp),
    "implicit_rewards": lambda i: torch.stack(preference.implicit_rewards(**i)),
    "kto": lambda i: preference.kto(**{**i, "kl_baseline": torch.tensor(i["kl_baseline"])}),
    "kto_baseline": called(preference.kto_baseline),
    "bradley_terry": called(reward.bradley_terry),
    "centring": called(reward.centring),
    "binary": called(reward.binary),
    "aggregate_steps": called(reward.aggregate_steps),
    "ensemble": called(reward.ensemble),
    "expected_calibration_error": lambda i: reward.expected_calibration_error(**i).error,
}


def contents() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def cases() -> list[Any]:
    return [
        pytest.param(file, content["with_respect_to"], case, id=f"{file}: {case['title']}")
        for file, content in contents().items()
        for case in content["cases"]
    ]


def as_tensor(value: Any, dtype: torch.dtype) -> torch.Tensor:
    """Booleans stay booleans, numbers become `dtype`, null becomes NaN."""
    array = np.array(value)
    return torch.tensor(array) if array.dtype == bool else torch.tensor(array.astype(float), dtype=dtype)


def test_every_function_has_a_file_and_every_case_says_where_it_is_from() -> None:
    assert contents().keys() == CALLS.keys()
    for content in contents().values():
        for case in content["cases"]:
            assert case["source"] and case["title"] and case["gradient"].keys() == set(content["with_respect_to"])


def test_every_function_has_a_case_that_was_worked_by_hand() -> None:
    for file, content in contents().items():
        assert file == "implicit_rewards" or any(case["source"] == "by hand" for case in content["cases"]), file


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize(("file", "wrt", "case"), cases())
def test_value_and_gradient_are_the_stated_ones(
    file: str, wrt: list[str], case: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = {name: as_tensor(v, dtype) if isinstance(v, list) else v for name, v in case["inputs"].items()}
    leaves = [inputs[name].requires_grad_() for name in wrt]
    value = CALLS[file](inputs)
    stated = as_tensor(case["value"], torch.float64)
    torch.testing.assert_close(value.double(), stated, rtol=tolerance, atol=tolerance, equal_nan=True)
    summed = value.sum()
    gradients = (
        torch.autograd.grad(summed, leaves)
        if summed.requires_grad
        else [torch.zeros_like(leaf) for leaf in leaves]  # detached on purpose: the file then states zeros
    )
    for name, gradient in zip(wrt, gradients, strict=True):
        expected = as_tensor(case["gradient"][name], torch.float64)
        exists = ~expected.isnan()  # null: at a kink, where there is no derivative to state
        torch.testing.assert_close(gradient.double()[exists], expected[exists], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("file", "wrt", "case"), [c for c in cases() if "published" in c.values[2]])
def test_the_value_is_the_published_one_to_the_published_digits(
    file: str, wrt: list[str], case: dict[str, Any]
) -> None:
    np.testing.assert_allclose(case["value"], case["published"], rtol=0, atol=0.51 * 10.0 ** -case["published_digits"])
