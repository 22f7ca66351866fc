"""Run folders: one writer, any number of readers, steps whole or absent, and a digest that says what was learned."""

from __future__ import annotations

import math
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.store import database
from posttrain.store.database import connect
from posttrain.store.durable import DiskError
from posttrain.store.listing import list_runs, next_folder
from posttrain.store.run import EpisodeRow, Event, Run
from posttrain.types import DataError, Episode, ResumeError, Span
from tests.store_disk import in_memory

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.create(tmp_path / "run", {"algorithm": "grpo"}) as run:
        yield run


def row(index: int = 0, step: int = 1, kind: Any = "train", **changes: Any) -> EpisodeRow:
    spans = (Span("prompt", np.array([5, 6])), Span("model", np.array([7, 8, index]), np.full(3, -0.5, np.float32)))
    episode = Episode("task-1", 0, index, spans, "the answer", **{"reward": 1.0, "parts": {"exact": 1.0}, **changes})
    return EpisodeRow.of(kind, step, episode, "the question", 0.25)


def in_other_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys\nfrom pathlib import Path\nfrom posttrain.store.run import *\nfolder = Path(sys.argv[1])\n{code}"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def test_the_store_of_runs_does_not_import_torch() -> None:
    assert in_other_process("print('torch' in sys.modules)", ".").stdout.strip() == "False"


def test_a_step_comes_back_as_it_was_written(run: Run) -> None:
    written = [row(0), row(1, reward=None, error="no answer in time", passed=False, stop="length"), row(2)]
    events = [Event("warning", "flat", "all rewards were equal", {"share": 1.0})]
    run.write(1, {"loss": 0.1 + 0.2, "count": 3}, {"seconds": 1.5}, written, events)
    assert run.metrics() == [(1, "count", 3.0), (1, "loss", 0.1 + 0.2)] and run.metrics("nothing") == []
    assert run.timings("seconds") == [(1, "seconds", 1.5)]
    assert run.events() == [Event("warning", "flat", "all rewards were equal", {"share": 1.0}, step=1)]
    read = run.episodes("train")
    assert [r.values for r in read] == [r.values for r in written]
    assert read[1].reward is None and read[1].error == "no answer in time" and read[0].parts == {"exact": 1.0}
    assert read[2].tokens.tolist() == [5, 6, 7, 8, 2] and read[2].tokens.dtype == np.int32
    assert read[2].loss_mask.tolist() == [False, False, True, True, True]
    assert read[2].logprobs.tolist() == [0, 0, -0.5, -0.5, -0.5] and read[2].length == 3


def test_numbers_that_are_not_finite_survive(run: Run) -> None:
    run.write(
        0, {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "numpy": float(np.float32(0.5))}, {"t": math.nan}
    )
    values = {name: value for _, name, value in run.metrics()}
    assert math.isnan(values.pop("nan")) and values == {"inf": math.inf, "minus": -math.inf, "numpy": 0.5}
    assert math.isnan(run.timings()[0][2])


def test_text_that_utf8_cannot_hold_is_written_out(run: Run) -> None:
    run.write(1, {}, {}, [row(0, error="half \ud800 and nul \0 and 中文")])
    assert run.episodes("train")[0].error == "half \\ud800 and nul \0 and 中文"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused_rather_than_stored_as_unscored(run: Run, value: float) -> None:
    with pytest.raises(DataError, match=r"reward of train episode 0\.0 of step 1 is (nan|inf), expected a finite"):
        run.write(1, {"loss": 1.0}, {}, [row(reward=value)])
    assert run.last_step() is None, "nothing of a refused step is stored"


def test_a_metric_that_is_not_a_number_is_refused(run: Run) -> None:
    with pytest.raises(DataError, match="metric 'loss' is 'high', expected a number"):
        run.write(1, {"loss": "high"}, {})  # type: ignore[dict-item]


def test_rows_with_equal_keys_or_of_another_step_are_refused_and_nothing_is_stored(run: Run) -> None:
    with pytest.raises(DataError, match="the same key"):
        run.write(1, {"loss": 1.0}, {}, [row(0), row(0)])
    with pytest.raises(DataError, match="has step 2, but the write is for step 1"):
        run.write(1, {"loss": 1.0}, {}, [row(0, step=2)])
    assert run.metrics() == [] and run.episodes("train") == []


