"""Test-time search: spends tokens on several completions of a problem and chooses one.

The folder has the name of the function `posttrain.search`, and importing it would hide that one. So it can be called.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A folder of modules that is called as `posttrain.api.search`."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return import_module("posttrain.api").search(*args, **settings)


sys.modules[__name__].__class__ = _Callable
