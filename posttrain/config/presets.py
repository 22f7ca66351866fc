"""Named settings: the paper or the implementation whose choices they reproduce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Settings by section, and what they reproduce."""

    about: str
    settings: Mapping[str, Mapping[str, Any]]


PRESETS: dict[str, dict[str, Preset]] = {}
"""Algorithm → preset name → preset."""