def test_a_replayed_step_replaces_itself_and_leaves_other_kinds_alone(run: Run) -> None:
    run.write(1, {"eval/accuracy": 0.5}, {}, [row(0, kind="eval")])
    run.write(1, {"loss": 1.0}, {}, [row(0), row(1), row(2)])
    run.write(1, {"loss": 2.0}, {}, [row(0)])
    assert run.metrics() == [(1, "eval/accuracy", 0.5), (1, "loss", 2.0)]
    assert len(run.episodes("train")) == 1 and len(run.episodes("eval")) == 1


def test_rewind_forgets_what_a_replay_may_do_differently_and_keeps_the_history_of_processes(run: Run) -> None:
    for step in range(4):
        run.write(step, {"loss": step}, {"s": 1.0}, [row(0, step)], [Event("info", "k", "told")])
    run.note(3, Event("info", "stopped", "by a person"))
    run.note(1, Event("info", "k", "told"))
    run.rewind(2)
    assert run.curve("loss") == ([0, 1], [0.0, 1.0]) and len(run.timings()) == len(run.episodes("train")) == 2
    assert [(event.step, event.kind) for event in run.events()] == [(0, "k"), (1, "k"), (1, "k"), (3, "stopped")]


def test_episodes_are_found_by_step_order_limit_and_offset(run: Run) -> None:
    for step in (1, 2):
        run.write(step, {}, {}, [row(i, step, reward=r) for i, r in enumerate([0.5, None, float(step)])])
    assert [r.step for r in run.episodes("train", step=2)] == [2, 2, 2]
    assert [r.reward for r in run.episodes("train", order="-reward")] == [2.0, 1.0, 0.5, 0.5, None, None]
    assert [r.reward for r in run.episodes("train", order="reward", limit=2, offset=1)] == [0.5, 1.0]
    assert run.episodes("eval") == []
    with pytest.raises(DataError, match="cannot be ordered by 'reward; DROP TABLE"):
        run.episodes("train", order="reward; DROP TABLE metrics")  # type: ignore[arg-type]


def test_status_tells_running_interrupted_and_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Run.create(folder, {}) as run, Run.read(folder) as reader:
        assert run.status() == reader.status() == "running"
        run.write(7, {"loss": 1.0}, {})
    with Run.read(folder) as reader:
        assert reader.status() == "interrupted" and reader.last_step() == 7 and reader.summary() is None
    with Run.open(folder) as run:
        run.finish({"reward": 0.9})
    with Run.read(folder) as reader:
        assert reader.status() == "finished" and reader.summary() == {"reward": 0.9}
    with Run.open(folder) as run:
        run.write(8, {"loss": 1.0}, {})
    with Run.read(folder) as reader:
        assert reader.status() == "interrupted", "training on makes a finished run unfinished"


def test_a_second_writer_is_refused_in_one_line_that_names_the_first(run: Run) -> None:
    second = in_other_process("Run.open(folder)", run.folder)
    line = second.stderr.strip().splitlines()[-1]
    owner = (run.folder / "LOCK").read_text().strip()
    assert second.returncode == 1
    assert line.endswith(
        f"run folder {run.folder} is in use by another process (pid {owner}). Wait for it to finish or stop it."
    )
    run.write(1, {"loss": 1.0}, {})


def test_the_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    code = "import os\nrun = Run.create(folder, {})\nrun.write(1, {'loss': 1.0}, {})\nos.kill(os.getpid(), 9)"
    assert in_other_process(code, tmp_path / "run").returncode == -9
    with Run.read(tmp_path / "run") as reader:
        assert reader.status() == "interrupted" and reader.metrics() == [(1, "loss", 1.0)]
    Run.open(tmp_path / "run").close()


