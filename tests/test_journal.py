"""The journal of finished completions: it answers what would be sampled again, and nothing else."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain import rng
from posttrain.rollout import journal
from posttrain.rollout.generator import OnDone, OnToken, Request
from posttrain.rollout.journal import FOLDER, WORDS, Journal, digest, forget
from posttrain.types import Completion, SamplingParams
from tests.test_ahead import server
from tests.test_resume import Server

__all__ = ["server"]  # a fixture
Weights = Mapping[str, torch.Tensor]


class Pure:
    """A generator whose completions are a function of weights, request and parameters, as a generator's must be."""

    def __init__(self) -> None:
        self.version, self.held, self.asked = 0, dict[str, torch.Tensor](), 0

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        out: list[list[Completion]] = []
        for g, request in enumerate(requests):
            out.append([])
            for i, seed in enumerate(request.seeds):
                self.asked += 1
                held = sorted((name, tensor.tolist()) for name, tensor in self.held.items())
                key = rng.key(str(held), request.context.tolist().__repr__(), seed, repr(params))
                n = 1 + key % request.limit(i, params.max_tokens)
                numbers = rng.uniforms(key, 3 * n).reshape(3, n).astype(np.float32)
                stop = f"§{key % 5}" if key % 2 else ""
                done = Completion(
                    (numbers[0] * 99).astype(np.int32),
                    -numbers[1], -numbers[2], "stop" if stop else "length", self.version, stop,
                )  # fmt: skip
                for token in done.tokens.tolist() if on_token else ():
                    assert on_token is not None
                    on_token(g, i, token)
                if on_done:
                    on_done(g, i, done)
                out[g].append(done)
        return out

    def load(self, weights: Weights, version: int) -> None:
        self.version, self.held = version, dict(weights)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.held


ONES = {"w": torch.ones(3)}
PARAMS = SamplingParams(max_tokens=6)
REQUESTS = [Request(np.array([1, 2, g], np.int32), (10 * g, 10 * g + 1, 10 * g + 2), (4, 5, 6)) for g in range(3)]


def shown(groups: Sequence[Sequence[Completion]]) -> list[Any]:
    return [
        [(c.tokens.tolist(), c.logprobs.tobytes(), c.kept_logmass.tobytes(), c.stop, c.version, c.stop_string,
          c.tokens.dtype, c.logprobs.dtype) for c in group]
        for group in groups
    ]  # fmt: skip


def opened(folder: Path, about: str = "here", weights: Weights = ONES, version: int = 4) -> tuple[Journal, Pure]:
    """A journal as a new process opens it."""
    inner = Pure()
    made = Journal(inner, folder, about)
    made.load(weights, version)
    return made, inner


def plain(requests: Sequence[Request] = REQUESTS, weights: Weights = ONES, version: int = 4) -> list[Any]:
    inner = Pure()
    inner.load(weights, version)
    return shown(inner.generate(requests, PARAMS))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run's folder whose journal has all completions of REQUESTS."""
    made, inner = opened(tmp_path)
    assert shown(made.generate(REQUESTS, PARAMS)) == plain() and inner.asked == 9
    yield tmp_path


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(known=st.sets(st.integers(0, 8)), data=st.data())
def test_whatever_is_known_the_answers_are_those_of_the_generator(
    tmp_path_factory: pytest.TempPathFactory, known: set[int], data: st.DataObject
) -> None:
    place = tmp_path_factory.mktemp("run")
    for at in data.draw(st.permutations(sorted(known))):  # an earlier process, in any order
        part = REQUESTS[at // 3].part([at % 3])
        opened(place)[0].generate([part], PARAMS)
    made, inner = opened(place)
    ended: dict[tuple[int, int], Completion] = {}
    drawn: dict[tuple[int, int], list[int]] = {}
    found = made.generate(
        REQUESTS,
        PARAMS,
        lambda g, i, token: drawn.setdefault((g, i), []).append(token),
        lambda g, i, completion: ended.update({(g, i): completion}),
    )
    assert shown(found) == plain() and inner.asked == 9 - len(known)
    assert ended == {(g, i): c for g, group in enumerate(found) for i, c in enumerate(group)}
    assert drawn == {at: completion.tokens.tolist() for at, completion in ended.items()}


@pytest.mark.parametrize("end", range(0, 1200, 37))
def test_a_torn_file_gives_what_is_whole_and_the_rest_is_sampled(folder: Path, end: int) -> None:
    (path,) = (folder / FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:end])
    made, inner = opened(folder)
    assert shown(made.generate(REQUESTS, PARAMS)) == plain() and inner.asked <= 9
    assert inner.asked == 9 or end > 100
    again, none = opened(folder)  # what was sampled in its place was recorded behind what is whole
    assert shown(again.generate(REQUESTS, PARAMS)) == plain() and none.asked == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_file_with_a_flipped_bit_changes_no_answer(
    tmp_path_factory: pytest.TempPathFactory, at: float, bit: int
) -> None:
    place = tmp_path_factory.mktemp("run")
    opened(place)[0].generate(REQUESTS, PARAMS)
    (path,) = (place / FOLDER).iterdir()
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    path.write_bytes(data)
    made, inner = opened(place)
    assert shown(made.generate(REQUESTS, PARAMS)) == plain() and inner.asked >= 1


