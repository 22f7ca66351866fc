"""Worked examples of chapter 2. Each one calls the library's training functions and shows their results."""

from __future__ import annotations

import torch
from torch.autograd.functional import hessian, jacobian

from posttrain.lab.course.working import Example, Step, Worked, many, one, tensor
from posttrain.lab.label.agreement import kappa
from posttrain.objectives.preference import kto
from posttrain.objectives.reward import (
    aggregate_steps,
    binary,
    bradley_terry,
    centring,
    ensemble,
    expected_calibration_error,
)


def bradley_terry_pair() -> Worked:
    """From two scores to a probability, and to the loss of one comparison."""
    chosen, rejected, none = tensor(1.2), tensor(0.4), tensor(0.0)
    gap = (chosen - rejected)[0]
    loss = bradley_terry(chosen, rejected, tensor(1.0), none)[0]
    turned = bradley_terry(chosen, rejected, tensor(0.0), none)[0]
    return Worked(
        title="From two scores to a probability and a loss",
        given="A reward model gives answer w the score 1.2 and answer l the score 0.4; a person preferred w.",
        calls=("objectives.reward.bradley_terry",),
        steps=(
            Step(
                r"P(y_w \succ y_l) = \sigma(r_w - r_l)",
                rf"\sigma(1.2 - 0.4) = \sigma({one(gap, 1)})",
                one(gap.sigmoid()),
            ),
            Step(r"\mathcal{L} = -\log \sigma(r_w - r_l)", rf"-\log {one(gap.sigmoid())}", one(loss)),
            Step(
                r"-\log \sigma(r_l - r_w)",
                rf"-\log {one((-gap).sigmoid())}",
                one(turned),
                "If the person had preferred l, the loss of the same scores would be larger:",
            ),
        ),
    )


def likelihood() -> Worked:
    """Seven wins out of ten: the score difference with the maximum likelihood."""
    best = torch.tensor(7 / 3, dtype=torch.float64).log()
    gaps = tensor(0.0, 0.5, float(best), 1.5)
    zero = torch.zeros_like(gaps)
    loss = 10 * bradley_terry(gaps, zero, torch.full_like(gaps, 0.7), zero)
    slope = 7 - 10 * gaps.sigmoid()
    rows = [many(row) for row in zip(gaps, gaps.sigmoid(), loss, slope, strict=True)]
    return Worked(
        title="The score difference that makes seven wins in ten most likely",
        given="7 of 10 people preferred answer w to answer l. d is the difference of the answers' scores.",
        calls=("objectives.reward.bradley_terry",),
        steps=(
            Step(r"\hat d = \log \frac{n_w}{n_l}", r"\log \frac{7}{3}", one(best)),
            Step(r"\sigma(\hat d)", rf"\sigma({one(best)})", one(best.sigmoid())),
        ),
        head=("$d$", r"$\sigma(d)$", r"$-\log L(d)$", r"$7 - 10\,\sigma(d)$"),
        rows=tuple(rows),
        after="The negative log-likelihood is lowest where its slope, the last column, is 0.",
    )


