"""The worked examples of chapters 1 to 3. Each calls the functions that train and writes down what they return."""

from __future__ import annotations

from posttrain.lab.course.working import Example, Step, Worked, one, tensor
from posttrain.objectives.reward import bradley_terry


def bradley_terry_pair() -> Worked:
    """Two scores become a probability, and the loss of one comparison."""
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
                "Had the person preferred l, the same scores would have cost more:",
            ),
        ),
    )


EXAMPLES: dict[str, Example] = {"bradley-terry": bradley_terry_pair}
