"""The command line as a person uses it: right input, wrong input, exit codes, JSON, signals and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from posttrain import config
from posttrain.cli import main as cli
from posttrain.store.run import Run
from tests import tiny

TINY = "--tasks sums --reward {reward} --data.count 32 --eval.problems 4 --prompts 2 --group-size 4 --max-tokens 8"
VOWELS = Path(__file__).parent / "vowels.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model in it, where the commands run."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.chatty(folder / "tiny")
    (folder / "rows.jsonl").write_text('{"prompt": "Hi", "completion": "yo"}\n' * 4 + '{"text": "hello there"}\n' * 4)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def call(command: str, *more: str) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(cli.main, [*command.format(reward=f"{VOWELS}:vowels").split(), *more])


@pytest.fixture(scope="module")
def run(place: Path) -> dict[str, Any]:
    """A finished two-step GRPO run, made with --json."""
    result = call(f"grpo --model tiny {TINY} --steps 2 --out runs/a --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_help_names_every_command_and_answers_without_torch() -> None:
    code = "import sys; from posttrain.cli.main import main; main(['--help'], standalone_mode=False);"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("demo", "sft", "grpo", "eval", "sample", "chat", "runs", "resume", "config", "doctor"):
        assert f"\n  {name} " in done.stdout
    assert done.stdout.endswith("False\n"), "torch was loaded to print a help text"


def test_a_run_that_may_not_fit_says_so_before_its_first_step_and_keeps_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.planner.estimate.machine_memory", lambda cuda: 1 << 20)
    result = call(f"grpo --model tiny {TINY} --steps 1 --out {tmp_path}/run")
    assert result.exit_code == 0, result.output
    said = [line for line in result.stdout.splitlines() if line.startswith(("warning:", "step 0"))]
    assert [line.split()[0] for line in said] == ["warning:", "step"]
    with Run.read(tmp_path / "run") as store:
        (kept,) = [event.message for event in store.events() if event.kind == "memory"]
    assert said[0] == f"warning: {kept}" and "only 1 MiB is available" in kept


def test_a_run_reports_its_folder_and_what_changed_as_json(run: dict[str, Any], place: Path) -> None:
    assert run["folder"] == "runs/a" and run["summary"]["steps"] == 2
    assert {"eval/accuracy", "eval/length"} <= run["summary"]["before"].keys() & run["summary"]["after"].keys()
    assert (place / "runs/a/model/model.safetensors").exists() and (place / "runs/a/curve.png").stat().st_size > 1000


def test_runs_lists_it_and_resume_says_that_it_is_finished(run: dict[str, Any]) -> None:
    assert json.loads(call("runs --json").stdout) == [{"path": "runs/a", "status": "finished", "step": 2, "note": ""}]
    assert "finished" in call("runs").output
    done = call("resume runs/a")
    assert done.exit_code == 0 and "nothing to resume" in done.output


def test_eval_of_a_run_uses_the_runs_own_settings_and_gives_intervals(run: dict[str, Any]) -> None:
    report = json.loads(call("eval runs/a --samples 4 --json").stdout)
    assert report["tasks"] == 4 and report["samples"] == 4
    assert report["accuracy"]["low"] <= report["accuracy"]["value"] <= report["accuracy"]["high"]
    assert report["pass_at"].keys() == report["maj_at"].keys() == {"2", "4"}
    table = call("eval runs/a --samples 4").output
    assert "pass@4" in table and "95 % interval" in table


def test_sample_gives_n_answers_that_repeat_with_their_seed(run: dict[str, Any]) -> None:
    first = json.loads(call("sample runs/a Hi -n 3 --max-tokens 5 --json").stdout)
    again = json.loads(call("sample runs/a/model Hi -n 3 --max-tokens 5 --json").stdout)
    assert len(first) == 3 and first == again, "the run and its exported model are the same weights"
    assert all(len(a["tokens"]) == len(a["logprobs"]) <= 5 for a in first)
    assert len({tuple(a["tokens"]) for a in first}) > 1
    assert first != json.loads(call("sample runs/a Hi -n 3 --max-tokens 5 --seed 1 --json").stdout)


def test_chat_answers_each_line_until_an_empty_one(run: dict[str, Any]) -> None:
    done = CliRunner().invoke(cli.main, ["chat", "runs/a", "--max-tokens", "4"], input="Hello\nAgain\n\n")
    assert done.exit_code == 0 and done.output.count("\n> ") == 3


def test_sampling_a_run_that_was_trained_in_an_environment_says_that_it_is_not_used(
    place: Path, tmp_path: Path
) -> None:
    done = call(f"grpo --model tiny {TINY} --steps 1 --env.name number --count 20 --out {tmp_path}/guess")
    assert done.exit_code == 0, done.output
    for model in (f"{tmp_path}/guess", f"{tmp_path}/guess/model"):
        asked = call(f"sample {model} Guess. --max-tokens 3 --json")
        assert len(json.loads(asked.stdout)) == 1
        assert f"{tmp_path}/guess was trained in the environment 'number', which is not used here" in asked.stderr
    talked = CliRunner().invoke(cli.main, ["chat", f"{tmp_path}/guess", "--max-tokens", "2"], input="\n")
    assert "`posttrain eval" in talked.stderr
    assert "environment" not in call("sample tiny Hi --max-tokens 3 --json").stderr


def test_sft_trains_on_chats_and_texts_from_one_file(place: Path) -> None:
    done = call("sft --model tiny --data rows.jsonl --batch-rows 2 --lr 1e-2 --out runs/sft --data.holdout 0 --json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["summary"]["steps"] == 4, "one pass over 8 rows, 2 a step"


def test_config_prints_a_recipe_that_resolves_to_itself(place: Path) -> None:
    printed = call("config demo --prompts 4").output
    assert "prompts = 4" in printed and "# Tasks per step." in printed
    (place / "again.toml").write_text(printed)
    assert call("config again.toml").output == printed
    assert call("config grpo --bare").output == config.as_toml("grpo", config.resolve("grpo", {}), explain=False)


def test_doctor_measures_this_machine() -> None:
    names = [finding["name"] for finding in json.loads(call("doctor --json").stdout)]
    assert {"CPU", "GPU", "model hub", "faster dtype for decoding"} <= set(names)


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("grpo --lrr 3", 2, "Did you mean 'lr'?"),
        ("grpo --group-size 1", 2, "advantage of 0"),
        ("grpo --temperature 1", 2, "ambiguous"),
        ("grpo --lr fast", 2, "is not a number"),
        ("grpo --lr", 2, "has no value"),
        ("grpo nowhere.toml", 2, "does not exist"),
        ("grpo demo gsm8k", 2, "expected one recipe"),
        ("sft demo", 2, "is for `posttrain grpo`"),
        ("grpo --model nowhere/at/all", 2, "does not exist"),
        ("grpo --model tiny --tasks sumz", 2, "Did you mean 'sums'?"),
        ("grpo --model tiny --reward nothing.py:f", 2, "does not exist"),
        ("grpo --model tiny --tasks nowhere.jsonl", 3, "nowhere.jsonl"),
        ("grpo --model tiny --tasks broken.jsonl", 3, "broken.jsonl:2"),
        ("grpo --model tiny --tasks sums --max-prompt-tokens 3", 3, "longer than"),
        ("grpo --model plain --tasks sums", 4, "data.format"),
        ("sft --model tiny --data broken.jsonl", 3, "broken.jsonl:2"),
        ("eval tiny extra", 2, "unexpected argument"),
        ("dpo --model tiny --data unequal.jsonl", 3, "unequal.jsonl:2: the row has 'chosen' but no 'rejected'"),
        ("dpo --model tiny --data identical.jsonl", 3, "identical.jsonl:1"),
        ("dpo --model tiny --data identical.jsonl --beta 0", 2, "algo.beta=0.0"),
        ("dpo --model tiny --data identical.jsonl --loss ipoo", 2, "is not one of sigmoid"),
        ("reward --model tiny --data identical.jsonl", 3, "same text"),
        ("ppo --model tiny --tasks sums --critic_init tiny", 2, "has no scalar head"),
        ("grpo --model tiny --tasks sums --reward model:tiny", 2, "has no scalar head"),
        ("probe tiny", 2, "has no scalar head"),
        ("grpo --preset dappo", 2, "Did you mean 'dapo'?"),
        ("presets sft", 2, "has no presets"),
        ("distill --model tiny --tasks sums", 2, "algo.teacher is empty"),
        ("resume nowhere", 7, "nowhere"),
        ("config", 2, "name a recipe"),
        ("grpo --model tiny --out taken --steps 1", 7, "taken"),
        ("frobnicate", 2, "No such command"),
    ],
)
def test_wrong_input_is_one_clear_line_and_an_exit_code(place: Path, command: str, code: int, says: str) -> None:
    (place / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    pair = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (place / "unequal.jsonl").write_text(pair + '{"prompt": "a", "chosen": "b"}\n')
    (place / "identical.jsonl").write_text(pair.replace('"c"', '"b"'))
    if "plain" in command:
        tiny.make(place / "plain")
    if "taken" in command:
        (place / "taken").mkdir(exist_ok=True)
        (place / "taken" / "run.json").write_text("{}")
    done = call(command)
    assert done.exit_code == code and says in done.output, done.output
    assert "Traceback" not in done.output


def test_a_reward_that_fails_stops_the_run_and_says_which_attempt(place: Path) -> None:
    (place / "bad.py").write_text("def bad(completion, answer, **task):\n    return float('nan')\n")
    done = call(f"grpo --model tiny {TINY.replace('{reward}', 'bad.py:bad')} --steps 1 --out runs/bad")
    assert done.exit_code == 5 and "could not be scored" in done.output and "nan" in done.output


def test_rewards_that_never_differ_stop_the_run_with_the_reason(place: Path) -> None:
    (place / "flat.py").write_text("def flat(completion, answer, **task):\n    return 0.5\n")
    options = "--steps 9 --max-flat-steps 3 --out runs/flat"
    done = call(f"grpo --model tiny {TINY.replace('{reward}', 'flat.py:flat')} {options}")
    assert done.exit_code == 6 and "equal rewards" in done.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_real_process_with_its_exit_code_and_resume_goes_on(
    place: Path, number: signal.Signals, code: int
) -> None:
    folder = place / f"runs/{number.name}"
    command = f"grpo --model tiny {TINY} --steps 3000 --checkpoint-every 1000 --out {folder}"
    words = [sys.executable, "-m", "posttrain", *command.format(reward=f"{VOWELS}:vowels").split()]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place)
    deadline = time.monotonic() + 600
    while not (folder / "run.db").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code and f"posttrain resume {folder}" in output, output
    assert json.loads(call("runs runs --json").stdout), "the runs can be listed"
    status = {r["path"]: r["status"] for r in json.loads(call(f"runs {folder.parent} --json").stdout)}
    assert status[str(folder)] == "interrupted"


def test_a_refused_run_leaves_no_folder_behind(place: Path) -> None:
    before = {path.name for path in (place / "runs").iterdir()}
    assert call("grpo --model tiny --tasks sumz").exit_code == 2
    assert {path.name for path in (place / "runs").iterdir()} == before
