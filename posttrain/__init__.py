"""posttrain: post-train language models with reinforcement learning, from a laptop's CPU to a cluster.

>>> import posttrain as pt
>>> result = pt.grpo(model="abacus", tasks="arithmetic", out="runs/first")   # doctest: +SKIP

Names are imported on first use, so importing the package does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.api import Result, evaluate, grpo, resume, search, sft, train
    from posttrain.planner.estimate import plan
    from posttrain.types import Message, Task, Verdict

__version__ = "0.1.0"
__all__ = ["Message", "Result", "Task", "Verdict", "__version__", "evaluate", "grpo", "plan", "resume", "search",
           "sft", "train"]  # fmt: skip

_HOME = {
    "Message": "posttrain.types",
    "Task": "posttrain.types",
    "Verdict": "posttrain.types",
    "Result": "posttrain.api",
    "evaluate": "posttrain.api",
    "grpo": "posttrain.api",
    "plan": "posttrain.planner.estimate",
    "resume": "posttrain.api",
    "search": "posttrain.api",
    "sft": "posttrain.api",
    "train": "posttrain.api",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
