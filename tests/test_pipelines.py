"""Pipelines: what their files may say, what is run again and what is not, and kills at any moment."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import pipelines as full
from posttrain.cli import main as cli
from posttrain.pipelines.recipe import read_pipeline
from posttrain.pipelines.runner import PipelineResult, Screen, read_records, run_pipeline, stage_keys
from posttrain.store import durable
from posttrain.store.run import Run
from posttrain.types import ConfigError, ResumeError
from tests import pipeline_life, tiny
from tests.test_report import checked

SMALL = """
pipeline = "small"
about = "Five stages and a model of two layers."
[defaults.train]
threads = 1
steps = 2
[defaults.run]
checkpoint_every = 1
[defaults.eval]
problems = 2
[defaults.rollout]
max_tokens = 6
slots = 16
[card]
helpfulness = "sums"
safety = ""
over_refusal = ""
reasoning = "asked.jsonl"
problems = 2
prompts = 2
max_tokens = 6
threads = 1
[[stage]]
name = "base"
run = "model"
path = "tiny"
[[stage]]
name = "shown"
run = "demonstrations"
tasks = "sums"
count = 12
[[stage]]
name = "sft"
run = "sft"
model.path = "{base}"
data.tasks = "{shown}*2 + own.jsonl*1"
algo.batch_rows = 4
[[stage]]
name = "preferences"
run = "preferences"
model = "{sft}"
tasks = "sums"
count = 6
max_tokens = 6
length = 0.5
[[stage]]
name = "reward"
run = "reward"
model.path = "{sft}"
data.tasks = "{preferences}"
algo.batch_pairs = 2
[[stage]]
name = "grpo"
run = "grpo"
reference = "{sft}"
model.path = "{sft}"
data.tasks = "sums"
data.count = 16
reward.name = "model:{reward}"
algo.prompts = 2
algo.group_size = 3
[[figure]]
kind = "curves"
name = "learning"
stages = ["grpo"]
metrics = ["reward"]
[mini]
grpo.train.steps = 1
"defaults.rollout.slots" = 8
[expect]
"grpo.length" = [0, 6]
"figure.learning.last.grpo.reward" = [-1000, 1000]
"""
BELOW = {
    "base": {"base", "sft", "preferences", "reward", "grpo"},
    "shown": {"shown", "sft", "preferences", "reward", "grpo"},
    "sft": {"sft", "preferences", "reward", "grpo"},
    "preferences": {"preferences", "reward", "grpo"},
    "reward": {"reward", "grpo"},
    "grpo": {"grpo"},
}
"""Stage → what has to be made anew when it changes."""
CHANGES = {
    "shown": {"shown.seed": 1},
    "sft": {"sft.train.lr": 2e-3},
    "preferences": {"preferences.noise": 0.25},
    "reward": {"reward.train.lr": 2e-3},
    "grpo": {"grpo.algo.kl_coef": 0.5},
}
LIVES = multiprocessing.get_context("forkserver")
LIVES.set_forkserver_preload(["tests.pipeline_life"])
Made = dict[str, tuple[Any, ...]]


def furnish(place: Path) -> Path:
    """A folder with the recipe and all that it reads."""
    place.mkdir(exist_ok=True)
    tiny.stopping(tiny.chatty(place / "tiny"))
    (place / "small.toml").write_text(SMALL)
    rows = [{"prompt": f"Say {word}.", "completion": word * 2} for word in ("ab", "cd", "ef", "gh")]
    (place / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    (place / "asked.jsonl").write_text('{"prompt": "2+2?", "answer": "4"}\n{"prompt": "3+3?", "answer": "6"}\n')
    return place


def life(place: Path, *words: str, moment: str = "", number: int = signal.SIGKILL, seconds: float | None = None) -> int:
    """Runs the pipeline in a process; its exit code, negative for the signal that ended it."""
    options = (str(place), ["small.toml", "--out", "out", *words], moment, number)
    process = LIVES.Process(target=pipeline_life.live, args=options)
    with contextlib.chdir(Path(__file__).parents[1]):  # where the fork server, begun by the first, finds what to load
        process.start()
    process.join(seconds)
    if seconds is not None and process.is_alive():
        process.kill()
    process.join(300)
    assert process.exitcode is not None, "the pipeline hangs"
    return process.exitcode


def made_in(place: Path) -> Made:
    """Everything that must be equal whatever happened on the way: stores, weights, data, cards and answers."""
    found: Made = {}
    for record in read_records(place / "out"):
        folder = place / "out" / record.folder
        digest = None
        if (folder / "run.json").exists():
            with Run.read(folder) as run:
                digest = run.digest()
        card = place / "out" / record.card_folder
        files = (
            folder / "model/model.safetensors",
            folder / "data.jsonl",
            card / "card.json",
            card / "answers.jsonl",
        )
        read = [file.read_bytes() for file in files if file.exists()]
        found[record.name] = (record.folder, digest, *read)
    assert found, "nothing has been made"
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that ran in one go."""
    place = furnish(tmp_path_factory.mktemp("pipeline") / "whole")
    assert life(place) == 0, (place / "said").read_text()
    return place


