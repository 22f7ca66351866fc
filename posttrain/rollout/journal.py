"""Journal of finished completions: after a kill, what was sampled since the last checkpoint is not sampled again.

A completion is a function of weights, prompt, seed and sampling parameters, so the journal can only save time: what it
returns for a request is what the generator would return. `journal/0000012` in the run folder holds the completions of
the weights of version 12, one record each, written as the completion ends. A record is found by a key, a hash of all
that the completion depends on, and carries a checksum. Whatever does not verify is dropped, and sampled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from posttrain import __version__
from posttrain.config import SamplingRecipe
from posttrain.rollout.collector import Collector
from posttrain.rollout.generator import Generator, OnDone, OnToken, Request, ended
from posttrain.store import checkpoint
from posttrain.store.failpoints import failpoint
from posttrain.train.job import Setup
from posttrain.types import Completion, SamplingParams

FOLDER = "journal"
MAGIC = b"ptjrnl01"  # with the version of the layout
_HEAD = struct.Struct("<8sI32s")  # magic, bytes of the payload, its sha256
_INNER = struct.Struct("<32sI?I")  # key, number of tokens, whether it stopped, bytes of the stop string
_ARRAYS = (np.int32, np.float32, np.float32)  # tokens, log-probabilities, log of the kept mass
WORDS = 1 << 17  # 64-bit words that are hashed at once: they stay in the processor's cache


class Journal:
    """A `Generator` that answers requests from the journal where it can, and records what the inner one answers."""

    def __init__(self, inner: Generator, run_folder: Path, about: str, lag: int = 0) -> None:
        """`about` is whatever completions depend on besides weights and requests: versions, machine, model, settings.

        `lag` is the number of steps by which the weights may be older than the learner's.
        """
        self.inner, self.run_folder, self.about, self.lag = inner, run_folder, about, lag
        self.sampled = 0  # completions that the inner generator sampled
        self._weights = ""  # digest of the weights, once it is needed
        self._file = _File(run_folder / FOLDER / "none")

    @property
    def version(self) -> int:
        """Version of the weights."""
        return self.inner.version

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Loads new weights for the completions that follow."""
        self.inner.load(weights, version)
        self._weights = ""

    def weights(self) -> dict[str, torch.Tensor]:
        """The current weights."""
        return self.inner.weights()

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """See `Generator.generate`. Completions of the journal end first."""
        self._open()
        keys = [self._keys(request, params) for request in requests]
        done: list[list[Completion | None]] = [[self._known(key) for key in row] for row in keys]
        for g, row in enumerate(done):
            for i, completion in enumerate(row):
                if completion:
                    ended(g, i, completion, on_token, on_done)
        missing = {g: [i for i, completion in enumerate(row) if completion is None] for g, row in enumerate(done)}
        missing = {g: row for g, row in missing.items() if row}
        places = [*missing]

        def recorded(g: int, i: int, completion: Completion) -> None:
            group = places[g]
            index = missing[group][i]
            self.sampled += 1
            self._file.add(keys[group][index], completion)
            if on_done:
                on_done(group, index, completion)

        def drawn(g: int, i: int, token: int) -> None:
            assert on_token is not None
            on_token(places[g], missing[places[g]][i], token)

        asked = [requests[g].part(row) for g, row in missing.items()]
        answered = self.inner.generate(asked, params, drawn if on_token else None, recorded) if asked else []
        for (group, row), completions in zip(missing.items(), answered, strict=True):
            for index, completion in zip(row, completions, strict=True):
                done[group][index] = completion
        return [[completion for completion in row if completion is not None] for row in done]

    def _open(self) -> None:
        """Finds the digest of the weights, once for each `load`, and the journal's file of their version."""
        path = self.run_folder / FOLDER / f"{self.version:07d}"
        if self._weights and path == self._file.path:  # a generator that was loaded around this one has another version
            return
        self._weights = digest(self.inner.weights())
        if path != self._file.path:
            forget(self.run_folder, self.lag)
            self._file = _File(path)

    def _keys(self, request: Request, params: SamplingParams) -> list[bytes]:
        """For each completion a hash of everything that it depends on."""
        prompt, prefix = (np.asarray(tokens, np.int64).tobytes() for tokens in (request.prompt, request.prefix))
        drawn = vars(replace(params, max_tokens=1))  # every completion has a limit of its own
        said = json.dumps([self.about, self._weights, drawn, len(prompt), len(prefix), *request.pieces])
        shared = hashlib.sha256(said.encode() + prompt + prefix)
        keys: list[bytes] = []
        for index, seed in enumerate(request.seeds):
            own = shared.copy()
            own.update(f"{seed} {request.limit(index, params.max_tokens)}".encode())
            keys.append(own.digest())
        return keys

    def _known(self, key: bytes) -> Completion | None:
        found = self._file.known.get(key)
        return found and replace(found, version=self.version)


