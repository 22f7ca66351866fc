"""The course's exercises: reference solutions pass, typical mistakes are told apart, nothing runs outside of a box."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page, expect

from posttrain.cli.arguments import read_recipe
from posttrain.cli.main import main
from posttrain.config import RECIPES
from posttrain.lab.course import coding, exercises, pages, worked_challenges, worked_reasoning
from posttrain.types import ConfigError, ResumeError
from tests.lab_server import PATIENCE, opened

expect.set_options(timeout=PATIENCE)  # the machine may be busy
CODING = [name for name, given in exercises.texts().items() if given["kind"] == "coding"]
CHAPTERS = ("reasoning", "hands-on", "challenges")

SOLUTIONS = {
    "bradley-terry": """
import math

def score(weights, features):
    return sum(w * x for w, x in zip(weights, features))

def gaps(weights, pairs):
    return [score(weights, c) - score(weights, r) for c, r in pairs]

def sigmoid(d):
    return 1 / (1 + math.exp(-d)) if d >= 0 else math.exp(d) / (1 + math.exp(d))

def loss(weights, pairs):
    return sum(max(-d, 0) + math.log1p(math.exp(-abs(d))) for d in gaps(weights, pairs)) / len(pairs)

def gradient(weights, pairs):
    total = [0.0] * len(weights)
    for d, (c, r) in zip(gaps(weights, pairs), pairs):
        for j in range(len(weights)):
            total[j] += (sigmoid(d) - 1) * (c[j] - r[j]) / len(pairs)
    return total

def train(pairs, steps, lr):
    weights = [0.0 for _ in pairs[0][0]]
    for _ in range(steps):
        weights = [w - lr * g for w, g in zip(weights, gradient(weights, pairs))]
    return weights
""",
    "simple-grpo": """
import math

def softmax(logits):
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    return [w / sum(weights) for w in weights]

def sample(logits, uniforms):
    pi, answers = softmax(logits), []
    for u in uniforms:
        answer, total = 0, pi[0]
        while total <= u and answer < len(pi) - 1:
            answer += 1
            total += pi[answer]
        answers.append(answer)
    return answers

def advantages(rewards):
    mean = sum(rewards) / len(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (spread + 1e-4) for r in rewards]

def update(logits, old_logits, answers, advantages, lr, clip):
    pi, old = softmax(logits), softmax(old_logits)
    step = [0.0] * len(logits)
    for a, A in zip(answers, advantages):
        rho = pi[a] / old[a]
        if (A > 0 and rho > 1 + clip) or (A < 0 and rho < 1 - clip):
            continue
        for k in range(len(logits)):
            step[k] += rho * A * ((k == a) - pi[k]) / len(answers)
    return [z + lr * s for z, s in zip(logits, step)]

def train(logits, reward_of, draws, lr):
    for uniforms in draws:
        answers = sample(logits, uniforms)
        logits = update(logits, logits, answers, advantages([reward_of[a] for a in answers]), lr, 0.2)
    return logits
""",
    "reward-hacking": """
import math

def softmax(logits):
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    return [w / sum(weights) for w in weights]

def expected(logits, values):
    return sum(p * v for p, v in zip(softmax(logits), values))

def kl(logits, start):
    return sum(p * math.log(p / q) for p, q in zip(softmax(logits), softmax(start)))

def step(logits, start, proxy, beta, lr):
    pi, first = softmax(logits), softmax(start)
    gain = [r - beta * math.log(p / q) for r, p, q in zip(proxy, pi, first)]
    mean = sum(p * g for p, g in zip(pi, gain))
    return [z + lr * p * (g - mean) for z, p, g in zip(logits, pi, gain)]

def simulate(start, proxy, truth, beta, lr, steps):
    logits, curve = list(start), []
    for number in range(steps + 1):
        if number:
            logits = step(logits, start, proxy, beta, lr)
        curve.append([expected(logits, proxy), expected(logits, truth), kl(logits, start)])
    return curve

def best_step(curve):
    return max(range(len(curve)), key=lambda i: curve[i][1])
""",
    "search": """
import math

def vote(answers, weights):
    sums = {}
    for answer, weight in zip(answers, weights):
        if answer >= 0:
            sums[answer] = sums.get(answer, 0.0) + weight
    return answers.index(max(sums, key=lambda a: sums[a])) if sums else -1

