"""Workers as Ray actors, on one machine or several. Ray places them and says when one has died; nothing else is used.

Actors are not restarted by Ray: the reborn one would have the constructor's state, not the newest weights. A cluster is
never started or joined without a token, because whoever reaches Ray's ports can run code. On one machine it binds to
loopback; no dashboard is started and no usage report is sent.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np

from posttrain.cluster.actors import OnPart, WorkerDied, message
from posttrain.cluster.messages import Buffer, decode
from posttrain.cluster.node import LOOPBACK, QUIET, TOKEN_PATH, is_loopback, token_file
from posttrain.cluster.worker import ADDRESS, Host, versions
from posttrain.config import ClusterConfig
from posttrain.types import ConfigError, Json

GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux, netdevice(7)
PLACED = 2.0  # seconds between two looks whether the cluster still has room for a worker that waits for it
_gpus = 0.0  # of each learner and sampler
_asked = ClusterConfig()


class _Worker:
    """The actor's class: a worker's object behind one method."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        os.environ[ADDRESS] = address = import_module("ray").util.get_node_ip_address()
        if interface := _interface(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # gloo would take that of the machine's name
        self._host = Host()

    def answer(self, *parts: Any) -> Iterator[list[np.ndarray]]:
        """Yields the replies to a call, each as its kind and buffers."""
        for kind, reply in self._host.answer([np.ascontiguousarray(part).data.cast("B") for part in parts]):
            yield [np.frombuffer(kind.encode(), np.uint8), *(np.frombuffer(part, np.uint8) for part in reply)]

    def process(self) -> str:
        """The process and the machine."""
        return f"pid {os.getpid()} on {os.environ[ADDRESS]}"


def open(cfg: ClusterConfig) -> None:
    """Joins the Ray cluster at `cluster.address` or RAY_ADDRESS, or starts one on this machine.

    Raises ConfigError if Ray is not installed, a token or a resource is missing, or the cluster cannot be reached.
    """
    address = cfg.address or os.environ.get("RAY_ADDRESS", "")
    os.environ.update(QUIET)
    if is_loopback(address or "127.0.0.1"):
        os.environ.update(LOOPBACK)  # before Ray is imported, which reads it
    if not address:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif not _has_token():
        raise ConfigError(
            f"the Ray cluster at {address} needs its token, and there is none at {token_file()}. Copy it there from "
            f"the cluster's head, or set RAY_AUTH_TOKEN, or {TOKEN_PATH} to a file that has it."
        )
    try:
        ray = import_module("ray")
    except ImportError:
        raise ConfigError(
            'cluster.backend = "ray" needs Ray, which is not installed. Install posttrain[ray], or use '
            'cluster.backend = "processes" on this machine.'
        ) from None
    if not ray.is_initialized():
        _messages_to_stderr()
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level="error")
            else:
                ray.init("local", num_cpus=_workers(cfg) + 1, _node_ip_address="127.0.0.1", **quiet)
        except Exception as error:
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            raise ConfigError(f"{where} cannot be used: {_first_line(error)}") from None
    global _asked, _gpus
    _asked, _gpus = cfg, float(bool(ray.cluster_resources().get("GPU")))
    check_resources(ray, cfg, _gpus)


def _messages_to_stderr() -> None:
    """Ray prints what its nodes report on stdout, where `--json` has one document, and has no setting for that."""
    module: Any = import_module("ray._private.worker")
    if show := getattr(module, "print_to_stdstream", None):
        module.print_to_stdstream = lambda data, ignore_prefix: show({**data, "is_err": True}, ignore_prefix)


def _workers(cfg: ClusterConfig) -> int:
    return cfg.learners * (cfg.learners > 1) + cfg.samplers + cfg.judges


def _has_token() -> bool:
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file().is_file()


