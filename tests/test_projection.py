"""Log-probabilities and entropies in chunks, and their closed-form gradient, are autograd's over all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from posttrain.objectives.tokens import select
from posttrain.train.projection import log_probabilities

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, dtype: torch.dtype, rows: int, bias: bool, with_entropy: bool
) -> None:
    if not compiled:
        monkeypatch.setattr("posttrain.models.kernels.takes", lambda logits: False)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias).to(dtype)
    hidden = torch.randn(40, 16).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, 50, (40,)), torch.randn(2, 40)

    def results(logp: torch.Tensor, entropy: torch.Tensor) -> list[torch.Tensor]:
        loss = (weights[0] * logp).sum() + ((weights[1] * entropy).sum() if with_entropy else 0)
        grads = torch.autograd.grad(loss, [hidden, *head.parameters()])
        return [logp.detach(), entropy.detach(), *grads]

    ours = results(*log_probabilities(head, hidden, targets, 0.7, rows))
    theirs = results(*select(head(hidden), targets, 0.7))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype] * float(b.abs().max()))


def test_a_frozen_output_layer_gets_no_gradient_and_its_input_does() -> None:
    head = nn.Linear(8, 20).requires_grad_(False)
    hidden = torch.randn(5, 8, requires_grad=True)
    logp, entropy = log_probabilities(head, hidden, torch.arange(5), 1.0, 2)
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.any() and head.weight.grad is None