def shares(scores, width, temperature):
    powers = [math.exp((s - max(scores)) / temperature) for s in scores]
    exact = [width * p / sum(powers) for p in powers]
    counts = [math.floor(e + 1e-9) for e in exact]
    order = sorted(range(len(scores)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: width - sum(counts)]:
        counts[i] += 1
    return counts

def puct(values, priors, visits, c):
    root = math.sqrt(max(1, sum(visits)))
    return [q + c * p * root / (1 + n) for q, p, n in zip(values, priors, visits)]
""",
}

MISTAKES = [
    ("bradley-terry", "(sigmoid(d) - 1)", "(1 - sigmoid(d))", "the gradient", "the sign is wrong"),
    (
        "bradley-terry",
        "gaps(weights, pairs)) / len(pairs)",
        "gaps(weights, pairs))",
        "the loss of some",
        "the sum over",
    ),
    ("bradley-terry", "w - lr * g", "w + lr * g", "fifty steps", "move up the loss"),
    ("bradley-terry", "range(steps)", "range(steps + 1)", "fifty steps", "one step too many"),
    (
        "bradley-terry",
        "max(-d, 0) + math.log1p(math.exp(-abs(d)))",
        "-math.log(1 / (1 + math.exp(-d)))",
        "scores that differ",
        "overflowerror",
    ),
    ("simple-grpo", "/ (spread + 1e-4)", "", "advantages of a group", "not divided by"),
    ("simple-grpo", "/ (len(rewards) - 1)", "/ len(rewards)", "advantages of a group", "over n; n - 1"),
    ("simple-grpo", "z + lr * s", "z - lr * s", "an update of the policy", "goes down the objective"),
    ("simple-grpo", "/ len(answers)", "", "an update of the policy", "the sum over the answers"),
    ("simple-grpo", "            continue\n", "            pass\n", "answers beyond the clip", "nothing was clipped"),
    ("reward-hacking", "r - beta * math", "r + beta * math", "a step with the penalty", "should be subtracted"),
    ("reward-hacking", "r - beta * math.log(p / q)", "r", "a step with the penalty", "is missing"),
    ("reward-hacking", "p * math.log(p / q) for", "q * math.log(q / p) for", "the divergence after", "wrong way round"),
    ("search", "+ weight", "+ 1", "a vote with weights", "without the weights"),
    ("search", "if answer >= 0", "if True", "a vote with weights", "does not vote"),
    ("search", ") / temperature", ")", "eight next steps", "temperature is missing"),
    ("search", "counts[i] += 1", "pass", "eight next steps", "rounded down"),
    ("search", "math.sqrt(max(1, sum(visits)))", "max(1, sum(visits))", "PUCT at", "where its root"),
    ("search", " + c * p * root / (1 + n)", "", "PUCT at", "bonus is missing"),
    ("reward-hacking", "curve[i][1]", "curve[i][0]", "the best step to stop at", "the last step"),
]


def check(name: str, code: str) -> dict[str, exercises.Check]:
    """The lines of a verdict on code, by their names."""
    verdict = exercises.checked(name, {"code": code})
    if "unavailable" in verdict:
        pytest.skip(f"needs the code sandbox: {verdict['unavailable']}")
    return {line["name"]: line for line in verdict["checks"]}


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODING)
def test_the_reference_solution_passes_every_check(name: str) -> None:
    lines = check(name, SOLUTIONS[name])
    assert len(lines) == len(coding.CASES[name]()) and not [line for line in lines.values() if not line["passed"]]


@pytest.mark.parametrize("name", CODING)
def test_the_template_alone_does_not_pass(name: str) -> None:
    assert [line for line in check(name, exercises.coding_texts()[name]["template"]).values() if not line["passed"]]


@pytest.mark.parametrize(("name", "right", "wrong", "where", "told"), MISTAKES)
def test_a_typical_mistake_is_named(name: str, right: str, wrong: str, where: str, told: str) -> None:
    assert SOLUTIONS[name].count(right) >= 1
    lines = check(name, SOLUTIONS[name].replace(right, wrong))
    line = next(line for text, line in lines.items() if text.startswith(where))
    assert not line["passed"] and told in line["detail"].lower()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("def score(w, f", "SyntaxError"),
        ("def score(w, f):\n    return f[9]", "IndexError: list index out of range (line 2)"),
        ("x = 1", "no function score"),
        ("def score(w, f):\n    return object()", "something other than numbers"),
        ("def score(w, f):\n    return float('nan')", "is nan"),
        ("def score(w, f):\n    return 10 ** 5000", "is inf"),
        ("def score(w, f):\n    return '" + "x" * 500 + "'", "expected a number"),
        ("import os\nos._exit(0)", "exited before"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("open('/etc/passwd')", "Error"),
    ],
)
def test_what_goes_wrong_in_the_code_is_told_in_a_line(code: str, told: str) -> None:
    line = check("bradley-terry", code)["the score is the sum of weight times feature"]
    assert not line["passed"] and told in line["detail"] and len(line["detail"]) < 250


def test_a_loop_without_end_is_ended_and_what_was_printed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exercises, "SECONDS", 0.5)
    code = "print('here')\ndef score(w, f):\n    while True:\n        pass\n"
    lines = list(check("bradley-terry", code).values())
    assert "never ends" in lines[0]["detail"] and "not reached" in lines[1]["detail"]
    assert exercises.checked("bradley-terry", {"code": code})["output"] == "here\n"


def test_expected_values_are_not_in_what_the_sandbox_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    dumps = exercises.encode.dumps
    monkeypatch.setattr(exercises.encode, "dumps", lambda value: sent.append(repr(value).encode()) or dumps(value))
    check("bradley-terry", SOLUTIONS["bradley-terry"])
    secret = str(coding.reward_training(coding.PAIRS, 50, 0.5)[0])[:10].encode()
    assert sent and not [message for message in sent if secret in message]


def test_without_isolation_nothing_runs_and_the_command_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here() -> None:
        raise ConfigError("the code sandbox cannot start, so code is not executed (namespaces: no).")

    monkeypatch.setattr(exercises.sandboxes, "use", none_here)
    verdict = exercises.checked("simple-grpo", {"code": "raise SystemExit"})
    assert verdict.get("unavailable", "").startswith("The code sandbox cannot start") and not verdict["passed"]
    assert exercises.shown("simple-grpo")["command"] == "pytest simple_grpo.py"


@pytest.mark.parametrize("name", CODING)
def test_the_downloaded_file_needs_nothing_but_pytest(name: str, tmp_path: Path) -> None:
    shown = exercises.shown(name)
    (tmp_path / shown["file"]).write_text(SOLUTIONS[name] + shown["tests"], encoding="utf-8")
    (tmp_path / "empty.py").write_text(shown["template"] + shown["tests"], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", shown["file"], "empty.py"]
    bare = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=bare)
    failed = set(re.findall(r"FAILED (\S+?)::", done.stdout))
    assert failed == {"empty.py"}, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= len(coding.CASES[name]())
    assert "import posttrain" not in shown["tests"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.data())
def test_a_result_is_right_up_to_rounding_and_wrong_beyond(values: list[float], data: st.DataObject) -> None:
    assert not exercises.difference(values, [value * (1 + 1e-9) for value in values])
    at = data.draw(st.integers(0, len(values) - 1))
    moved = [value + (i == at) * 1e-3 * max(1, abs(value)) for i, value in enumerate(values)]
    assert f"[{at}]" in exercises.difference(values, moved)
    assert exercises.difference(values, [*values, 0.0]) and exercises.difference(values, 1.0)


# --- what the library's numbers are ---------------------------------------------------------------------------------


def test_the_expected_values_are_those_worked_by_hand() -> None:
    assert coding.relative([1.0, 0.0]) == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)])
    assert float(coding.reward_loss(coding.tensor([1.0, 0.0]), [([2.0, 0.0], [0.0, 0.0])])) == pytest.approx(
        math.log(1 + math.exp(-2))
    )
    # two equally likely answers, the first right: its logit rises by lr * mean of A * (1 - 1/2)
    assert coding.updated([0.0, 0.0], [0.0, 0.0], [0, 1], [1.0, -1.0], 1.0, 0.2) == pytest.approx([0.5, -0.5])


def test_without_the_penalty_the_proxy_rises_and_the_truth_ends_lower_and_with_it_higher() -> None:
    free, held = coding.simulated(0.0), coding.simulated(coding.BETA)
    assert all(later[0] > earlier[0] for earlier, later in zip(free, free[1:], strict=False))
    assert free[-1][1] < free[0][1] < held[-1][1] and held[-1][0] < free[-1][0] and held[-1][2] < free[-1][2]


# --- questions ------------------------------------------------------------------------------------------------------


def test_every_question_has_one_right_choice_and_says_why_of_each() -> None:
    for name, question in exercises.texts().items():
        for choice in question.get("choices", []):
            assert choice["why"]
        if "choices" in question:
            verdicts = [exercises.checked(name, {"choice": i}) for i in range(len(question["choices"]))]
            assert sum(verdict["passed"] for verdict in verdicts) == 1


def test_which_choice_is_right_is_not_told_before_it_is_asked() -> None:
    shown = exercises.shown("verifiable")
    assert all(isinstance(choice, list) for choice in shown["choices"]) and "why" not in shown


@pytest.mark.parametrize("body", [{}, {"choice": 9}, {"choice": "1"}, {"choice": -1}])
def test_an_answer_that_is_no_choice_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected a number from 0"):
        exercises.checked("verifiable", body)


def test_what_is_not_there_or_cannot_be_checked_is_said() -> None:
    with pytest.raises(ResumeError, match="no exercise 'nothing'"):
        exercises.shown("nothing")
    with pytest.raises(ConfigError, match="no answer that can be checked"):
        exercises.checked("group-size", {"choice": 0})
    with pytest.raises(ConfigError, match="code of at most"):
        exercises.checked("simple-grpo", {"code": "x" * 20_001})


# --- chapters -------------------------------------------------------------------------------------------------------


def nodes_of(chapter: str) -> list[dict[str, Any]]:
    """Every node of a chapter that is no text."""
    found: list[dict[str, Any]] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.append(node)
            for child in node.get("children", []):
                walk(child)

    for section in pages.read_chapter(chapter)["sections"]:
        for part in section["parts"]:
            walk({"tag": "part", **part})
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_section_has_all_three_layers(chapter: str) -> None:
    for section in pages.read_chapter(chapter)["sections"]:
        assert set(pages.LAYERS) <= {part["layer"] for part in section["parts"]}, section["title"]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_source_has_an_address_or_is_our_measurement(chapter: str) -> None:
    for source in pages.read_chapter(chapter)["sources"]:
        links = [node["href"] for node in source["children"] if isinstance(node, dict) and node["tag"] == "a"]
        assert any(link.startswith("http") for link in links) or str(source["children"][0]).startswith(
            "Our measurement"
        )


def test_every_exercise_is_in_a_chapter_and_every_example_of_these_chapters_is_used() -> None:
    found = [node for chapter in pages.CHAPTERS for node in nodes_of(chapter)]
    assert {node["name"] for node in found if node["tag"] == "exercise"} == set(exercises.texts())
    used = {node["name"] for node in found if node["tag"] == "worked"}
    assert {*worked_reasoning.EXAMPLES, *worked_challenges.EXAMPLES} <= used


def commands() -> list[str]:
    """Every command of the three chapters and of the exercises, a line each."""
    fences = [node["children"][0] for chapter in CHAPTERS for node in nodes_of(chapter) if node["tag"] == "command"]
    for exercise in exercises.texts().values():
        fences += re.findall(r"```command\n(.*?)```", exercise.get("text", ""), re.DOTALL)
    lines = [line.partition("  #")[0].strip() for fence in fences for line in fence.splitlines()]
    return sorted({line for line in lines if line.startswith("posttrain ")})


OPTIONS = {
    "tasks": "data.tasks",
    "reward": "reward.name",
    "preset": "algo.preset",
    "out": "run.out",
    "model": "model.path",
}


def test_every_command_exists_and_every_setting_of_a_training_command_does() -> None:
    trained = 0
    for line in commands():
        command, *rest = shlex.split(line)[1:]
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0, line
        if command in RECIPES:
            words = [f"--{OPTIONS.get(word[2:], word[2:])}" if word.startswith("--") else word for word in rest]
            assert read_recipe(command, words)[1] is not None
            trained += 1
    assert trained > 10


# --- worked examples ------------------------------------------------------------------------------------------------


def test_worked_numbers_of_chapter_four_are_those_worked_by_hand() -> None:
    group = worked_reasoning.group_advantage()
    spread = math.sqrt((2 * 0.75**2 + 6 * 0.25**2) / 7)
    assert [step.result for step in group.steps] == [
        "0.250",
        f"{spread:.3f}",
        f"{0.75 / spread:.3f}",
        f"{-0.25 / spread:.3f}",
    ]
    assert group.rows[0][4] == f"{1 - 1 / 7:.3f}"
    clip = worked_reasoning.clip_and_kl()
    assert [row[4] for row in clip.rows] == ["1.100", "1.200", "-1.100", "-0.800"]
    assert [row[5] for row in clip.rows] == ["no", "yes", "no", "yes"]
    assert clip.rows[0][6] == f"{0.25 / 0.33 - 1 - math.log(0.25 / 0.33):.3f}"
    base = {row[0]: float(row[1]) for row in worked_reasoning.group_baseline().rows}
    assert base["none"] == base["leave one out"] == 0.21 and base["group mean"] == pytest.approx(0.21 * 3 / 4)
    assert worked_reasoning.coverage().steps[0].result == f"{1 - math.comb(122, 16) / math.comb(128, 16):.3f}"
    assert worked_reasoning.voting().rows[1][1:] == ("0.648", "0.352")
    assert [row[3] for row in worked_reasoning.best_and_price().rows] == ["0.000", "0.193", "0.636", "1.204"]
    assert worked_reasoning.step_scores().rows[1] == ("all right", f"{0.95 * 0.9 * 0.2 * 0.85:.3f}", "0.336")
    assert worked_reasoning.ratios().steps[0].result == f"{1.8**0.25:.3f}"
    assert worked_reasoning.shares().rows[0][1:3] == ("0.250", "0.083")


def test_worked_numbers_of_chapters_five_and_six_are_those_worked_by_hand() -> None:
    step = worked_challenges.nanochat_step()
    assert [row[2] for row in step.rows] == [f"{0.75 / 160:.5f}", f"{-0.25 / 160:.5f}", f"{-0.25 / 320:.5f}"]
    flat = worked_challenges.flat_share()
    assert flat.rows[1][1] == f"{0.17**4 + 0.83**4:.3f}"
    assert flat.rows[1][2] == f"{0.8 * (0.01**4 + 0.99**4) + 0.2 * (0.81**4 + 0.19**4):.3f}"
    assert all(row[2] == row[3] for row in worked_challenges.thinking().rows)
    assert all(row[3] == row[4] for row in worked_challenges.covariance().rows)
    assert worked_challenges.entropies().rows[0][1:3] == ("0.250", f"{math.log(4):.3f}")
    assert all(float(row[2]) <= float(row[3]) for row in worked_challenges.pinsker().rows)
    fit = worked_challenges.gao_fit()
    assert fit.steps[1].result == "0.74" and float(fit.rows[3][3]) < 0 < float(fit.rows[1][3])


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with opened(tmp_path_factory.mktemp("runs")) as lab:
        yield lab


def test_a_coding_exercise_is_solved_by_keyboard(lab: Any, page: Page) -> None:
    if "unavailable" in exercises.checked("simple-grpo", {"code": ""}):
        pytest.skip("needs the code sandbox")
    page.goto(f"{lab.address}/learn/reasoning")
    box = page.locator('.exercise[data-name="simple-grpo"]')
    field = box.get_by_label("Your code")
    field.focus()
    page.keyboard.press("Control+Enter")
    expect(box.get_by_text("Not yet.")).to_be_visible()
    expect(box.locator(".cases .bad").first).to_contain_text("failed: sampling from the policy")
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(SOLUTIONS["simple-grpo"])
    page.keyboard.press("Tab")  # leaves the field, to the button
    page.keyboard.press("Enter")
    expect(box.get_by_text("✓ Passed.")).to_be_visible()
    assert box.locator(".cases .bad").count() == 0
    page.reload()
    expect(box.get_by_label("Your code")).to_have_value(SOLUTIONS["simple-grpo"])


def test_enter_keeps_the_depth_of_a_line_and_goes_deeper_after_a_colon(lab: Any, page: Page) -> None:
    page.goto(f"{lab.address}/learn/reasoning")
    field = page.locator('.exercise[data-name="simple-grpo"]').get_by_label("Your code")
    field.fill("")
    page.keyboard.type("def f(x):\nif x:\nreturn 1")
    expect(field).to_have_value("def f(x):\n    if x:\n        return 1")


def test_a_question_says_what_is_wrong_with_a_choice_and_what_is_right(lab: Any, page: Page) -> None:
    page.goto(f"{lab.address}/learn/reasoning")
    box = page.locator('.exercise[data-name="many-completions"]')
    box.get_by_role("radio").nth(1).focus()
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    expect(box.get_by_role("status")).to_contain_text("✗ Incorrect.")
    box.get_by_role("radio").nth(1).focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(box.get_by_role("status")).to_contain_text("✓ Correct.")


def test_the_file_with_its_tests_can_be_downloaded(lab: Any, page: Page) -> None:
    page.goto(f"{lab.address}/learn/challenges")
    box = page.locator('.exercise[data-name="reward-hacking"]')
    with page.expect_download() as waiting:
        box.get_by_role("button", name="Download with tests").click()
    assert waiting.value.suggested_filename == "reward_hacking.py"
    assert "def test_case" in Path(waiting.value.path()).read_text(encoding="utf-8")
