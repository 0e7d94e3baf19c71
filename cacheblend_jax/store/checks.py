"""Checks of what users pass to a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.store.record import DTYPES

if TYPE_CHECKING:
    from cacheblend_jax.store.entry import ChunkEntry


def check_capacity(name: str, value: object, *, least: int) -> None:
    """Checks a number of bytes.

    Raises:
        CacheBlendError: it is not a whole number, or too small; names the argument.
    """
    if not is_whole_number(value, least=least):
        raise CacheBlendError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_text(name: str, value: object) -> None:
    """Checks that a value is text.

    Raises:
        CacheBlendError: it is not; names the argument.
    """
    if not is_text(value):
        raise CacheBlendError(f"{name} must be a str that UTF-8 can encode, got {value!r}")


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that UTF-8 can encode: half of a surrogate pair alone is none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_dtype(entry: ChunkEntry) -> None:
    """Checks that an entry's values are of a dtype that a model's KV has.

    Raises:
        CacheBlendError: they are not.
    """
    if entry.dtype.name not in DTYPES:
        raise CacheBlendError(f"an entry must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {entry.dtype}")
