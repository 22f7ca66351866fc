"""Tasks and environments."""

from collections.abc import Callable

from posttrain.envs.env import World
from posttrain.envs.games import Number

ENVS: dict[str, Callable[..., World]] = {"number": Number}
"""Name in `env.name` → environment."""
