"""What takes too long for the suite: every shape of a cluster, and kills of everything at any moment.

    make test-cluster            (or: python -m tests.cluster_nightly --only matrix,kills --kills 50)

Each part compares runs with one that computed everything in its own process and that nobody disturbed: weights, the
bytes of checkpoint files, metrics and episodes. It ends in one line with its figures, and exit code 1 if any differ.

* matrix: learners {1, 2, 4} × samplers {0, 1, 2} × judges {0, 2}; GRPO with LoRA, a KL reference, two minibatches and
  answers 0, 1 and 2 steps ahead; PPO; DPO; SFT.
* variants: every algorithm and variant of tests/run_server.py on 2 learners, 2 samplers and 2 judges.
* resume: 1 → 2 → 4 → 1 learners.
* failpoints: the driver is killed at every failpoint, the first and the last time it passes it.
* kills: SIGKILL of a random worker or the driver at random moments, several in a run.
* network: on Ray, two machines as network namespaces: a cut of 1 s, one that stays, with and without room for the lost
  workers elsewhere, and workers that hang (tests/cluster_network.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import posttrain as pt
from posttrain import api, config
from posttrain.cluster.actors import Actor
from posttrain.cluster.launch import Cluster
from posttrain.store.failpoints import FAILPOINTS
from posttrain.store.run import Run
from tests import cluster_network, run_server, tiny
from tests.cluster_lives import LONGEST
from tests.cluster_network import TIMEOUT
from tests.test_cluster import kept

PARTS = ("matrix", "variants", "resume", "failpoints", "kills", "network")
IN_A_RUN = 3  # kills of workers in one run
Kept = dict[str, str]
SPREAD = {"cluster.learners": 2, "cluster.samplers": 2, "cluster.judges": 2, "cluster.max_restarts": 99}
LANES = {"train.lanes": 4, "train.micro_batch_tokens": 64}
SMALL = {"train.steps": 2, "eval.every": 0}
FULL = {"algo.kl_coef": 0.1, "algo.minibatches": 2, "model.lora_rank": 2}


@dataclass
class Bench:
    """A folder with a model and data, and what was found."""

    root: Path
    baselines: dict[str, Kept] = field(default_factory=dict[str, Kept])
    equal: dict[str, list[bool]] = field(default_factory=dict[str, list[bool]])
    kills: dict[str, int] = field(default_factory=dict[str, int])
    outlived: float = 0.0  # see `Lives`
    noticed: dict[str, float] = field(default_factory=dict[str, float])  # fault → seconds until it was noticed
    _number: int = 0

    def __post_init__(self) -> None:
        tiny.chatty(self.root / "model")
        rows = [{"prompt": f"Say {word}.", "completion": word * 2} for word in ("ab", "cd", "ef", "gh", "ij", "kl")] * 6
        pairs = [{**row, "chosen": row["completion"], "rejected": row["completion"][::-1]} for row in rows]
        pairs = [{**row, "steps": [row["chosen"], row["rejected"]], "labels": [1, 0]} for row in pairs]
        for name, lines in (("rows", rows), ("pairs", pairs)):
            (self.root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def folder(self) -> Path:
        self._number += 1
        return self.root / f"run-{self._number}"

    def settings(self, name: str, more: dict[str, Any]) -> dict[str, Any]:
        """All settings of a run of an algorithm or a variant, written algorithm+variant."""
        given = {**run_server.SHARED, **run_server.settings_of(name), **LANES, "model.path": str(self.root / "model")}
        if data := run_server.data_of(name):
            given["data.tasks"] = str(self.root / data)
        if "algo.teacher" in given:
            given["algo.teacher"] = str(self.root / "model")
        known = config.as_dict(config.RECIPES[name.split("+")[0]]())
        wanted = {key: value for key, value in more.items() if key.split(".")[1] in known.get(key.split(".")[0], {})}
        return given | wanted

    def run(self, name: str, more: dict[str, Any]) -> Kept:
        folder = self.folder()
        algorithm = name.split("+")[0]
        given = self.settings(name, more) | {"run.out": str(folder)}
        result = api.start(algorithm, config.resolve(algorithm, {}, given))
        assert result.summary is not None
        return kept(folder) | {"weights": result.summary["weights"]}

    def alone(self, name: str, more: dict[str, Any]) -> Kept:
        """What a run in one process gives."""
        key = json.dumps([name, more], sort_keys=True)
        if key not in self.baselines:
            self.baselines[key] = self.run(name, more)
        return self.baselines[key]

    def compare(self, part: str, what: str, expected: Kept, get: Callable[[], Kept]) -> None:
        """Notes whether a run gave what was expected; a run that ended with an exception did not."""
        began = time.monotonic()
        try:
            found = get()
            wrong = "" if found == expected else f"differ: {[k for k in expected if found.get(k) != expected[k]]}"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        self.equal.setdefault(part, []).append(not wrong)
        print(f"{part}: {what}: {wrong or 'equal'} ({time.monotonic() - began:.1f} s)", flush=True)


def matrix(bench: Bench) -> None:
    cases = [("grpo", SMALL | FULL | {"algo.ahead": ahead}) for ahead in (0, 1, 2)]
    cases += [(name, SMALL) for name in ("ppo", "dpo", "sft")]
    for name, more in cases:
        expected = bench.alone(name, more)
        for learners, samplers, judges in itertools.product((1, 2, 4), (0, 1, 2), (0, 2)):
            shape = {"cluster.learners": learners, "cluster.samplers": samplers, "cluster.judges": judges}
            what = f"{name}, ahead {more.get('algo.ahead', 0)}, {learners} + {samplers} + {judges}"
            bench.compare("matrix", what, expected, lambda n=name, m=more | shape: bench.run(n, m))


def variants(bench: Bench) -> None:
    for name in dict.fromkeys([*config.RECIPES, *run_server.SETTINGS]):
        expected = bench.alone(name, SMALL)
        bench.compare("variants", name, expected, lambda n=name: bench.run(n, SMALL | SPREAD))


def resume(bench: Bench) -> None:
    for name in ("grpo", "ppo", "dpo", "sft"):
        more = {"train.steps": 4, "run.checkpoint_every": 1, "eval.every": 1}
        whole = bench.alone(name, more)

        def parts(name: str = name, more: dict[str, Any] = more, whole: Kept = whole) -> Kept:
            folder = bench.folder()
            given = bench.settings(name, more) | {"run.out": str(folder)}

            class Enough(Exception):
                pass

            for step, learners in ((1, 1), (2, 2), (3, 4), (4, 1)):

                def stop(number: int, values: Any, step: int = step) -> None:
                    if number == step + 1:  # the checkpoint of `step` is written, that of this step is not
                        raise Enough

                with suppress(Enough):
                    if step == 1:
                        api.start(name, config.resolve(name, {}, given), stop)
                    else:
                        pt.resume(folder, on_step=stop, cluster={"learners": learners})
            return kept(folder) | {"weights": whole["weights"]}  # of which the checkpoint is a copy

        bench.compare("resume", f"{name}, 1 → 2 → 4 → 1 learners", whole, parts)


# --- kills -------------------------------------------------------------------------------------------------------


class Lives:
    """Drivers in processes of their own, forked from a loaded one (tests/cluster_lives.py)."""

    def __init__(self) -> None:
        self.outlived = 0.0  # the most seconds that any process has lived longer than its driver
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster_lives"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def live(self, **request: Any) -> int:
        """One life of a run; its exit code, negative for the signal that ended it."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        code, seconds = json.loads(self.process.stdout.readline())
        assert seconds < LONGEST, f"{seconds} s after the driver has ended with {code}, other processes are left"
        self.outlived = max(self.outlived, seconds)
        return code

    def close(self) -> None:
        self.process.communicate()


