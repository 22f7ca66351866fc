"""Where things are kept that can be computed again: compiled kernels, reference log-probabilities."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "POSTTRAIN_CACHE"


def folder(part: str) -> Path:
    """$POSTTRAIN_CACHE/part, or ~/.cache/posttrain/part; it need not exist."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "posttrain") / part