@pytest.fixture
def copy(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the test runs."""
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def again(settings: dict[str, Any] | None = None, stage: str = "") -> tuple[PipelineResult, set[str], set[str]]:
    """Runs the pipeline here: what came out, the stages that ran and those whose model was evaluated."""
    said: list[str] = []
    ended = run_pipeline(read_pipeline(Path("small.toml"), settings), Path("out"), Screen(said.append), stage)
    made = {found[1] for line in said if (found := re.fullmatch(r"stage \d of 6, (\S+) \(\S+\): starting", line))}
    evaluated = {line.removeprefix("  evaluating ") for line in said if line.startswith("  evaluating ")}
    return ended, made, evaluated


# --- what a file may say --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A furnished folder in which nothing has run."""
    folder = furnish(tmp_path_factory.mktemp("files") / "place")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def test_a_stage_is_resolved_with_the_defaults_that_its_algorithm_knows(place: Path) -> None:
    stages = {stage.name: stage for stage in read_pipeline(place / "small.toml").stages}
    grpo = stages["grpo"].resolve({"sft": "x/model", "reward": "y/model"})
    assert (grpo.rollout.slots, grpo.train.steps, grpo.model.path) == (16, 2, "x/model")
    assert grpo.reward.name == "model:y/model"
    assert stages["sft"].resolve({"base": "tiny", "shown": "d.jsonl"}).data.tasks == "d.jsonl*2 + own.jsonl*1"
    assert [stage.card for stage in stages.values()] == [True, False, True, False, False, True]


def test_the_miniature_changes_stages_and_defaults_and_expects_nothing(place: Path) -> None:
    mini = read_pipeline(place / "small.toml", mini=True)
    (grpo,) = (stage for stage in mini.stages if stage.name == "grpo")
    recipe = grpo.resolve({"sft": "sft", "reward": "reward"})
    assert (recipe.train.steps, recipe.rollout.slots, mini.expect) == (1, 8, {})
    given = read_pipeline(place / "small.toml", {"grpo.train.steps": "3", "defaults.rollout.slots": "4"}, mini=True)
    recipe = given.stages[-1].resolve({"sft": "sft", "reward": "reward"})
    assert (recipe.train.steps, recipe.rollout.slots) == (3, 4), "what is said at the call wins"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[card]", "[crad]", "unknown table 'crad'. Did you mean 'card'?"),
        ('run = "grpo"', 'run = "gpro"', "stage 'grpo': unknown run = 'gpro'. Did you mean 'grpo'?"),
        ('run = "demonstrations"', 'run = "demonstration"', "Did you mean 'demonstrations'?"),
        (
            "algo.group_size",
            "algo.groupsize",
            "stage 'grpo': unknown setting algo.'groupsize'. Did you mean",
        ),
        ("count = 12", "cuont = 12", "stage 'shown': unknown setting 'cuont'. Did you mean 'count'?"),
        ("algo.group_size = 3", "algo.group_size = 1", "stage 'grpo': group_size=1 gives"),
        ('reference = "{sft}"', 'reference = "{stf}"', "stage 'grpo' uses {stf}, but no earlier stage has that name"),
        ('model = "{sft}"', 'model = "{grpo}"', "stage 'preferences' uses {grpo}, but no earlier stage has that name"),
        (
            'path = "tiny"',
            'path = "{sft}"',
            "stage 'base' uses {sft}, but no earlier stage has that name; it is the first",
        ),
        ('name = "reward"', 'name = "sft"', "the stage name 'sft' is taken"),
        ('name = "shown"', 'name = "defaults"', "the stage name 'defaults' is taken"),
        ('name = "shown"', 'name = "Shown!"', "stage name 'Shown!' is not valid"),
        ("slots = 16", "slotz = 16", "unknown setting 'defaults.rollout.slotz'. Did you mean 'rollout.slots'?"),
        ("[defaults.rollout]", "[defaults.rolout]", "unknown setting 'defaults.rolout.max_tokens'"),
        ("[0, 6]", "[6, 0]", "expect.grpo.length=[6, 0] is not [lowest, highest]"),
        ("[0, 6]", "[nan, 6]", "is not [lowest, highest]"),
        ("[0, 6]", "3", "expect.grpo.length=3 is not [lowest, highest]"),
        ('"grpo.length"', '"gppo.length"', "expect.gppo.length: 'gppo' is not a stage. Did you mean 'grpo'?"),
        ("prompts = 2\nmax", "prompts = -2\nmax", "prompts=-2 is negative"),
        ('stages = ["grpo"]', 'stages = ["gppo"]', "figure 'learning': 'gppo' is not a stage. Did you mean 'grpo'?"),
        ("[mini]\n", '[mini]\n"gppo.train.steps" = 1\n', "no stage is named 'gppo'. Did you mean 'grpo'?"),
        (
            "card]\n",
            'card]\nreasonning = "sums"\n',
            "unknown setting 'card.reasonning'. Did you mean",
        ),
        ('pipeline = "small"', 'pipeline = "A B"', "`pipeline = 'A B'` is not a valid name"),
        ('pipeline = "small"', "pipeline = ", "is not valid TOML"),
        ("[[figure]]", "[[figure]]\nkind = 'cards'\nname = 'learning'\n[[figure]]", "two figures are named 'learning'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_a_sentence_that_says_where(
    place: Path, old: str, new: str, says: str
) -> None:
    assert SMALL.count(old) >= 1
    (place / "wrong.toml").write_text(SMALL.replace(old, new, 1))
    done = CliRunner().invoke(cli.main, ["pipeline", "wrong.toml", "--mini", "--out", "nothing"])
    assert done.exit_code == 2 and says in done.output and "wrong.toml" in done.output, done.output
    assert "Traceback" not in done.output and not (place / "nothing").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("pipeline small.toml --grppo.train.steps 2", "no stage is named 'grppo'. Did you mean 'grpo'?"),
        ("pipeline small.toml --grpo.train.stesp 2", "stage 'grpo': unknown setting 'train.stesp'"),
        ("pipeline small.toml --steps 2", "setting 'steps' must be STAGE.SETTING"),
        ("pipeline small.toml --again gppo", "no stage is named 'gppo'. Did you mean 'grpo'?"),
        ("pipeline", "name one pipeline (constitution, diversity,"),
        ("pipeline nowhere", "recipe 'nowhere' does not exist"),
        ("pipeline demo", "is a single run, not a pipeline; use `posttrain grpo "),
        ("grpo small.toml", "small.toml is a pipeline of several runs; use `posttrain pipeline small.toml`"),
        ("grpo rlhf", "is a pipeline of several runs; use `posttrain pipeline "),
        ("config rlhf", "is a pipeline of several runs; use `posttrain pipeline "),
    ],
)
def test_a_call_that_is_wrong_is_refused_in_a_sentence(place: Path, words: str, says: str) -> None:
    done = CliRunner().invoke(cli.main, words.split())
    assert done.exit_code == 2 and says in done.output and "Traceback" not in done.output, done.output


