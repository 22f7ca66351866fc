"""Laws of policy losses, checked by computing: for the losses of this package and for those that a user brings.

A loss `loss(logp, old_logp, advantages, mask, low, high) -> (loss (B, T), clipped (B, T) bool)` that breaks a law of
`LAWS` would train something else than it says: its result would depend on padding, on the micro-batches or on tokens
that are not trained. `TRAITS` hold for every loss of this package, but a loss without them may be meant so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from posttrain.objectives.policy import PolicyLoss

LOW, HIGH = 0.2, 0.28
TOLERANCE = 1e-5
POISON = (float("nan"), float("inf"), -1e4)
SEEDS = range(5)


@dataclass(frozen=True)
class Rows:
    """A ragged batch, each (B, T): log-probabilities, advantages and the mask; column 0 is never trained."""

    logp: torch.Tensor
    old_logp: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
        """The same change applied to every tensor."""
        return Rows(*(change(tensor) for tensor in vars(self).values()))


def ragged(seed: int, rows: int = 5, length: int = 7) -> Rows:
    """Random rows of random lengths with gaps; one advantage per row; the last row has no trained token."""
    draw = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, length, generator=draw) * 3
    old_logp = logp + 0.3 * torch.randn(rows, length, generator=draw)
    advantages = torch.randn(rows, 1, generator=draw).expand(rows, length).contiguous()
    lengths = torch.randint(2, length + 1, (rows, 1), generator=draw)
    mask = (torch.arange(length) < lengths) & (torch.rand(rows, length, generator=draw) < 0.8)
    mask[:, 0], mask[:, 1], mask[-1] = False, True, False
    return Rows(logp, old_logp, advantages, mask)


def value_and_gradient(loss: PolicyLoss, b: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The per-token loss, which tokens were clipped, and the gradient of the sum with respect to logp, each (B, T)."""
    leaf = b.logp.clone().requires_grad_()
    value, clipped = loss(leaf, b.old_logp, b.advantages, b.mask, LOW, HIGH)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    return value.detach(), clipped, torch.zeros_like(leaf) if gradient is None else gradient  # pyright: ignore[reportUnnecessaryComparison]


def _shapes(loss: PolicyLoss, b: Rows) -> str:
    value, clipped, gradient = value_and_gradient(loss, b)
    if value.shape != b.mask.shape or clipped.shape != b.mask.shape or clipped.dtype != torch.bool:
        return (
            f"for inputs of shape {tuple(b.mask.shape)} it returned a loss of shape {tuple(value.shape)} and clipped "
            f"of shape {tuple(clipped.shape)} and type {clipped.dtype}; both must be (B, T), and clipped bool"
        )
    return "" if torch.isfinite(value).all() and torch.isfinite(gradient).all() else "loss or gradient is not finite"


def _learns(loss: PolicyLoss, b: Rows) -> str:
    return "" if value_and_gradient(loss, b)[2].any() else "no token has a gradient with respect to logp"


def _inputs(loss: PolicyLoss, b: Rows) -> str:
    given = b.map(torch.clone)
    value_and_gradient(loss, given)
    changed = [name for name, tensor in vars(given).items() if not torch.equal(tensor, vars(b)[name])]
    return f"it changes its input {changed[0]}" if changed else ""


def _repeatable(loss: PolicyLoss, b: Rows) -> str:
    return _differs(value_and_gradient(loss, b), value_and_gradient(loss, b), 0.0)


def _mask(loss: PolicyLoss, b: Rows) -> str:
    value, clipped, gradient = value_and_gradient(loss, b)
    if value[~b.mask].any() or clipped[~b.mask].any() or gradient[~b.mask].any():
        return "tokens outside the mask have a loss, a gradient or are marked as clipped; all must be 0 there"
    for poison in POISON:
        logp, old_logp, advantages = (torch.where(b.mask, t, poison) for t in (b.logp, b.old_logp, b.advantages))
        hidden = Rows(logp, old_logp, advantages, b.mask)
        if says := _differs((value, clipped, gradient), value_and_gradient(loss, hidden)):
            return f"with {poison} at tokens outside the mask {says}"
    return ""


def _padding(loss: PolicyLoss, b: Rows) -> str:
    wide = value_and_gradient(loss, b.map(lambda t: torch.nn.functional.pad(t, (0, 3))))
    return _differs(value_and_gradient(loss, b), tuple(t[:, : b.mask.shape[1]] for t in wide))


def _rows(loss: PolicyLoss, b: Rows) -> str:
    alone = [value_and_gradient(loss, b.map(lambda t, i=i: t[i : i + 1])) for i in range(len(b.mask))]
    return _differs(value_and_gradient(loss, b), tuple(torch.cat(column) for column in zip(*alone, strict=True)))


def _on_policy(loss: PolicyLoss, b: Rows) -> str:
    _, clipped, gradient = value_and_gradient(loss, Rows(b.logp, b.logp.clone(), b.advantages, b.mask))
    if clipped.any():
        return "tokens are clipped on-policy, where the ratio is 1"
    expected = torch.where(b.mask, -b.advantages, 0)
    return "" if torch.allclose(gradient, expected, atol=TOLERANCE) else "its gradient on-policy is not REINFORCE's, −A"


def _differs(ours: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...], tolerance: float = TOLERANCE) -> str:
    for what, a, b in zip(("the loss", "which tokens are clipped", "the gradient"), ours, other, strict=True):
        if not torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance):
            return f"{what} changes"
    return ""


Law = Callable[[PolicyLoss, Rows], str]
LAWS: dict[str, Law] = {
    "returns a loss per token": _shapes,
    "learns": _learns,
    "leaves its inputs alone": _inputs,
    "is a function of its inputs": _repeatable,
    "ignores tokens outside the mask": _mask,
    "does not depend on padding": _padding,
    "does not depend on the other rows": _rows,
}
"""Law → a check that returns how it is broken, or nothing."""
TRAITS: dict[str, Law] = {"is REINFORCE on-policy": _on_policy}


@dataclass
class Fault:
    """How a loss breaks laws: one result or exception, and the names of the laws that it breaks."""

    laws: list[str]
    how: str

    def __str__(self) -> str:
        return f"{', '.join(self.laws)}: {self.how}"


def broken(loss: PolicyLoss, laws: dict[str, Law]) -> list[Fault]:
    """The faults of a loss on random rows.

    An exception is one fault, however many laws it breaks. Two are the same if they have one type and come from one
    line, whatever values their texts name.
    """
    faults: dict[object, Fault] = {}
    for name, law in laws.items():
        for seed in SEEDS:
            try:
                says = law(loss, ragged(seed))
                key: object = name
            except (Exception, SystemExit) as error:  # a user's function may raise anything
                text = " ".join(str(error).split("\n")[:1])
                says = f"it raises {type(error).__name__}{f': {text}' if text else ''}"
                key = (type(error), _where(error, text))
            if says:
                faults.setdefault(key, Fault([], says)).laws.append(name)
                break
    return list(faults.values())


def _where(error: BaseException, text: str) -> object:
    """The place that raised an exception: the innermost file and line, or its text if that is in this module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename if trace is not None else __file__
    return text if file == __file__ or trace is None else (file, trace.tb_lineno)