def test_readers_asking_for_the_status_never_keep_a_writer_out(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", {}).close()
    code = "with Run.read(folder) as run:\n  print('go', flush=True)\n  while True: run.status()"
    prefix = "import sys\nfrom pathlib import Path\nfrom posttrain.store.run import *\nfolder = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", prefix + code, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        for _ in range(20):
            Run.open(tmp_path / "run").close()
        reader.kill()


def test_a_reader_follows_a_writer_and_cannot_write(run: Run) -> None:
    with Run.read(run.folder) as reader:
        for step in range(3):
            run.write(step, {"loss": step}, {}, [row(0, step)])
            assert reader.last_step() == step and reader.digest() == run.digest()
        for write in (lambda: reader.write(1, {}, {}), lambda: reader.finish({}), lambda: reader.rewind(0)):
            with pytest.raises(ResumeError, match="not open for writing"):
                write()
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._db.execute("DELETE FROM metrics")  # pyright: ignore[reportPrivateUsage]


def test_a_folder_that_holds_a_run_is_not_overwritten(run: Run) -> None:
    folder = run.folder
    run.close()
    with pytest.raises(ResumeError, match=r"already holds a run\. Resume it"):
        Run.create(folder, {})
    Run.open(folder).close()


def test_a_header_that_is_not_json_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the header of run .* is not JSON"):
        Run.create(tmp_path / "run", {"path": tmp_path})
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be created: Not a directory"):
        Run.create(tmp_path / "file" / "run", {})


def test_a_full_disk_keeps_every_earlier_step_and_the_run_goes_on_when_there_is_space(run: Run) -> None:
    run.write(1, {"loss": 1.0}, {})
    db = run._db  # pyright: ignore[reportPrivateUsage]
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    big = [row(i, 2, error="x" * 5000) for i in range(20)]
    with pytest.raises(DiskError, match="writing to run .* failed: database or disk is full"):
        run.write(2, {"loss": 2.0}, {}, big)
    assert run.metrics() == [(1, "loss", 1.0)]
    db.execute("PRAGMA max_page_count = 100000")
    run.write(2, {"loss": 2.0}, {}, big)
    assert run.last_step() == 2 and len(run.episodes("train")) == 20


def test_a_file_system_without_a_write_ahead_log_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="does not support SQLite's write-ahead log .*Put it on a local disk"):
        connect(tmp_path, "rwc", "&vfs=unix-none")  # an SQLite file layer without shared memory, like a network's


def test_a_newer_database_is_refused_and_an_older_one_is_upgraded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write(1, {"loss": 1.0}, {})
    folder = run.folder
    run.close()
    with monkeypatch.context() as newer:
        newer.setattr(database, "MIGRATIONS", [*database.MIGRATIONS, ("CREATE TABLE extra(a)",)])
        with pytest.raises(ResumeError, match="database version 2, but version 3 is needed. Resume the run once"):
            Run.read(folder)
        with Run.open(folder) as run:
            assert run.metrics() == [(1, "loss", 1.0)]
    for use in (Run.open, Run.read):
        with pytest.raises(ResumeError, match=r"database version 3, but this posttrain supports up to 2\. Upgrade"):
            use(folder)


def test_a_run_that_lacks_only_an_index_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(database, "MIGRATIONS", database.MIGRATIONS[:1])
        with Run.create(tmp_path / "run", {}) as run:
            run.write(1, {"loss": 1.0}, {}, [row(i, 1) for i in range(3)])
    with Run.read(tmp_path / "run") as run:
        assert len(run.episodes("train", order="-reward")) == 3
    with Run.open(tmp_path / "run"), Run.read(tmp_path / "run") as run:
        names = [name for (name,) in run._query("SELECT name FROM sqlite_master WHERE type = 'index'")]
    assert {"episodes_by_reward", "episodes_by_length"} <= set(names)


def damage(folder: Path, how: str) -> None:
    {
        "run.json is text": lambda: (folder / "run.json").write_text("{"),
        "run.json is a list": lambda: (folder / "run.json").write_text("[]"),
        "run.json is not UTF-8": lambda: (folder / "run.json").write_bytes(b"\xff"),
        "run.json is gone": lambda: (folder / "run.json").unlink(),
        "run.db is gone": lambda: (folder / "run.db").unlink(),
        "run.db is empty": lambda: (folder / "run.db").write_bytes(b""),
        "run.db is something else": lambda: (folder / "run.db").write_bytes(b"hello" * 1000),
        "run.db is cut short": lambda: (folder / "run.db").write_bytes((folder / "run.db").read_bytes()[:5000]),
    }[how]()