# --- what is made anew ----------------------------------------------------------------------------------------------


def test_a_pipeline_shows_its_cards_expectations_and_report(whole: Path) -> None:
    said = (whole / "said").read_text()
    assert "expected results: 2 of 2 met" in said and "report: out/report.html" in said
    assert {path.name for path in (whole / "out/figures").iterdir()} == {"learning.png", "learning.svg"}
    checked(whole / "out/report.html")


@pytest.mark.parametrize("stage", CHANGES)
def test_a_changed_setting_changes_the_keys_of_a_stage_and_those_below_it_and_no_other(place: Path, stage: str) -> None:
    before = stage_keys(read_pipeline(place / "small.toml"))
    after = stage_keys(read_pipeline(place / "small.toml", CHANGES[stage]))
    assert {name for name in before if before[name] != after[name]} == BELOW[stage]


@pytest.mark.parametrize(("file", "stage"), [("own.jsonl", "sft"), ("tiny/model.safetensors", "base")])
def test_what_is_in_a_file_counts_and_where_it_is_written_of_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, stage: str
) -> None:
    monkeypatch.chdir(furnish(tmp_path / "place"))
    before = stage_keys(read_pipeline(Path("small.toml")))
    Path(file).touch()
    assert stage_keys(read_pipeline(Path("small.toml"))) == before
    Path(file).write_bytes(Path(file).read_bytes()[:-2] + b"}\n")
    Path(file).write_bytes(Path(file).read_bytes() + b"\n")
    after = stage_keys(read_pipeline(Path("small.toml")))
    assert {name for name in before if before[name] != after[name]} == BELOW[stage]