def _interface(address: str) -> str:
    """The network interface that has an IPv4 address; empty where the system cannot be asked."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
            found = fcntl.ioctl(sock.fileno(), GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return ""


def check_resources(ray: Any, cfg: ClusterConfig, gpus: float) -> None:
    """Raises ConfigError if the cluster does not have what the workers need; otherwise Ray would wait for ever.

    `gpus` is the number for each learner and sampler.
    """
    there, workers = ray.cluster_resources(), _workers(cfg)
    on_gpus = cfg.learners * (cfg.learners > 1) + cfg.samplers
    for name, needed in (("CPU", workers), ("GPU", on_gpus * gpus)):
        if there.get(name, 0) < needed:
            raise ConfigError(
                f"the Ray cluster has {there.get(name, 0):g} {name}s, but cluster.learners={cfg.learners}, "
                f"samplers={cfg.samplers} and judges={cfg.judges} need {needed:g}. Ask for fewer, or add machines."
            )


class RayActor:
    """A worker in a Ray actor, on any node or on the one with the id `node`."""

    def __init__(self, name: str, kind: str, arguments: tuple[Any, ...], node: str = "") -> None:
        self._ray = import_module("ray")
        self.name, self._lock = name, threading.Lock()
        self._ended: Exception | None = None
        self.calls, self.parts = -1, 0  # the first call makes the object
        self._open: set[Future[Any]] = set()
        needs = {"num_cpus": 1, "num_gpus": 0 if name.startswith("judge") else _gpus, "max_restarts": 0}
        environment = {key: value for key, value in os.environ.items() if key.startswith("POSTTRAIN_")}
        if node:
            strategies = import_module("ray.util.scheduling_strategies")
            needs["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        self._actor: Any = self._ray.remote(**needs)(_Worker).remote(environment)
        self._where, self._process = "", self._actor.process.remote()
        self.made = self.send(message("make", kind, versions(), *arguments))
        threading.Thread(target=self._wait_for_place, daemon=True).start()

    def _wait_for_place(self) -> None:
        """Ends a worker that waits for a place in vain: the cluster may have lost a machine since it was looked at."""
        while self.alive and not self._ray.wait([self._process], timeout=PLACED)[0]:
            try:
                check_resources(self._ray, _asked, _gpus)
            except ConfigError as error:
                self._end_all(error)

    @property
    def where(self) -> str:
        """See `Actor.where`; does not wait for the worker's process."""
        if not self._where:
            with suppress(Exception):  # Ray's: the actor has died before it answered
                self._where = self._ray.get(self._process, timeout=0)
        return self._where

    @property
    def reason(self) -> str:
        died = self._ended
        return died.reason if isinstance(died, WorkerDied) else str(died or "")

    @property
    def alive(self) -> bool:
        return self._ended is None

    def send(self, message: Sequence[Buffer], on_part: OnPart | None = None) -> Future[Any]:
        """See `Actor.send`."""
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(self._ended)
                return future
            self._open.add(future)
            arrays = [np.frombuffer(part, np.uint8) for part in message]
            replies = self._actor.answer.options(num_returns="streaming").remote(*arrays)
        threading.Thread(target=self._follow, args=(replies, future, on_part), daemon=True).start()
        return future

    def _follow(self, replies: Any, future: Future[Any], on_part: OnPart | None) -> None:
        """Resolves a call's future from its replies."""
        try:
            for reference in replies:
                kind, *payload = self._ray.get(reference)
                value = decode([part.data for part in payload])
                if kind.tobytes() == b"part":
                    self.parts += 1
                    if on_part:
                        on_part(value)
                else:
                    self.calls += 1
                    self._end(future, value if kind.tobytes() == b"raised" else None, value)
        except Exception as error:  # Ray's: the actor is gone
            with self._lock:
                self._ended = died = self._ended or WorkerDied(self.name, _first_line(error))
            self._end(future, died, None)

    def _end(self, future: Future[Any], error: BaseException | None, value: Any) -> None:
        with self._lock:
            if future not in self._open:
                return  # the worker was ended meanwhile
            self._open.discard(future)
        future.set_result(value) if error is None else future.set_exception(error)

    def kill(self, reason: str) -> None:
        """See `Actor.kill`."""
        self._end_all(WorkerDied(self.name, reason))

    def _end_all(self, why: Exception) -> None:
        """Ends the worker; open calls, and those to come, raise `why`."""
        with self._lock:
            if self._ended:
                return
            self._ended, waiting = why, list(self._open)
            self._open.clear()
        with suppress(Exception):
            self._ray.kill(self._actor, no_restart=True)
        for future in waiting:
            future.set_exception(why)


def _first_line(error: Exception) -> str:
    """The first line of a message that has text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def nodes() -> list[Json]:
    """The cluster's nodes, as Ray describes them."""
    return import_module("ray").nodes()


def start(name: str, kind: str, arguments: tuple[Any, ...]) -> RayActor:
    """Starts a worker on the Ray cluster; see `actors.Start`."""
    return RayActor(name, kind, arguments)