DAMAGES = ["run.json is text", "run.json is a list", "run.json is not UTF-8", "run.json is gone"]
DAMAGES += ["run.db is gone", "run.db is empty", "run.db is something else", "run.db is cut short"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_run_is_refused_in_one_line_and_listed_as_damaged(tmp_path: Path, how: str) -> None:
    with Run.create(tmp_path / "grpo-0001", {}) as run:
        run.write(1, {"loss": 1.0}, {}, [row(0)])
    damage(tmp_path / "grpo-0001", how)
    with pytest.raises(ResumeError) as caught:
        Run.open(tmp_path / "grpo-0001")
    assert "\n" not in str(caught.value)
    (info,) = list_runs(tmp_path)
    assert info.status == "damaged" and "grpo-0001" in info.note and "\n" not in info.note


def test_listing_shows_runs_and_passes_over_other_folders(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "nowhere") == []
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    with Run.create(tmp_path / "grpo-0002", {"algorithm": "grpo"}) as live:
        live.write(4, {"loss": 1.0}, {})
        with Run.create(tmp_path / "grpo-0001", {}) as done:
            done.finish({"reward": 1.0})
        infos = list_runs(tmp_path)
    assert [(i.path.name, i.status, i.last_step) for i in infos] == [
        ("grpo-0001", "finished", None),
        ("grpo-0002", "running", 4),
    ]
    assert infos[0].summary == {"reward": 1.0} and infos[1].header == {"algorithm": "grpo"}


def test_a_hundred_runs_are_listed_quickly() -> None:
    with in_memory() as root:
        for number in range(100):
            Run.create(root / f"grpo-{number:04d}", {}).close()
        started = time.monotonic()
        assert len(list_runs(root)) == 100
        assert time.monotonic() - started < 2


def test_folders_are_numbered_on_and_two_processes_never_share_one(tmp_path: Path) -> None:
    assert next_folder(tmp_path / "runs", "grpo").name == "grpo-0001"
    (tmp_path / "runs" / "grpo-0041").mkdir()
    (tmp_path / "runs" / "grpo-notes").mkdir()
    assert next_folder(tmp_path / "runs", "grpo").name == "grpo-0042"
    assert next_folder(tmp_path / "runs", "sft").name == "sft-0001"
    code = "print(*(next_folder(folder, 'x').name for _ in range(50)))"
    prefix = "import sys\nfrom pathlib import Path\nfrom posttrain.store.listing import *\nfolder = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", prefix + code, str(tmp_path / "runs")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = [name for process in processes for name in process.communicate()[0].split()]
    assert sorted(names) == [f"x-{number:04d}" for number in range(1, 101)]


Step = tuple[dict[str, float], list[tuple[float | None, str]], list[str]]
number = st.floats(allow_nan=True)
steps = st.lists(
    st.tuples(
        st.dictionaries(st.text(max_size=3), number, max_size=3),
        st.lists(
            st.tuples(st.none() | st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=4)), max_size=3
        ),
        st.lists(st.text(max_size=3), max_size=2, unique=True),
    ),
    min_size=1,
    max_size=4,
)


def digest_of(history: list[tuple[int, Step]], seconds: float = 1.0, shuffle: bool = False, note: bool = False) -> str:
    with in_memory() as folder, Run.create(folder, {"created": seconds}) as run:
        for step, (metrics, answers, messages) in history:
            rows = [row(i, step, reward=reward, error=text) for i, (reward, text) in enumerate(answers)]
            items, events = list(metrics.items()), [Event("info", "k", message) for message in messages]
            if shuffle:
                for part in (items, rows, events):
                    random.Random(0).shuffle(part)
            run.write(step, dict(items), {"seconds": seconds}, rows, events)
            if note:
                run.note(step, Event("info", "resumed", f"after {seconds}"))
        return run.digest()


@settings(max_examples=15, deadline=None)
@given(steps, st.integers(0, 3))
def test_the_digest_does_not_depend_on_order_clock_replay_or_restarts(written: list[Step], at: int) -> None:
    history = list(enumerate(written))
    expected = digest_of(history)
    assert digest_of(history[::-1], seconds=9.0, shuffle=True, note=True) == expected
    assert digest_of(history[: at + 1] + history[at // 2 :]) == expected, "steps replayed after a kill"


@settings(max_examples=15, deadline=None)
@given(steps, st.data())
def test_the_digest_sees_every_change_of_a_metric_a_reward_a_text_or_an_event(written: list[Step], data: Any) -> None:
    history = list(enumerate(written))
    step, (metrics, answers, messages) = data.draw(st.sampled_from(history))
    changes: list[Step] = [({**metrics, "more": 1.0}, answers, messages), (metrics, answers, [*messages, "more"])]
    changes += [(metrics, [*answers, (1.0, "")], messages)]
    changes += [(metrics, [(reward, text + "!"), *answers[1:]], messages) for reward, text in answers[:1]]
    changes += [
        (metrics, [(None if reward is not None else 0.0, text), *answers[1:]], messages) for reward, text in answers[:1]
    ]
    digests = [digest_of([(s, change if s == step else w) for s, w in history]) for change in changes]
    assert len({*digests, digest_of(history)}) == len(changes) + 1
