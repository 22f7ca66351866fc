"""Multi-turn environments and the registry of their names."""

from typing import Any

from posttrain.envs.adventure import Adventure
from posttrain.envs.dialogue import Dialogue, load_user
from posttrain.envs.games import Countdown, Number, Word
from posttrain.envs.gymnasium import load_gymnasium
from posttrain.envs.prime_verifiers import load_verifiers
from posttrain.envs.tools import Tools

ENVS: dict[str, Any] = {
    "number": Number,
    "countdown": Countdown,
    "word": Word,
    "adventure": Adventure,
    "dialogue": Dialogue,
    "tools": Tools,
    "dialogue:": load_user,
    "gymnasium:": load_gymnasium,
    "verifiers:": load_verifiers,
}
"""Value of `env.name` → environment. A name ending in a colon maps to a loader, called with the text after it."""
