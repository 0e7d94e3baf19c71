"""Compiling beside what a command computes with the programs that it has already."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cacheblend_jax.cli.progress import Advance

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.engine.engine import Engine
    from cacheblend_jax.engine.prompt import Prompt

logger = logging.getLogger(__name__)


@contextmanager
def compiled_meanwhile(
    engine: Engine,
    prompt: Prompt,
    modes: Sequence[str],
    max_new_tokens: int,
    advance: Advance,
    *,
    precomputed: bool = True,
) -> Iterator[Callable[[], object]]:
    """Compiles on threads what a prompt needs (`Engine.prepare`); yields a function that waits for the last of it.

    Where the body is left early, what is not begun is not compiled. A failure is not raised: whoever needs the program
    meets it.

    Args:
        advance: called with the number of programs that are ready and their total.
    """
    abandoned = threading.Event()

    def advance_or_stop(done: int, total: int) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        advance(done, total)

    def prepare() -> None:
        try:
            engine.prepare(
                prompt, modes, max_new_tokens=max_new_tokens, precomputed=precomputed, progress=advance_or_stop
            )
        except Exception:
            logger.debug("not everything was compiled in advance", exc_info=True)
        finally:
            advance(1, 1)

    thread = ThreadPoolExecutor(1, thread_name_prefix="cacheblend-compile")
    try:
        future = thread.submit(prepare)
        yield lambda: wait([future])
    finally:
        abandoned.set()
        thread.shutdown(wait=False)  # after an interrupt the process ends without waiting for the compiler


class _AbandonedError(Exception):
    """Ends the compiling of programs that nobody needs any more."""