@pytest.mark.parametrize("content", [b"", b"\0" * 999, b"PK\x03\x04", journal.MAGIC * 99], ids=repr)
def test_another_file_in_its_place_is_ignored(folder: Path, content: bytes) -> None:
    (path,) = (folder / FOLDER).iterdir()
    path.write_bytes(content)
    made, inner = opened(folder)
    assert shown(made.generate(REQUESTS, PARAMS)) == plain() and inner.asked == 9


def test_a_folder_that_cannot_be_written_costs_the_journal_only(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    made, inner = opened(tmp_path)
    assert shown(made.generate(REQUESTS, PARAMS)) == plain() and inner.asked == 9


OTHER: dict[str, Callable[[Request], Request]] = {
    "prompt": lambda r: replace(r, prompt=np.append(r.prompt, 7)),
    "prefix": lambda r: replace(r, prefix=np.array([5], np.int32)),
    "the border of prompt and prefix": lambda r: replace(r, prompt=r.prompt[:-1], prefix=r.prompt[-1:]),
    "seeds": lambda r: replace(r, seeds=tuple(seed + 1000 for seed in r.seeds)),
    "limits": lambda r: replace(r, limits=tuple(limit - 1 for limit in r.limits)),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_request_that_differs_is_sampled(folder: Path, what: str) -> None:
    made, inner = opened(folder)
    made.generate([OTHER[what](request) for request in REQUESTS], PARAMS)
    assert inner.asked == 9


@pytest.mark.parametrize(
    "params",
    [replace(PARAMS, **{name: value}) for name, value in (("temperature", 0.5), ("top_p", 0.9), ("top_k", 3))],
    ids=repr,
)
def test_other_sampling_parameters_are_another_request(folder: Path, params: SamplingParams) -> None:
    made, inner = opened(folder)
    made.generate(REQUESTS, params)
    assert inner.asked == 9


def test_completions_of_other_weights_or_of_another_machine_are_not_taken(folder: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"about": "there"},
        {"weights": {"w": torch.tensor([1, 1, 1 + 2**-23])}},
        {"version": 5},
    ]
    for case in cases:
        made, inner = opened(folder, **case)
        made.generate(REQUESTS, PARAMS)
        assert inner.asked == 9, case
    made, inner = opened(folder)
    made.inner.load({"w": torch.zeros(3)}, 9)  # around the journal
    assert shown(made.generate(REQUESTS, PARAMS)) == plain(weights={"w": torch.zeros(3)}, version=9)


def test_new_weights_are_hashed_once_and_only_if_something_is_sampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(journal, "digest", lambda weights: calls.append(1) or digest(weights))
    made, _ = opened(folder)
    for version in (5, 6):
        made.load(ONES, version)
    assert not calls
    for _ in range(3):
        made.generate(REQUESTS, PARAMS)
    assert len(calls) == 1


@settings(max_examples=40)
@given(
    size=st.integers(1, 40),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
    at=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_any_bit_of_any_weight_changes_the_digest(size: int, kind: torch.dtype, at: int, bit: int) -> None:
    tensor = torch.arange(size).to(kind)
    other = tensor.clone()
    data = other.view(torch.uint8)
    data[at % len(data)] ^= 1 << bit
    assert digest({"a": tensor}) == digest({"a": tensor.clone()}) != digest({"a": other})


def test_the_digest_tells_names_shapes_dtypes_and_places_apart() -> None:
    a = torch.arange(6.0)
    far = torch.zeros(2 * WORDS + 3, dtype=torch.int64)
    moved = [far.clone() for _ in range(3)]
    for at, one in zip((1, 1 + WORDS, 2 * WORDS + 2), moved, strict=True):
        one[at] = 5
    found = [{"a": a}, {"b": a}, {"a": a.view(2, 3)}, {"a": a.double()}, {"a": a, "b": a}, {"a": a.flip(0)}, {}]
    found += [{"a": one} for one in (far, *moved)]
    assert len({digest(weights) for weights in found}) == len(found)
    assert digest({"a": a, "b": a + 1}) == digest({"b": a + 1, "a": a})
    assert digest({"a": a.view(2, 3).T}) == digest({"a": a.view(2, 3).T.contiguous()})


def test_files_older_than_the_newest_checkpoint_are_removed(tmp_path: Path) -> None:
    for version in (3, 4, 5, 6, 7):
        opened(tmp_path, version=version)[0].generate(REQUESTS, PARAMS)
    left = lambda: sorted(int(path.name) for path in (tmp_path / FOLDER).iterdir())
    forget(tmp_path, 0)
    assert left() == [3, 4, 5, 6, 7], "no checkpoint yet"
    (tmp_path / "ckpt" / "step_0000006").mkdir(parents=True)
    forget(tmp_path, 2)
    assert left() == [4, 5, 6, 7], "a step after it may be sampled with weights two updates old"
    opened(tmp_path, version=8)[0].generate(REQUESTS, PARAMS)
    assert left() == [6, 7, 8]


# --- whole runs -------------------------------------------------------------------------------------------------------

SETTINGS = {"run.checkpoint_every": 3, "train.steps": 5}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda data: data[: len(data) * 2 // 3],
    "a flipped bit": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
}


def test_a_damaged_journal_changes_no_bit_of_a_run(server: Server) -> None:
    assert server.live("whole", "grpo", settings=SETTINGS) == 0
    total = server.hits("whole")["journal:recorded"]
    assert not (server.root / "whole" / FOLDER).exists(), "a run that has finished needs none"
    for number, (what, damage) in enumerate({"nothing": bytes, **DAMAGE}.items()):
        name = f"damaged-{number}"
        at = total * 6 // 10  # in the third step, after two that have no checkpoint either
        assert server.live(name, "grpo", settings=SETTINGS, failpoint=f"journal:recorded:{at}") == -signal.SIGKILL
        files = sorted((server.root / name / FOLDER).iterdir())
        assert len(files) >= 2
        for path in files:
            path.write_bytes(damage(path.read_bytes()))
        assert server.live(name, "grpo") == 0
        assert server.outcome(name) == server.outcome("whole"), what
        again = server.hits(name)["journal:recorded"] - (total - at)
        assert again == 0 if what == "nothing" else 0 < again <= at, what


def test_without_a_journal_a_run_has_the_same_bits_and_no_folder(server: Server) -> None:
    off = {**SETTINGS, "run.journal": False}
    assert server.live("off", "grpo", settings=off, failpoint="step:rollouts-done:2") == -signal.SIGKILL
    assert not (server.root / "off" / FOLDER).exists()
    assert server.live("off", "grpo") == 0
    assert "journal:recorded" not in server.hits("off")
    assert server.live("on", "grpo", settings=SETTINGS) == 0
    assert server.outcome("off") == server.outcome("on")
