"""Distillation: each divergence by hand, against an oracle and by law; the pass of two models; whole runs."""

from __future__ import annotations

import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain import api, config
from posttrain.algos import distill
from posttrain.config.distill import DistillConfig
from posttrain.data import batching
from posttrain.models.load import Policy
from posttrain.objectives.distill import DIVERGENCES, sampled_reverse_kl
from posttrain.objectives.policy import reinforce
from posttrain.objectives.tokens import kl_k2
from posttrain.store.run import Run
from posttrain.train import forward
from posttrain.train.learners.local import LocalLearner
from posttrain.types import Batch, ConfigError, ResumeError, Sample
from tests import tiny

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
LOGITS = st.lists(st.floats(-6, 6), min_size=5, max_size=5)
BETAS = st.floats(0.05, 0.95)
LOSS: Any = distill.loss  # called with whatever a pass yields, as the learner does


def value_and_grad(name: str, student: Any, teacher: Any, beta: float = 0.5) -> tuple[float, torch.Tensor]:
    """A divergence of two rows of logits, and its gradient by the student's, in float64."""
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    q = torch.tensor(teacher, dtype=torch.float64, requires_grad=True)
    value = DIVERGENCES[name](torch.log_softmax(z, -1).unsqueeze(0), torch.log_softmax(q, -1).unsqueeze(0), beta)
    assert value.shape == (1,)
    value.sum().backward()
    assert z.grad is not None and q.grad is None, "the teacher is never trained"
    return float(value.detach()), z.grad


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("reverse-kl", 0.5 * math.log(4 / 3), -0.25 * math.log(3)),
        ("forward-kl", 0.75 * math.log(1.5) - 0.25 * math.log(2), -0.25),
        ("jsd", 0.033822, 0.125 * math.log(0.6)),
    ],
)
def test_by_hand_a_student_at_one_half_and_a_teacher_at_three_quarters(
    name: str, value: float, gradient: float
) -> None:
    """π = (½, ½), τ = (¾, ¼), m = (⅝, ⅜).

    Reverse: ½ ln(⅔) + ½ ln 2. Forward: ¾ ln 1.5 + ¼ ln ½. JSD: ½(¾ ln 1.2 + ¼ ln ⅔) + ½(½ ln 0.8 + ½ ln(4/3)).
    """
    found, grad = value_and_grad(name, [0.0, 0.0], [math.log(3), 0.0])
    assert found == pytest.approx(value, abs=1e-6)
    assert grad.tolist() == [pytest.approx(gradient), pytest.approx(-gradient)]


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def oracle(name: str, student: np.ndarray, teacher: np.ndarray, beta: float) -> tuple[float, np.ndarray]:
    """Value and analytic gradient in NumPy: with c = ∂D/∂π, the gradient by the logits is π (c − Σ π c)."""
    p, q = softmax(student), softmax(teacher)
    if name == "reverse-kl":
        value, slope = float(p @ np.log(p / q)), np.log(p / q)
    elif name == "forward-kl":
        value, slope = float(q @ np.log(q / p)), -q / p
    else:
        m = beta * q + (1 - beta) * p
        value = float(beta * (q @ np.log(q / m)) + (1 - beta) * (p @ np.log(p / m)))
        slope = (1 - beta) * np.log(p / m)
    return value, p * (slope - p @ slope)


@every_divergence
@given(student=LOGITS, teacher=LOGITS, beta=BETAS)
def test_value_and_gradient_are_the_oracles(name: str, student: list[float], teacher: list[float], beta: float) -> None:
    value, grad = value_and_grad(name, student, teacher, beta)
    expected, slope = oracle(name, np.array(student), np.array(teacher), beta)
    assert value == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(grad.numpy(), slope, atol=1e-9)


# --- laws -----------------------------------------------------------------------------------------------------------


@every_divergence
@given(logits=LOGITS, shift=st.floats(-3, 3), beta=BETAS)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    name: str, logits: list[float], shift: float, beta: float
) -> None:
    value, grad = value_and_grad(name, logits, [z + shift for z in logits], beta)
    assert abs(value) < 1e-12 and grad.abs().max() < 1e-12


@every_divergence
@given(student=LOGITS, teacher=LOGITS, beta=BETAS)
def test_no_divergence_is_negative(name: str, student: list[float], teacher: list[float], beta: float) -> None:
    value, _ = value_and_grad(name, student, teacher, beta)
    assert value >= -1e-12
    if name == "jsd":
        coin = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert value <= coin + 1e-12