def test_run_a_second_time_nothing_is_made_or_evaluated(copy: Path, whole: Path) -> None:
    ended, made, evaluated = again()
    assert (made, evaluated) == (set(), set()) and made_in(copy) == made_in(whole)
    first = json.loads((whole / "out/pipeline.json").read_text())["results"]
    assert ended.results == first and not ended.missed, "the seconds of what is kept are kept, too"


def test_a_change_makes_what_is_below_it_anew_and_going_back_finds_the_old(copy: Path, whole: Path) -> None:
    _, made, evaluated = again(CHANGES["reward"])
    assert (made, evaluated) == ({"reward", "grpo"}, {"grpo"})
    assert made_in(copy)["grpo"] != made_in(whole)["grpo"]
    ended, made, evaluated = again()
    assert (made, evaluated) == (set(), set())
    assert ended.results == json.loads((whole / "out/pipeline.json").read_text())["results"]


def test_how_models_are_evaluated_changes_cards_and_no_stage(copy: Path) -> None:
    assert again({"card.samples": 3})[1:] == (set(), {"base", "sft", "grpo"})
    assert again()[1:] == (set(), set()), "the cards from before are still there"
    Path("asked.jsonl").write_text('{"prompt": "4+4?", "answer": "8"}\n')
    assert again()[1:] == (set(), {"base", "sft", "grpo"}), "other questions"


def test_a_stage_is_made_again_on_request_and_comes_out_the_same(copy: Path, whole: Path) -> None:
    _, made, evaluated = again(stage="reward")
    assert (made, evaluated) == ({"reward"}, set())
    assert made_in(copy) == made_in(whole)


def test_an_expectation_that_no_result_has_is_named_and_one_that_is_missed_is_told(copy: Path) -> None:
    Path("small.toml").write_text(SMALL.replace("grpo.length", "grpo.lenght"))
    with pytest.raises(
        ConfigError, match=r"expect.grpo.lenght is not one of its results. Did you mean 'grpo.length'\?"
    ):
        again()
    Path("small.toml").write_text(SMALL.replace("[0, 6]", "[7, 8]"))
    ended, _, _ = again()
    assert ended.missed == {"grpo.length": (7.0, 8.0)}


# --- stops ----------------------------------------------------------------------------------------------------------


# Each names the next thing of its kind that a life of the pipeline does, counted from the life's beginning.
MOMENTS = (
    "made.json:1",  # in the first data stage, its data written
    "write:2",  # in a step of the first training
    "finish:1",  # its model saved, its end not
    "pipeline.json:4",  # between a stage and its evaluation
    "answers.jsonl:1",  # in an evaluation
    "card.json:1",
    "run.json:1",  # a training's folder begun
    "write:2",  # in a step of it
)


