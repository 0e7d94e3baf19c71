"""The command line as a process: its streams, and how it ends, above all when it is interrupted."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NoReturn

from cacheblend_jax.cli.main import INTERRUPTED, interrupted, main

AGAIN_SECONDS = 0.02  # until a lost interrupt comes again


def run() -> NoReturn:
    """Runs the process's command, and ends the process with its exit code."""
    _open_streams()
    ended: list[int] = []
    atexit.register(partial(_end_if_ended, ended))  # the first to be registered is the last to be called
    try:
        with _no_interrupt_lost():
            code = main()
    except KeyboardInterrupt:  # before `main` was ready for it, or a second one
        code = interrupted()
    if code != INTERRUPTED:
        ended.append(code)
        sys.exit(code)
    # What was interrupted may still run in threads that nothing can stop: XLA's compiler, for up to minutes. A normal
    # exit either waits for it, or takes down what it uses and crashes. The command has closed its engine and store
    # while the interrupt went up to `main`, so nothing is left to finish but the streams.
    _end_at_once(code)


def _open_streams() -> None:
    """Has standard streams that are closed read and take nothing, and stdout take what its encoding lacks as `?`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _end_if_ended(codes: list[int]) -> None:
    """Ends the process of a command that has ended, before the interpreter takes itself down.

    It does so module by module, which of JAX's takes half a second.
    """
    if codes:  # else an error that nobody handled is still to be reported
        _end_at_once(codes[0])


def _end_at_once(code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):  # closed, or whoever read our output is gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """In its body, an interrupt that comes in a callback whose exceptions Python ignores comes again, a little later.

    Such callbacks are those of weak references, finalizers, and JAX's own after a garbage collection.
    """
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    report = sys.unraisablehook

    def repeat_or_report(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)  # raised here, it would be lost again
        else:
            report(lost)

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    sys.unraisablehook = repeat_or_report
    try:
        yield
    finally:
        sys.unraisablehook = report
        signal.setitimer(signal.ITIMER_REAL, 0)