def life(bench: Bench, lives: Lives, name: str, more: dict[str, Any], folder: Path, **request: Any) -> int:
    settings = bench.settings(name, more | SPREAD)
    return lives.live(folder=str(folder), algorithm=name, settings=settings, **request)


def finished(bench: Bench, lives: Lives, name: str, more: dict[str, Any], folder: Path) -> Kept:
    """Resumes a run to its end."""
    assert life(bench, lives, name, more, folder) == 0, "the resumed run has not finished"
    with Run.read(folder) as run:
        summary = run.summary()
    assert summary is not None
    return kept(folder) | {"weights": summary["weights"]}


def failpoints(bench: Bench) -> None:
    more = {"train.steps": 3, "run.checkpoint_every": 1, "algo.ahead": 1}
    expected, lives, whole = bench.alone("grpo", more), Lives(), bench.folder()
    bench.compare("failpoints", "undisturbed", expected, lambda: finished(bench, lives, "grpo", more, whole))
    hits = json.loads(Path(f"{whole}.hits").read_text())
    for name in FAILPOINTS:
        for hit in sorted({1, hits[name]}):
            folder = bench.folder()

            def killed(folder: Path = folder, point: str = f"{name}:{hit}") -> Kept:
                assert life(bench, lives, "grpo", more, folder, failpoint=point) == -signal.SIGKILL
                bench.kills["driver"] = bench.kills.get("driver", 0) + 1
                return finished(bench, lives, "grpo", more, folder)

            bench.compare("failpoints", f"{name}:{hit}", expected, killed)
    bench.outlived = max(bench.outlived, lives.outlived)
    lives.close()


