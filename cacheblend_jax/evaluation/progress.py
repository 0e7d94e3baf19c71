"""How long work shows how far it has come: the one type of every `progress` argument here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")


@runtime_checkable
class Progress(Protocol):
    """Wraps the items of a loop, as tqdm does: `for row in progress(rows, "evaluate")`."""

    def __call__(self, items: Iterable[Item], what: str, /) -> Iterable[Item]:
        """Returns the items in their order; `what` names the loop in a word or two."""


def no_progress(items: Iterable[Item], what: str, /) -> Iterable[Item]:
    """Shows nothing."""
    return items
