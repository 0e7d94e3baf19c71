"""Marks a directory as in use, across processes: a `flock` on it, which the kernel drops when its process dies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: there, a store's directory serves one process at a time
    fcntl = None  # type: ignore[assignment]


WAIT_SECONDS = 10.0


class BusyError(Exception):
    """Someone else holds the directory in a way that excludes this use."""


class Pin:
    """Holds a directory: shared by all who read it, or alone by who is to remove or fill it. Never waits.

    Raises:
        FileNotFoundError: there is no such directory (any more).
        BusyError: it is held by others.
    """

    def __init__(self, path: Any, *, alone: bool = False) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            if fcntl is not None:
                fcntl.flock(self._descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            # Between opening and locking, another process may have moved it away.
            if not os.path.samestat(os.stat(path), os.fstat(self._descriptor)):
                raise FileNotFoundError(f"{path} was replaced")
        except BlockingIOError as error:
            self.close()
            raise BusyError(f"{path} is in use") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go; once or more."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_and_hold(path: Any) -> Pin:
    """Makes a directory under `writing/` and holds it, so that nobody takes it for what a killed process left there.

    Raises:
        OSError: it cannot be made.
    """
    for _ in range(3):  # another process's clean-up may take it before it is held
        os.makedirs(path, exist_ok=True)
        try:
            return Pin(path, alone=True)
        except (BusyError, FileNotFoundError):
            time.sleep(0.01)
    return Pin(path, alone=True)


@contextmanager
def held(path: Any, *, alone: bool = False) -> Iterator[None]:
    """Holds a directory as a `Pin` does, and waits for it; goes on without where that takes too long or cannot be."""
    pin = None
    until = time.monotonic() + WAIT_SECONDS
    while pin is None and time.monotonic() < until:
        try:
            pin = Pin(path, alone=alone)
        except BusyError:
            time.sleep(0.01)
        except OSError:  # a file system without locks
            break
    try:
        yield
    finally:
        if pin is not None:
            pin.close()
