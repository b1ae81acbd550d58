"""Names of a package that are imported when they are first used, so that a program pays for what it needs alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def importer(names: dict[str, Any], home: Mapping[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__` (PEP 562). `names` are its globals(), `home` says which module each late name is in."""

    def find(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {names['__name__']!r} has no attribute {name!r}")
        value = names[name] = getattr(importlib.import_module(home[name]), name)
        return value

    return find
