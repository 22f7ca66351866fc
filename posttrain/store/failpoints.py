"""Failpoints: named places where tests kill the process to check that a killed run resumes exactly.

`POSTTRAIN_FAILPOINT=checkpoint:manifest:2` kills the process with SIGKILL the second time it reaches
`checkpoint:manifest`, as the kernel's out-of-memory killer or a pre-empted machine would. Without the variable, a
failpoint only counts how often it was reached.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from functools import cache

from posttrain.types import ConfigError

VARIABLE = "POSTTRAIN_FAILPOINT"

FAILPOINTS: tuple[str, ...] = (
    "step:start",
    "journal:recorded",
    "step:rollouts-done",
    "step:updated",
    "step:before-store",
    "store:in-transaction",
    "store:committed",
    "step:after-store",
    "step:before-checkpoint",
    "checkpoint:file-written",
    "checkpoint:fsynced",
    "checkpoint:manifest",
    "checkpoint:before-rename",
    "checkpoint:after-rename",
    "checkpoint:retention",
    "step:after-checkpoint",
)
"""Every failpoint in the package, in the order in which a training step reaches them."""

hits: Counter[str] = Counter()
"""How often this process reached each failpoint."""


def failpoint(name: str) -> None:
    """Kills the process with SIGKILL if `POSTTRAIN_FAILPOINT` is `name` or `name:hit` (hits count from 1).

    Raises ConfigError if `name`, or the name in the variable, is not in `FAILPOINTS`.
    """
    if name not in FAILPOINTS:
        raise ConfigError(f"failpoint {name!r} is not listed in FAILPOINTS; add it there so that tests cover it.")
    hits[name] += 1
    setting = os.environ.get(VARIABLE)
    if setting and _parse(setting) == (name, hits[name]):
        os.kill(os.getpid(), signal.SIGKILL)


@cache
def _parse(setting: str) -> tuple[str, int]:
    name, _, hit = setting.rpartition(":")
    if hit.isdecimal() and name in FAILPOINTS and int(hit) >= 1:
        return name, int(hit)
    if setting in FAILPOINTS:
        return setting, 1
    raise ConfigError(f"{VARIABLE}={setting!r} is not NAME or NAME:HIT, where NAME is one of {', '.join(FAILPOINTS)}.")