@contextmanager
def shooting(bench: Bench, chance: random.Random, seconds: float) -> Iterator[None]:
    """Kills random workers at random moments while the block runs."""
    started: list[Any] = []
    start, over = Cluster._start, threading.Event()  # pyright: ignore[reportPrivateUsage]

    def recorded(self: Cluster, *rest: Any) -> Actor:
        started.append(actor := start(self, *rest))
        return actor

    def shoot() -> None:
        last = 0.0
        for moment in sorted(chance.uniform(0, seconds) for _ in range(IN_A_RUN)):
            if over.wait(moment - last):
                return
            last = moment
            if living := [actor for actor in started if actor.alive]:
                victim = chance.choice(living)
                with suppress(ProcessLookupError):
                    os.kill(victim.pid, signal.SIGKILL)
                    role = victim.name.partition("-")[0]
                    bench.kills[role] = bench.kills.get(role, 0) + 1

    Cluster._start = recorded  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    thread = threading.Thread(target=shoot)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        Cluster._start = start  # pyright: ignore[reportPrivateUsage]


def kills(bench: Bench, count: int, seed: int, seconds: float) -> None:
    """Until `count` kills have hit, or `seconds` are over."""
    chance, lives, end = random.Random(seed), Lives(), time.monotonic() + seconds
    before, moments = sum(bench.kills.values()), {"grpo": 3.0, "ppo": 3.0}
    for name in itertools.cycle(moments):
        if sum(bench.kills.values()) - before >= count or time.monotonic() > end:
            break
        more = {"train.steps": 4, "run.checkpoint_every": 2, "algo.ahead": chance.choice((0, 1))}
        expected, folder = bench.alone(name, more), bench.folder()

        def workers(name: str = name, more: dict[str, Any] = more) -> Kept:
            with shooting(bench, chance, moments[name]):
                began = time.monotonic()
                found = bench.run(name, more | SPREAD)
            moments[name] = (moments[name] + time.monotonic() - began) / 2
            return found

        def driver(name: str = name, more: dict[str, Any] = more, folder: Path = folder) -> Kept:
            code = life(bench, lives, name, more, folder, kill_after=chance.uniform(0.1, moments[name]))
            assert code in (0, -signal.SIGKILL), f"exit code {code}"
            bench.kills["driver"] = bench.kills.get("driver", 0) + (code != 0)
            return finished(bench, lives, name, more, folder)

        if chance.random() < 0.3:
            bench.compare("kills", f"{name}, the driver", expected, driver)
        else:
            bench.compare("kills", f"{name}, workers", expected, workers)
        print(f"kills: {sum(bench.kills.values()) - before} so far", flush=True)
    bench.outlived = max(bench.outlived, lives.outlived)
    lives.close()


# --- two machines ------------------------------------------------------------------------------------------------