@given(student=LOGITS, teacher=LOGITS)
def test_the_jensen_shannon_divergence_tends_to_either_kl_and_is_symmetric_in_the_middle(
    student: list[float], teacher: list[float]
) -> None:
    tiny_beta = 1e-7
    forward_kl, _ = value_and_grad("forward-kl", student, teacher)
    reverse_kl, _ = value_and_grad("reverse-kl", student, teacher)
    low, _ = value_and_grad("jsd", student, teacher, tiny_beta)
    high, _ = value_and_grad("jsd", student, teacher, 1 - tiny_beta)
    assert low / tiny_beta == pytest.approx(forward_kl, abs=0.02, rel=0.02)
    assert high / tiny_beta == pytest.approx(reverse_kl, abs=0.02, rel=0.02)
    there, _ = value_and_grad("jsd", student, teacher)
    back, _ = value_and_grad("jsd", teacher, student)
    assert there == pytest.approx(back, abs=1e-12)


@every_divergence
def test_a_token_that_neither_can_say_counts_for_nothing(name: str) -> None:
    value, grad = value_and_grad(name, [0.0, 1.0, -math.inf], [1.0, 0.0, -math.inf])
    expected, slope = oracle(name, np.array([0.0, 1.0]), np.array([1.0, 0.0]), 0.5)
    assert value == pytest.approx(expected) and grad.tolist() == [*map(pytest.approx, slope.tolist()), 0.0]


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0])
def test_a_mixture_of_one_side_alone_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="needs 0 < beta < 1"):
        value_and_grad("jsd", [0.0, 1.0], [1.0, 0.0], beta)


# --- the sampled estimator ------------------------------------------------------------------------------------------


@given(
    student=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    teacher=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_over_all_tokens_the_sampled_estimate_is_the_exact_reverse_kl_in_value_and_gradient(
    student: list[float], teacher: list[float]
) -> None:
    z = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    logp, teacher_logp = torch.log_softmax(z, -1), torch.log_softmax(torch.tensor(teacher, dtype=torch.float64), -1)
    per_token = sampled_reverse_kl(logp, teacher_logp, torch.ones(3, dtype=torch.bool))
    expected = (logp.detach().exp() * per_token).sum()
    expected.backward()
    value, grad = value_and_grad("reverse-kl", student, teacher)
    assert float(expected.detach()) == pytest.approx(value, abs=1e-12)
    assert z.grad is not None
    torch.testing.assert_close(z.grad, grad, atol=1e-12, rtol=0)


def test_over_all_answers_both_estimators_have_the_same_expected_gradient() -> None:
    """Answers of one or two tokens from a vocabulary of three, where token 2 ends the answer and any other leads on.

    The weights are those of `aggregate = "constant"`, which do not depend on what is drawn.
    """
    draw = torch.Generator().manual_seed(0)
    theirs = torch.log_softmax(torch.randn(3, 3, generator=draw, dtype=torch.float64), -1)
    start = torch.randn(3, 3, generator=draw, dtype=torch.float64)  # row 0: first state, row 1 + a: after token a
    answers = [[(0, 2)], *([(0, a), (1 + a, b)] for a, b in itertools.product((0, 1), range(3)))]
    grads: list[torch.Tensor] = []
    for exact in (True, False):
        table = start.clone().requires_grad_(True)
        ours = torch.log_softmax(table, -1)
        total, chances = torch.zeros((), dtype=torch.float64), 0.0
        for answer in answers:
            states, tokens = (list(column) for column in zip(*answer, strict=True))
            chance = float(ours[states, tokens].sum().detach().exp())
            drawn = ours[states, tokens], theirs[states, tokens], torch.ones(len(answer), dtype=torch.bool)
            per_token = DIVERGENCES["reverse-kl"](ours[states], theirs[states]) if exact else sampled_reverse_kl(*drawn)
            total, chances = total + chance * 0.5 * per_token.sum(), chances + chance
        total.backward()
        assert chances == pytest.approx(1) and table.grad is not None
        grads.append(table.grad)
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)
    assert grads[0].abs().amax(1).min() > 0.01, "every state has something to learn"


def test_it_is_reinforce_with_the_teachers_advantage_and_the_gradient_of_k2() -> None:
    logp = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    teacher, mask = torch.tensor([[-0.5, -3.0, math.nan]]), torch.tensor([[True, True, False]])
    advantages = torch.where(mask, teacher - logp, 0).detach()
    per_token = sampled_reverse_kl(logp, teacher, mask)
    assert per_token.tolist() == [[-0.5, 1.0, 0.0]]
    found, policy, k2 = (
        torch.autograd.grad(loss.sum(), logp)[0]
        for loss in (
            per_token,
            reinforce(logp, logp.detach(), advantages, mask, 0, 0)[0],
            kl_k2(logp[:, :2], teacher[:, :2]),
        )
    )
    assert found.tolist() == policy.tolist() == k2.tolist() == [[-0.5, 1.0, 0.0]]


