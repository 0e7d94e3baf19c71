"""Python's garbage collector, for a command that answers once: it would look for cycles hundreds of times in vain."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

ALLOCATIONS = 50_000  # of objects that may hold others, less those freed, before new ones are searched (700 by default)


@contextmanager
def rarely_collecting() -> Iterator[None]:
    """In its body, garbage is collected rarely: what JAX's modules and its tracing make by the million mostly stays."""
    usual = gc.get_threshold()
    gc.set_threshold(ALLOCATIONS, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