class _File:
    """The records of one version of the weights: those of an earlier process, and what this one adds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole, self.known = _read(path)
        self._descriptor: int | None = None
        self._failed = False

    def add(self, key: bytes, completion: Completion) -> None:
        """Appends a record. It is not fsynced: after a power loss it may be sampled again.

        A disk that refuses it turns recording off until the next weights; a checkpoint, which is needed, says why.
        """
        try:
            if self._descriptor is None and not self._failed:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.ftruncate(self._descriptor, self._whole)  # what is torn or damaged, and all after it, was not read
            if self._descriptor is not None:
                record = _record(key, completion)
                self._failed = os.write(self._descriptor, record) < len(record)
        except OSError:
            self._failed = True
        if self._failed:
            self._close()
        failpoint("journal:recorded")

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self._close()


def journaled(collector: Collector, setup: Setup[SamplingRecipe], lag: int = 0) -> Collector:
    """The collector with a journal in the run's folder, unless `run.journal` is off."""
    recipe = setup.recipe
    if not recipe.run.journal:
        return collector
    said = json.dumps([__version__, dict(setup.fingerprint), astuple(recipe.rollout)], sort_keys=True)
    return replace(collector, generator=Journal(collector.generator, setup.folder, said, lag))


def forget(run_folder: Path, lag: int) -> None:
    """Removes the files of weights from which no step after the newest checkpoint is sampled."""
    folder, saved = run_folder / FOLDER, checkpoint.folders(run_folder)
    if not saved or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.isdecimal() and int(path.name) < saved[0][0] - lag:
            with suppress(OSError):  # it costs space until the run has finished
                path.unlink()


def remove(run_folder: Path) -> None:
    """Removes the journal of a run that has finished."""
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """A digest of weights by name, dtype, shape and bytes, computed where they are, at about the speed of memory.

    Each stretch of `WORDS` 64-bit words gives the sum of the words times fixed random odd numbers, modulo 2^64 (a
    multilinear hash). It tells weights apart, but is not made to withstand somebody who wants two to be alike.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        rest = flat[len(flat) // 8 * 8 :]
        words = flat[: len(flat) - len(rest)].view(torch.int64)
        odd = _odd(str(words.device))
        sums = [(part * odd[: len(part)]).sum() for part in words.split(WORDS)] if len(words) else []
        numbers = torch.stack(sums).tolist() if sums else []
        said = [name, str(tensor.dtype), list(tensor.shape), numbers, rest.tolist()]
        found.update(json.dumps(said).encode())
    return found.hexdigest()


@cache
def _odd(device: str) -> torch.Tensor:
    numbers = torch.randint(-(2**62), 2**62, (WORDS,), generator=torch.Generator().manual_seed(0))
    return (2 * numbers + 1).to(device)


def _record(key: bytes, completion: Completion) -> bytes:
    columns = (completion.tokens, completion.logprobs, completion.kept_logmass)
    text = completion.stop_string.encode()
    inner = _INNER.pack(key, len(completion.tokens), completion.stop == "stop", len(text))
    arrays = (np.asarray(column, kind).tobytes() for column, kind in zip(columns, _ARRAYS, strict=True))
    payload = b"".join([inner, text, *arrays])
    return _HEAD.pack(MAGIC, len(payload), hashlib.sha256(payload).digest()) + payload


def _read(path: Path) -> tuple[int, dict[bytes, Completion]]:
    """The length of the part of a file that verifies, and its completions by key; nothing if it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError:
        return 0, {}
    known: dict[bytes, Completion] = {}
    whole = 0
    for end, payload in _payloads(data):
        whole = end
        key, count, stopped, text = _INNER.unpack_from(payload)
        at = _INNER.size + text
        string = payload[_INNER.size : at].decode()
        size = 4 * count  # bytes of each of the three arrays
        tokens, logprobs, kept = (
            np.frombuffer(payload, kind, count, at + place * size).copy() for place, kind in enumerate(_ARRAYS)
        )
        known[key] = Completion(tokens, logprobs, kept, "stop" if stopped else "length", stop_string=string)
    return whole, known


def _payloads(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(end, payload) of each record, up to the first that does not verify."""
    at = 0
    while at + _HEAD.size <= len(data):
        magic, size, checksum = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        payload = data[at : at + size]
        if magic != MAGIC or len(payload) != size or hashlib.sha256(payload).digest() != checksum:
            return
        at += size
        yield at, payload