# --- the pass of student and teacher --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chatty(tmp_path_factory.mktemp("student"))


def another(folder: Path, out: Path, seed: int = 1) -> Path:
    """The model of a folder with other weights."""
    policy = tiny.load(folder)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    policy.model.save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def teacher_folder(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return another(student_folder, tmp_path_factory.mktemp("teacher"))


def rows(policy: Policy, count: int = 5) -> list[Sample]:
    """Answers of different lengths: the second half of random tokens is trained."""
    made: list[Sample] = []
    for tokens in tiny.prompts(policy, count, longest=20):
        tokens = np.concatenate([[1, 5], tokens])
        mask = np.arange(len(tokens)) >= max(1, len(tokens) // 2)
        made.append(Sample(tokens, mask, np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.float32)))
    return made


def one_batch(samples: list[Sample], micro_batch_tokens: int = 10_000) -> list[Batch]:
    return batching.micro(samples, micro_batch_tokens, "token-mean")


def gradient(policy: Policy, loss: torch.Tensor) -> torch.Tensor:
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("cfg", [{"divergence": name} for name in DIVERGENCES] + [{"estimator": "sampled"}])
@pytest.mark.parametrize("positions", [1, 3, 10_000])
def test_in_chunks_of_any_size_it_is_the_whole_vocabulary_computation(
    student_folder: Path, teacher_folder: Path, cfg: dict[str, Any], positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = tiny.load(student_folder), tiny.load(teacher_folder)
    (batch,) = one_batch(rows(student))
    temperature = 0.7
    logits = [p.head(forward.before_trained(p, batch)) for p in (student, teacher)]
    ours, theirs = (torch.log_softmax(x / temperature, -1) for x in logits)
    targets = batch.tokens[batch.mask].unsqueeze(1)
    if cfg.get("estimator") == "sampled":
        gap = (ours - theirs).gather(1, targets).squeeze(1).detach()
        wanted, pull = gap, gap * ours.gather(1, targets).squeeze(1)
    else:
        wanted = pull = DIVERGENCES[cfg["divergence"]](ours, theirs.detach(), 0.5)
    slope = gradient(student, (batch.weights[batch.mask] * pull).sum())

    seen: list[int] = []
    for policy in (student, teacher):
        policy.head.register_forward_hook(lambda module, given, out: seen.append(out.shape[0]))
    monkeypatch.setattr(forward, "LOGITS_PER_CHUNK", 2 * student.vocab * positions)
    outputs = distill.make_forward(teacher, DistillConfig(**cfg))(student, batch, temperature)
    value, stats = LOSS(*outputs, batch)
    found, exact = gradient(student, value), DIVERGENCES["reverse-kl"](ours, theirs).detach()
    assert max(seen) <= positions, "more positions than allowed had their logits at once"
    torch.testing.assert_close(outputs[0][batch.mask].detach(), wanted.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, slope, atol=1e-5, rtol=1e-4)
    assert stats["reverse_kl"].value == pytest.approx(float(exact.mean()), rel=1e-5)
    assert stats["teacher_logp"].value == pytest.approx(float(theirs.gather(1, targets).mean().detach()), rel=1e-5)
    assert stats["agreement"].value == pytest.approx(float((ours.argmax(1) == theirs.argmax(1)).float().mean()))
    assert not any(p.grad is not None for p in teacher.model.parameters())


def test_the_gradient_does_not_depend_on_how_the_batch_is_split(student_folder: Path, teacher_folder: Path) -> None:
    student, teacher = tiny.load(student_folder), tiny.load(teacher_folder)
    both = distill.make_forward(teacher, DistillConfig())
    grads: list[torch.Tensor] = []
    for micro_batch_tokens in (10_000, 12):
        batches = one_batch(rows(student), micro_batch_tokens)
        losses = [LOSS(*both(student, batch, 1.0), batch)[0] for batch in batches]
        grads.append(gradient(student, torch.stack(losses).sum()))
    assert len(batches) > 2
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_a_student_that_is_its_own_teacher_agrees_everywhere_and_does_not_move(student_folder: Path) -> None:
    student, teacher = tiny.load(student_folder), tiny.load(student_folder)
    learner = LocalLearner(student, config.TrainConfig(), 1, forward=distill.make_forward(teacher, DistillConfig()))
    (batch,) = one_batch(rows(student))
    (stats,) = learner.forward_backward([batch], distill.loss)
    assert stats["agreement"].value == 1 and abs(stats["reverse_kl"].value) < 1e-6
    assert learner.step()["grad_norm"].value < 1e-5


# --- whole runs -----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "data.tasks": "sums",
    "data.count": 32,
    "reward.name": str(Path(__file__).parent / "vowels.py") + ":vowels",
    "rollout.max_tokens": 8,
    "algo.prompts": 4,
    "algo.group_size": 4,
    "eval.problems": 2,
    "train.steps": 1,
    "train.lr": 1e-2,
    "train.threads": 1,
}


def start(student: Path, out: Path, **settings: Any) -> api.Result:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    merged = {**SMALL, "model.path": str(student), "run.out": str(out), **named}
    return api.start("distill", config.resolve("distill", {}, merged))


@pytest.mark.parametrize(("estimator", "share"), [("full", 0.75), ("sampled", 0.9)])
def test_a_student_comes_closer_to_its_teacher(
    student_folder: Path, teacher_folder: Path, tmp_path: Path, estimator: str, share: float
) -> None:
    settings = {"algo__teacher": str(teacher_folder), "algo__estimator": estimator, "train__steps": 8}
    start(student_folder, tmp_path / "run", **settings, algo__prompts=8, algo__group_size=8)
    with Run.read(tmp_path / "run") as run:
        kl, mismatch = run.curve("reverse_kl")[1], run.curve("mismatch")[1]
    assert np.mean(kl[-2:]) < share * kl[0]
    assert max(mismatch) < 1e-3


def test_a_run_folder_is_a_teacher_once_it_has_finished(student_folder: Path, tmp_path: Path) -> None:
    first = start(student_folder, tmp_path / "first", algo__teacher=str(student_folder))
    assert start(student_folder, tmp_path / "second", algo__teacher=str(first.folder)).summary
    (first.folder / "model").rename(first.folder / "gone")
    with pytest.raises(ConfigError, match="is a run that has not finished"):
        start(student_folder, tmp_path / "third", algo__teacher=str(first.folder))


def test_a_run_is_not_resumed_with_another_teacher(student_folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    recipe = config.resolve("distill", {}, {**SMALL, "model.path": str(student_folder), "algo.teacher": str(teacher)})
    recipe = replace(recipe, train=replace(recipe.train, steps=3), run=replace(recipe.run, out=str(tmp_path / "run")))

    class Stop(Exception):
        pass

    def stop(step: int, values: dict[str, float]) -> None:
        if step == 2:
            raise Stop

    recipe = replace(recipe, run=replace(recipe.run, checkpoint_every=1))
    with pytest.raises(Stop):
        api.start("distill", recipe, stop)
    another(teacher_folder, teacher, seed=2)
    with pytest.raises(ResumeError, match="has other weights than when the run was saved"):
        api.resume(tmp_path / "run")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_without_a_teacher_there_is_nothing_to_learn_from(student_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algo\.teacher is empty; name the model to learn from"):
        start(student_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_other_tokens_is_refused(student_folder: Path, tmp_path: Path) -> None:
    other = tiny.make(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"different vocabularies: .* Choose a teacher with the student's tokenizer"):
        start(student_folder, tmp_path / "run", algo__teacher=str(other))


def resized(folder: Path, out: Path, rows: int) -> Path:
    policy = tiny.load(folder)
    policy.model.resize_token_embeddings(rows)
    policy.model.save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    return out


def test_a_teacher_may_have_more_rows_for_padding_but_not_fewer(
    student_folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    wide = resized(teacher_folder, tmp_path / "wide", tiny.load(teacher_folder).vocab + 8)
    assert start(student_folder, tmp_path / "run", algo__teacher=str(wide)).summary
    with pytest.raises(ConfigError, match="output rows for the student's"):
        start(resized(student_folder, tmp_path / "student", 300), tmp_path / "no", algo__teacher=str(teacher_folder))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"estimator": "sampled", "divergence": "jsd"}, "estimates the reverse KL only, not 'jsd'"),
        ({"beta": 1.0}, "is not between 0 and 1"),
        ({"group_size": 0}, "group_size=0 must be 1 or more"),
        ({"rollout.temperature": 0}, "gives no distribution to compare"),
        ({"divergence": "kl"}, "is not one of reverse-kl, forward-kl, jsd"),
        ({"max_mismatch": -1}, "cannot be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.resolve("distill", {}, settings)