def network(bench: Bench) -> None:
    if why := cluster_network.missing():
        print(f"network: left out: {why}", flush=True)
        return
    more: dict[str, Any] = {"train.steps": 3, "run.checkpoint_every": 1, "eval.every": 0}
    expected = bench.alone("grpo", more)
    spread = {"cluster.learners": 2, "cluster.samplers": 2, "cluster.backend": "ray", "cluster.timeout": TIMEOUT}
    with cluster_network.machines(bench.root) as two:
        two.start(0, cpus=2)
        two.start(1, cpus=2)

        def run(fault: str, happen: Callable[[list[dict[str, Any]]], None]) -> tuple[Path, cluster_network.Outcome]:
            folder = bench.folder()
            settings = bench.settings("grpo", more | spread) | {
                "run.out": str(folder), "cluster.address": f"{two.address(0)}:6379",
            }  # fmt: skip
            out = cluster_network.suffer(two, {"algorithm": "grpo", "settings": settings, "at": 1}, happen)
            for seconds, note in out.noticed:
                print(f"network: {fault}: {seconds:.1f} s: {note}", flush=True)
            if out.error:
                print(f"network: {fault}: ended: {out.error}", flush=True)
            if out.noticed:
                bench.noticed[fault] = out.noticed[0][0]
                assert out.noticed[0][0] <= TIMEOUT + cluster_network.WITHIN, "noticed too late"
            return folder, out

        def goes_on(fault: str, happen: Callable[[list[dict[str, Any]]], None]) -> Kept:
            folder, out = run(fault, happen)
            assert not out.error, out.error
            return kept(folder) | {"weights": out.weights}

        def blink(workers: Any) -> None:
            two.cable("down")
            threading.Timer(1.0, two.cable, ["up"]).start()

        def hang(role: str) -> Callable[[list[dict[str, Any]]], None]:
            def stop(workers: list[dict[str, Any]]) -> None:
                worker = next(worker for worker in workers if worker["role"] == role)
                os.kill(int(worker["where"].split()[1]), signal.SIGSTOP)

            return stop

        def ends() -> Kept:
            """No room is left: the run ends with one sentence, and is resumed elsewhere."""
            folder, out = run("cut, no room", lambda workers: two.cable("down"))
            assert "CPUs, but" in out.error and "\n" not in out.error, out.error or "the run has not ended"
            summary = pt.resume(folder, cluster={"learners": 1, "samplers": 0, "backend": "processes"}).summary
            assert summary is not None
            return kept(folder) | {"weights": summary["weights"]}

        def moves() -> Kept:
            """The first machine gets room for the lost workers while the run goes on."""
            return goes_on("cut, room elsewhere", lambda workers: (two.start(0, cpus=4), two.cable("down"))[1])

        bench.compare("network", "a cut of 1 s", expected, lambda: goes_on("cut of 1 s", blink))
        for role in ("sampler", "learner"):
            what = f"a {role} that hangs"
            bench.compare("network", what, expected, lambda w=what, r=role: goes_on(w, hang(r)))
        bench.compare("network", "a cut that stays, no room", expected, ends)
        two.cable("up")
        two.start(1, cpus=2)
        bench.compare("network", "a cut that stays, room elsewhere", expected, moves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--kills", type=int, default=200, help="kills at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--seconds", type=float, default=3600, help="the longest that random kills may take")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tiny.threads(1):
        os.environ["POSTTRAIN_CACHE"] = f"{folder}/cache"
        bench = Bench(Path(folder))
        simple = {
            "matrix": matrix,
            "variants": variants,
            "resume": resume,
            "failpoints": failpoints,
            "network": network,
        }
        for part in args.only.split(","):
            if part == "kills":
                kills(bench, args.kills, args.seed, args.seconds)
            else:
                simple[part](bench)
    counts = ", ".join(f"{part} {sum(found)}/{len(found)}" for part, found in bench.equal.items())
    shot = ", ".join(f"{count} of {role}s" for role, count in sorted(bench.kills.items()))
    latest = max(bench.noticed.values(), default=0.0)
    right = all(all(found) for found in bench.equal.values())
    print(
        f"{'PASSED' if right else 'FAILED'}: runs with equal bits: {counts}; kills: {shot or 'none'}; no process "
        f"left {bench.outlived:.1f} s after its driver; faults of machines noticed within {latest:.1f} s; "
        f"{(time.monotonic() - began) / 60:.1f} minutes, load {os.getloadavg()[0]:.1f}"
    )
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
