"""Names that a package imports when they are first used, so that a part of it runs without what the rest needs."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib import import_module


def imported(package: str, name: str, names: Collection[str], homes: Sequence[str]) -> object:
    """Returns what `name` is in the first of a package's modules that has it; what the package's `__getattr__` does.

    From then on the package itself has it.

    Args:
        names: those that the package has of its modules.
        homes: these modules, relative to the package; those that need the least come first.

    Raises:
        AttributeError: it is none of the names.
    """
    for home in homes if name in names else ():
        module = import_module(f"{package}.{home}")
        if hasattr(module, name):
            value = getattr(module, name)
            setattr(sys.modules[package], name, value)
            return value
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