def fit(differences: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Weights (F,) that minimise the Bradley–Terry loss of the score gaps `differences` (N, F) @ weights."""

    def loss(weights: torch.Tensor) -> torch.Tensor:
        gap = differences @ weights
        return (counts * bradley_terry(gap, torch.zeros_like(gap), labels, torch.zeros_like(gap))).sum()

    weights = torch.zeros(differences.shape[1], dtype=torch.float64)
    for _ in range(12):  # Newton's method; the loss is convex
        slope, curvature = jacobian(loss, weights), hessian(loss, weights)
        assert isinstance(slope, torch.Tensor) and isinstance(curvature, torch.Tensor)
        weights = weights - torch.linalg.solve(curvature, slope)
    return weights


def three_answers() -> Worked:
    """Scores of three answers from thirty comparisons, and what the model cannot fit."""
    pairs = torch.tensor([[1.0, -1, 0], [0, 1, -1], [1, 0, -1]], dtype=torch.float64)
    won = tensor(0.7, 0.8, 0.9)
    scores = fit(pairs[:, :2], won, torch.full_like(won, 10))  # the third answer's score is fixed at 0
    said = (pairs[:, :2] @ scores).sigmoid()
    names = ("A over B", "B over C", "A over C")
    rows = [(name, f"{10 * w:.0f} of 10", one(p)) for name, w, p in zip(names, won, said, strict=True)]
    return Worked(
        title="Scores of three answers from thirty comparisons",
        given="Ten people compared each pair of the answers A, B and C. The score of C is fixed at 0.",
        calls=("objectives.reward.bradley_terry",),
        steps=(Step(r"\hat r_A", "", one(scores[0])), Step(r"\hat r_B", "", one(scores[1]))),
        head=("comparison", "people", "model"),
        rows=tuple(rows),
        after="One number per answer cannot match every share exactly: the three shares would have to be consistent.",
    )


def cross_entropy() -> Worked:
    """The loss of a pair is binary cross-entropy with the score difference as logit."""
    gap = tensor(0.8)
    zero, sure = tensor(0.0), tensor(1.0)
    pair, soft = bradley_terry(gap, zero, sure, zero)[0], bradley_terry(gap, zero, tensor(0.75), zero)[0]
    rows = [
        ("certain, label 1", one(pair), one(binary(gap, sure)[0])),
        ("three of four people, label 0.75", one(soft), one(binary(gap, tensor(0.75))[0])),
        ("a tie, label 0.5", *many((bradley_terry(gap, zero, tensor(0.5), zero)[0], binary(gap, tensor(0.5))[0]))),
        ("better by a margin of 1", one(bradley_terry(gap, zero, sure, sure)[0]), one(binary(gap - 1, sure)[0])),
    ]
    return Worked(
        title="A pair is one example of a two-class problem",
        given="Scores differ by 0.8. The loss of the pair, and the cross-entropy of a classifier with logit 0.8 (minus "
        "the margin, if there is one).",
        calls=("objectives.reward.bradley_terry", "objectives.reward.binary"),
        head=("label", "Bradley–Terry", "cross-entropy"),
        rows=tuple(rows),
    )


def shift() -> Worked:
    """Scores have no natural zero; centring gives them one."""
    zero, sure = tensor(0.0), tensor(1.0)
    rows: list[tuple[str, ...]] = []
    for add in (0.0, 5.0, -0.8):
        c, r = tensor(1.2 + add), tensor(0.4 + add)
        rows.append((one(c[0], 1), one(r[0], 1), one(bradley_terry(c, r, sure, zero)[0]), one(centring(c, r)[0], 2)))
    return Worked(
        title="Only differences count",
        given="The same number is added to both scores of a pair.",
        calls=("objectives.reward.bradley_terry", "objectives.reward.centring"),
        head=("$r_w$", "$r_l$", "loss", "$(r_w + r_l)^2$"),
        rows=tuple(rows),
        after="The loss does not change; the centring term is 0 only if the two scores are centred on 0.",
    )


def length_bias() -> Worked:
    """A model that sees correctness and length learns to reward both."""
    differences = torch.tensor([[1.0, 1], [1, -1], [0, 1], [0, -1], [-1, 1]], dtype=torch.float64)
    counts = tensor(30, 14, 12, 4, 6)
    weights = fit(differences, torch.ones_like(counts), counts)
    what = ("right and longer", "right and shorter", "equally right, longer", "equally right, shorter", "wrong, longer")
    rows = [
        (name, f"{int(n)}", one(s)) for name, n, s in zip(what, counts, (differences @ weights).sigmoid(), strict=True)
    ]
    padded = weights[1]
    return Worked(
        title="How a reward model comes to like length",
        given="66 comparisons. The model scores an answer by whether it is right and by its length in units of twenty "
        "words: r = w₁ · right + w₂ · length.",
        calls=("objectives.reward.bradley_terry",),
        steps=(
            Step(r"\hat w_1", "", one(weights[0]), "The most likely weights are"),
            Step(r"\hat w_2", "", one(weights[1])),
            Step(
                r"P(\text{padded} \succ \text{plain}) = \sigma(\hat w_2)",
                rf"\sigma({one(padded)})",
                one(padded.sigmoid()),
                "A right answer padded with twenty empty words would be preferred with probability",
            ),
        ),
        head=("the preferred answer was", "times", r"the model's $P$"),
        rows=tuple(rows),
    )


def judges() -> Worked:
    """Three reward models agree on one answer and not on the other."""
    scores = torch.tensor([[1.0, 2.6], [0.9, -0.4], [1.1, 2.3]], dtype=torch.float64)  # (models, answers)
    joined = [(how, *many(ensemble(scores, how, 1.0), 2)) for how in ("mean", "min", "penalised")]
    rows = [(f"model {i + 1}", *many(row, 2)) for i, row in enumerate(scores)] + joined
    return Worked(
        title="Three judges that disagree",
        given="Three reward models score two answers. The last row subtracts the variance between them, λ = 1.",
        calls=("objectives.reward.ensemble",),
        head=("judge", "plain answer", "odd answer"),
        rows=tuple(rows),
        after="The mean prefers the odd answer. Both cautious rules prefer the answer on which the models agree.",
    )


def calibrated() -> Worked:
    """Expected calibration error: confidence against frequency, in bins."""
    probability = tensor(0.55, 0.58, 0.65, 0.72, 0.78, 0.85, 0.88, 0.93, 0.96, 0.98)
    outcome = tensor(1, 0, 0, 1, 1, 0, 1, 1, 1, 0)
    error, counts, confidence, frequency = expected_calibration_error(probability, outcome, 10)
    rows = [
        (f"{b / 10:.1f} to {(b + 1) / 10:.1f}", str(int(counts[b])), *many((confidence[b], frequency[b]), 2))
        for b in range(5, 10)
        if counts[b]
    ]
    return Worked(
        title="Is a model that says 90 % right nine times in ten?",
        given="Ten held-out pairs: how sure the model was of the answer it scored higher, and whether people agreed.",
        calls=("objectives.reward.expected_calibration_error",),
        steps=(
            Step(r"\mathrm{ECE} = \sum_b \frac{n_b}{N}\, |\text{frequency}_b - \text{confidence}_b|", "", one(error)),
        ),
        head=("confidence", "pairs", "mean confidence", "people agreed"),
        rows=tuple(rows),
    )


def steps() -> Worked:
    """One solution of four steps, the third of them doubtful, scored by four aggregation rules."""
    right = tensor(0.98, 0.95, 0.40, 0.97)
    mask = torch.ones(1, 4, dtype=torch.bool)
    rows = [(how, one(aggregate_steps(right.unsqueeze(0), mask, how)[0])) for how in ("min", "product", "last", "mean")]
    logit = torch.logit(tensor(0.40))
    return Worked(
        title="Four steps, one of them doubtful",
        given="A process reward model gives the steps of a solution probabilities of 0.98, 0.95, 0.40 and 0.97 of "
        "being right.",
        calls=("objectives.reward.aggregate_steps", "objectives.reward.binary"),
        steps=(
            Step(
                r"-\log(1 - \sigma(z_3))",
                r"-\log(1 - 0.40)",
                one(binary(logit, tensor(0.0))[0]),
                "If the third step was labelled wrong, its share of the loss is",
            ),
        ),
        head=("rule", "score of the solution"),
        rows=tuple(rows),
    )


def unpaired() -> Worked:
    """KTO's loss for single answers, by how far the policy has moved."""
    moved = tensor(-4, -1, 0, 1, 4)
    zero, base = torch.zeros_like(moved), torch.tensor(0.0)
    good = kto(moved, zero, torch.ones(5, dtype=torch.bool), base, 0.5, 1.0, 1.0)
    bad = kto(moved, zero, torch.zeros(5, dtype=torch.bool), base, 0.5, 1.0, 1.0)
    rows = [(one(m, 0), *many((g, b))) for m, g, b in zip(moved, good, bad, strict=True)]
    return Worked(
        title="One answer, one thumb",
        given="Answers judged on their own, with β = 0.5 and a reference point of 0. The first column shows by how "
        "many nats the policy has made the answer more likely.",
        calls=("objectives.preference.kto",),
        head=(r"$\log \pi / \pi_{\text{ref}}$", "loss if good", "loss if bad"),
        rows=tuple(rows),
        after="At both ends the loss is flat: an answer that is already learned, or hopeless, teaches little.",
    )


def annotators() -> Worked:
    """How often two people agree, and how often they would by chance."""
    one_says = list("AAAAABBBBTAABBAABBAT")
    other_says = list("AAAABBBBBAAABBATBBAT")
    agreed, beyond = kappa(one_says, other_says)
    rows = [
        (name, str(one_says.count(sign)), str(other_says.count(sign)))
        for name, sign in (("the first is better", "A"), ("the second is better", "B"), ("tie", "T"))
    ]
    return Worked(
        title="Two annotators",
        given="Two people judge the same twenty pairs.",
        calls=("lab.label.agreement.kappa",),
        steps=(
            Step(r"p_o", "", one(agreed.value), "They agree on a share of"),
            Step(r"p_e = \sum_c p_c\, q_c", "", one(beyond.chance), "By chance they would agree on"),
            Step(
                r"\kappa = \frac{p_o - p_e}{1 - p_e}",
                "",
                one(beyond.value or 0.0),
                "Cohen’s kappa, agreement beyond chance:",
            ),
        ),
        head=("label", "one person", "the other"),
        rows=tuple(rows),
    )


EXAMPLES: dict[str, Example] = {
    "bradley-terry": bradley_terry_pair,
    "likelihood": likelihood,
    "three-answers": three_answers,
    "cross-entropy": cross_entropy,
    "shift": shift,
    "length-bias": length_bias,
    "kappa": annotators,
    "ensemble": judges,
    "calibration": calibrated,
    "steps": steps,
    "unpaired": unpaired,
}
