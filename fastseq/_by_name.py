"""Objects that stand for a user's function: copied and pickled as Python does with functions."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any


class ByName:
    """A copy is the object itself, a pickle its function's name: it has to be found by it."""

    function: Callable

    def __copy__(self) -> ByName:
        return self

    def __deepcopy__(self, _memo: dict) -> ByName:
        return self

    def __reduce__(self) -> tuple:
        where = self.function.__module__, self.function.__qualname__
        try:
            found = _find(*where)
        except (ImportError, AttributeError):
            found = None
        if found is not self:
            raise pickle.PicklingError(f"{self!r} is not what {'.'.join(where)} names")
        return _find, where


def _find(module: str, name: str) -> Any:
    return attrgetter(name)(import_module(module))