def test_killed_at_any_moment_and_called_again_it_ends_as_one_that_ran_through(whole: Path, tmp_path: Path) -> None:
    place = furnish(tmp_path / "place")
    for moment in MOMENTS:
        assert life(place, moment=moment) == -signal.SIGKILL, f"the moment {moment} never came"
        assert not (place / "out/report.html").exists()
    assert life(place) == 0, (place / "said").read_text()
    assert made_in(place) == made_in(whole)


def test_killed_at_random_moments_it_ends_as_one_that_ran_through(whole: Path, tmp_path: Path) -> None:
    place, chance, killed = furnish(tmp_path / "place"), random.Random(0), 0
    for _ in range(6):
        killed += life(place, seconds=chance.uniform(0.3, 1.5)) == -signal.SIGKILL
    assert killed >= 2, "the moments were all after the end; the test proves nothing"
    assert life(place) == 0, (place / "said").read_text()
    assert made_in(place) == made_in(whole)


@pytest.mark.parametrize(
    ("moment", "number", "code", "says"),
    [
        ("made.json:2", signal.SIGINT, 130, "stopped."),  # in a data stage, which begins anew
        ("write:2", signal.SIGTERM, 143, "Stopped and saved."),
        ("write:3", signal.SIGINT, 130, "Stopped and saved."),  # the last step of a stage, which then is whole
    ],
)
def test_a_polite_signal_stops_it_with_its_exit_code_and_the_same_command_goes_on(
    whole: Path, tmp_path: Path, moment: str, number: int, code: int, says: str
) -> None:
    place = furnish(tmp_path / "place")
    assert life(place, moment=moment, number=number) == code
    said = (place / "said").read_text()
    assert says in said and "Traceback" not in said and "stage 5" not in said
    assert life(place) == 0, (place / "said").read_text()
    assert made_in(place) == made_in(whole)


def test_a_pipeline_that_another_process_runs_is_refused(copy: Path) -> None:
    lock = durable.FolderLock(Path("out"))
    assert life(copy) == 7
    assert f"in use by another process (pid {os.getpid()})" in (copy / "said").read_text()
    with pytest.raises(ResumeError, match="in use"):
        again()
    lock.release()
    assert again()[1:] == (set(), set())


# --- the record of a full run ---------------------------------------------------------------------------------------


def test_the_hash_of_a_recipe_covers_its_settings_and_nothing_that_is_said_of_them(place: Path) -> None:
    known = full.recipe_sha256(read_pipeline(place / "small.toml"))
    for old, new, same in (
        ("[0, 6]", "[0, 7]", True),
        ("Five stages", "# Stages", True),
        ("length = 0.5", "length = 0.25", False),
        ("steps = 2", "steps = 3", False),
        ("prompts = 2\nmax", "prompts = 4\nmax", False),
        ('reference = "{sft}"', 'reference = "{base}"', False),
    ):
        (place / "other.toml").write_text(SMALL.replace(old, new, 1))
        assert (full.recipe_sha256(read_pipeline(place / "other.toml")) == known) == same, new


def test_a_finished_folder_is_recorded_and_one_with_other_settings_is_refused(copy: Path) -> None:
    recipe = read_pipeline(Path("small.toml"))
    full.require_run_of(recipe, Path("out"))
    kept = full.recorded(recipe, Path("out"))
    assert kept["results"]["grpo.length"] >= 0 and full.missed(recipe, kept["results"]) == []
    assert full.missed(recipe, {"grpo.length": 9.0}) == [
        "grpo.length is 9.0, expected 0 to 6",
        "figure.learning.last.grpo.reward is None, expected -1000 to 1000",
    ]
    with pytest.raises(ConfigError, match="other settings of reward, grpo"):
        full.require_run_of(read_pipeline(Path("small.toml"), CHANGES["reward"]), Path("out"))
    Path("small.toml").write_text(SMALL.replace("prompts = 2\nmax", "prompts = 4\nmax"))
    with pytest.raises(ConfigError, match="other settings of card"):
        full.require_run_of(read_pipeline(Path("small.toml")), Path("out"))
