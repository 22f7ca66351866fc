"""Cache folder for data that can be recomputed: compiled kernels and reference log-probabilities."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "POSTTRAIN_CACHE"


def folder(part: str) -> Path:
    """$POSTTRAIN_CACHE/part, or ~/.cache/posttrain/part; the folder may not exist yet."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "posttrain") / part
