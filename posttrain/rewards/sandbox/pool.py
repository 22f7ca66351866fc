"""The `Sandbox`: selects an isolation tier, runs executions in parallel slots, and retries failures of the sandbox.

There are two tiers, namespaces and Landlock; each is probed on this machine before it is used. Without either nothing
is executed, unless the user explicitly accepts running without isolation.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

from posttrain.rewards.sandbox import cgroups
from posttrain.rewards.sandbox.host import Limits, Lost, Tier, Zygote
from posttrain.types import ConfigError, RolloutError

Choice = Literal["auto", "namespaces", "landlock", "none"]
TIERS: tuple[Tier, ...] = ("namespaces", "landlock")
"""In the order in which `auto` tries them."""
RETRIES = 2
ZYGOTE_BYTES, ZYGOTE_TASKS = 64 << 20, 8
"""Allowance of a control group for the zygote itself."""
T = TypeVar("T")

PROBE = """
import os, socket, sys

def refused(act):
    try:
        return act() is None and os._exit(0)
    except OSError:
        return True

tried = {
    "fork": lambda: os.fork() or None,
    "socket": lambda: socket.socket().close() or 1,
    "signal": lambda: os.kill(os.getppid(), 0) or 1,
    "host file": lambda: open("/etc/passwd") and 1,
    "processes": lambda: os.listdir("/proc") and 1,
    "write": lambda: os.open(os.__file__, os.O_WRONLY),
    "start": lambda: os.execv(sys.executable, ["python", "-c", "0"]),
}
print([name for name, act in tried.items() if refused(act) is not True])
"""
"""A program that tries to escape; it prints the attempts that succeeded."""


class Wrecked(Exception):
    """The sandbox failed every time this candidate ran, so the failure is attributed to the candidate."""


def start_zygote(tier: Tier, limits: Limits) -> Zygote:
    """Starts a zygote and probes its isolation. Raises Lost with the reason if it does not hold."""
    try:
        group: cgroups.Group | None = cgroups.Group(limits.memory + ZYGOTE_BYTES, limits.tasks + ZYGOTE_TASKS)
    except (OSError, KeyError):
        group = None
    try:
        return _probed(Zygote(tier, limits, group))
    except Lost:
        if group is None:
            raise
        return _probed(Zygote(tier, limits, None))  # the group could be created but perhaps not joined


def _probed(zygote: Zygote) -> Zygote:
    try:
        report = zygote.start({"mode": "program", "source": PROBE}, b"", 10.0, False).wait()
        printed = report.stdout.decode("utf-8", "replace").strip()
        if zygote.tier != "none" and printed != "[]":
            escaped = f"it does not prevent {printed}" if printed else f"its probe exited with code {report.code}"
            raise Lost(escaped)
    except Lost:
        zygote.close()
        raise
    return zygote


class Slot:
    """Resources to grade one program at a time: a zygote for candidates, and one for tests that no candidate shares."""

    def __init__(self, tier: Tier, limits: Limits) -> None:
        self.tier: Tier = tier
        self.limits = limits
        self._zygotes: dict[str, Zygote] = {}

    @property
    def candidate(self) -> Zygote:
        return self._zygote("candidate")

    @property
    def tests(self) -> Zygote:
        return self._zygote("tests")

    def _zygote(self, role: str) -> Zygote:
        if role not in self._zygotes:
            self._zygotes[role] = start_zygote(self.tier, self.limits)
        return self._zygotes[role]

    def close(self) -> None:
        """Closes both zygotes; the next use starts new ones."""
        while self._zygotes:
            self._zygotes.popitem()[1].close()


class Sandbox:
    """Thread-safe pool of sandboxed executions. Raises ConfigError if the chosen isolation is unavailable."""

    def __init__(
        self, choice: Choice = "auto", accept_arbitrary_code: bool = False, limits: Limits | None = None, slots: int = 0
    ) -> None:
        self.limits = limits or Limits()
        self.tier: Tier = self._start_first(choice, accept_arbitrary_code)
        self.slots = slots or len(os.sched_getaffinity(0))

    def _start_first(self, choice: Choice, accepted: bool) -> Tier:
        """Starts the first slot in the chosen tier; `auto` uses the first tier whose isolation holds."""
        if choice == "none" and not accepted:
            raise ConfigError(
                "reward.sandbox = 'none' would execute model-written code with your permissions. To accept that, also "
                "set reward.accept_arbitrary_code = true."
            )
        if sys.platform != "linux":
            raise ConfigError(f"the code sandbox needs Linux, but this is {sys.platform}.")
        tiers: Sequence[Tier] = TIERS if choice == "auto" else (choice,)
        reasons: list[str] = []
        for tier in tiers:
            slot = Slot(tier, self.limits)
            try:
                _ = slot.candidate
            except Lost as lost:
                reasons.append(f"{tier}: {lost}")
                continue
            self._set_slots([slot])
            return tier
        raise ConfigError(
            f"the code sandbox cannot start, so model-written code is not executed ({'; '.join(reasons)}). Allow user "
            "namespaces, use Linux 6.2 or newer for Landlock, or see docs/guides/sandbox.md for running without it."
        )

    def _set_slots(self, slots: list[Slot]) -> None:
        self._pid, self._all, self._free = os.getpid(), slots, list(slots)
        self._room = threading.Condition()
        self._finalizer = weakref.finalize(self, _close_all, self._pid, self._all)

    def close(self) -> None:
        """Closes all zygotes. The sandbox can still be used; it then starts new ones."""
        _close_all(self._pid, self._all)

    def attempt(self, work: Callable[[Slot], T]) -> T:
        """Runs `work` with a slot; if the sandbox fails, retries up to twice with fresh zygotes.

        Raises RolloutError(boundary="sandbox") if all attempts fail, or Wrecked if the candidate was running each time:
        a candidate must not be able to avoid being scored.
        """
        losses: list[Lost] = []
        for _ in range(1 + RETRIES):
            with self._slot() as slot:
                try:
                    return work(slot)
                except Lost as lost:
                    slot.close()
                    losses.append(lost)
                except BaseException:
                    slot.close()  # an execution may still be running
                    raise
        if all(lost.began for lost in losses):
            raise Wrecked(str(losses[-1]))
        raise RolloutError(
            f"the code sandbox failed {len(losses)} times; the last error: {losses[-1]}. The code was not scored.",
            boundary="sandbox",
        )

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        if self._pid != os.getpid():  # after a fork, the zygotes belong to the parent
            self._set_slots([])
        with self._room:
            self._room.wait_for(lambda: self._free or len(self._all) < self.slots)
            if not self._free:
                self._free.append(Slot(self.tier, self.limits))
                self._all.append(self._free[-1])
            slot = self._free.pop()
        try:
            yield slot
        finally:
            with self._room:
                self._free.append(slot)
                self._room.notify()


def _close_all(pid: int, slots: list[Slot]) -> None:
    if pid == os.getpid():
        for slot in slots:
            slot.close()


def probe() -> list[tuple[str, bool, str]]:
    """Each tier and the control groups with whether they work on this machine, and details or the reason why not."""
    results: list[tuple[str, bool, str]] = []
    for tier in TIERS:
        try:
            start_zygote(tier, Limits()).close()
            results.append((tier, True, "works"))
        except Lost as lost:
            results.append((tier, False, str(lost)))
    groups = cgroups.available()
    return [*results, ("control groups", bool(groups), groups or "this user cannot create them")]
