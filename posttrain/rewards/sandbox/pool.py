"""Which isolation there is, slots that execute side by side, and who is to blame when an execution does not end.

Two tiers, namespaces and Landlock; each has been seen to hold on this machine before it is used. Without either nothing
is executed, unless somebody accepts that in so many words.
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
"""What a control group leaves for the zygote itself."""
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
"""A program that tries to get out; it prints what it managed."""


class Wrecked(Exception):
    """Every time a candidate ran, its surroundings were lost after it had begun: that counts as its own failure."""


def start_zygote(tier: Tier, limits: Limits) -> Zygote:
    """A zygote that has been seen to hold. Raises Lost, saying what does not."""
    try:
        group: cgroups.Group | None = cgroups.Group(limits.memory + ZYGOTE_BYTES, limits.tasks + ZYGOTE_TASKS)
    except (OSError, KeyError):
        group = None
    try:
        return _proven(Zygote(tier, limits, group))
    except Lost:
        if group is None:
            raise
        return _proven(Zygote(tier, limits, None))  # a group that exists but may not be joined


def _proven(zygote: Zygote) -> Zygote:
    try:
        report = zygote.start({"mode": "program", "source": PROBE}, b"", 10.0, False).wait()
        said = report.stdout.decode("utf-8", "replace").strip()
        if zygote.tier != "none" and said != "[]":
            raise Lost(f"a program inside it managed {said or f'nothing, but ended with code {report.code}'}")
    except Lost:
        zygote.close()
        raise
    return zygote


class Slot:
    """Room for one grading: a zygote for candidates, and another for tests, whose memory no candidate ever gets."""

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
        """Ends both; the next use starts new ones."""
        while self._zygotes:
            self._zygotes.popitem()[1].close()


class Sandbox:
    """Executions for any number of threads. Raises ConfigError where the chosen isolation is not to be had."""

    def __init__(
        self, choice: Choice = "auto", accept_arbitrary_code: bool = False, limits: Limits | None = None, slots: int = 0
    ) -> None:
        self.limits = limits or Limits()
        self.tier: Tier = self._first(choice, accept_arbitrary_code)
        self.slots = slots or len(os.sched_getaffinity(0))

    def _first(self, choice: Choice, accepted: bool) -> Tier:
        """Starts the first slot in the tier that is chosen; `auto` takes the first that holds."""
        if choice == "none" and not accepted:
            raise ConfigError(
                "reward.sandbox = 'none' would execute code that a model wrote with your rights. To accept that, set "
                "reward.accept_arbitrary_code = true as well."
            )
        if sys.platform != "linux":
            raise ConfigError(f"the code sandbox needs Linux, and this is {sys.platform}.")
        tiers: Sequence[Tier] = TIERS if choice == "auto" else (choice,)
        reasons: list[str] = []
        for tier in tiers:
            slot = Slot(tier, self.limits)
            try:
                _ = slot.candidate
            except Lost as lost:
                reasons.append(f"{tier}: {lost}")
                continue
            self._begin([slot])
            return tier
        raise ConfigError(
            f"the code sandbox cannot start, so code that a model wrote is not executed ({'; '.join(reasons)}). Allow "
            "user namespaces, use Linux 6.2 or newer for Landlock, or see docs/guides/sandbox.md for running without."
        )

    def _begin(self, slots: list[Slot]) -> None:
        self._pid, self._all, self._free = os.getpid(), slots, list(slots)
        self._room = threading.Condition()
        self._finalizer = weakref.finalize(self, _close_all, self._pid, self._all)

    def close(self) -> None:
        """Ends every zygote. The sandbox can be used again; it then starts new ones."""
        _close_all(self._pid, self._all)

    def attempt(self, work: Callable[[Slot], T]) -> T:
        """`work` with a slot, again in a fresh one where its surroundings were lost, at most twice.

        Raises RolloutError(boundary="sandbox") when that did not help, and Wrecked when each time the candidate was
        running: what it does must not make it unjudged.
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
                    slot.close()  # an execution may be under way
                    raise
        if all(lost.began for lost in losses):
            raise Wrecked(str(losses[-1]))
        raise RolloutError(
            f"the code sandbox failed {len(losses)} times; the last time {losses[-1]}. The code was not judged.",
            boundary="sandbox",
        )

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        if self._pid != os.getpid():  # in a fork the zygotes belong to the parent
            self._begin([])
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
    """Each tier, and whether it holds here or why not; then the control groups."""
    found: list[tuple[str, bool, str]] = []
    for tier in TIERS:
        try:
            start_zygote(tier, Limits()).close()
            found.append((tier, True, "holds"))
        except Lost as lost:
            found.append((tier, False, str(lost)))
    groups = cgroups.available()
    return [*found, ("control groups", bool(groups), groups or "cannot be made by this user")]
