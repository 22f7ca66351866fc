"""Places where a test can kill the process, so that "a killed run resumes exactly" is measured and not claimed.

`POSTTRAIN_FAILPOINT=checkpoint:manifest:2` ends the process with SIGKILL, as the kernel's out-of-memory killer or a
pre-empted machine would, the second time `checkpoint:manifest` is passed. Without the variable a failpoint only counts.
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
"""Every name in the package, in the order one step passes them."""

hits: Counter[str] = Counter()
"""How often each failpoint was passed in this process."""


def failpoint(name: str) -> None:
    """Ends the process by SIGKILL when `POSTTRAIN_FAILPOINT` is `name` or `name:hit` (hits count from 1).

    Raises ConfigError when the variable, or `name` itself, is not in `FAILPOINTS`.
    """
    if name not in FAILPOINTS:
        raise ConfigError(f"failpoint {name!r} is not listed in FAILPOINTS; add it there so that tests cover it.")
    hits[name] += 1
    setting = os.environ.get(VARIABLE)
    if setting and _parse(setting) == (name, hits[name]):
        os.kill(os.getpid(), signal.SIGKILL)


@cache
def _parse(setting: str) -> tuple[str, int]:
    name, _, last = setting.rpartition(":")
    if last.isdecimal() and name in FAILPOINTS and int(last) >= 1:
        return name, int(last)
    if setting in FAILPOINTS:
        return setting, 1
    raise ConfigError(f"{VARIABLE}={setting!r} is not NAME or NAME:HIT with a NAME from: {', '.join(FAILPOINTS)}.")
