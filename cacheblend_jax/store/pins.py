"""Marks directories as in use, across processes: by a `flock`, which the kernel releases when its holder dies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows: a store's directory then serves one process at a time
    fcntl = None  # type: ignore[assignment]

WAIT_SECONDS = 10.0


class BusyError(Exception):
    """Another holder of the directory excludes this use of it."""


class Pin:
    """Holds a directory: together with other readers, or `alone` to remove or fill it. Never waits.

    Args:
        follow: the directory may be a symbolic link.

    Raises:
        FileNotFoundError: there is no such directory, or no longer; or it is a symbolic link.
        BusyError: others hold it.
        OSError: it cannot be opened or locked.
    """

    def __init__(self, path: str | os.PathLike[str], *, alone: bool = False, follow: bool = False) -> None:
        self._holder = os.getpid()
        flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
        try:
            self._descriptor: int | None = os.open(path, flags)
        except OSError as error:
            if not follow and os.path.islink(path):
                raise FileNotFoundError(f"{path} is a symbolic link, which a store does not follow") from error
            raise
        try:
            if fcntl is not None:
                fcntl.flock(self._descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            # Another process may have moved it away between opening and locking.
            if not os.path.samestat(os.stat(path, follow_symlinks=follow), os.fstat(self._descriptor)):
                raise FileNotFoundError(f"{path} was replaced")
        except BlockingIOError as error:
            self.close()
            raise BusyError(f"{path} is in use") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets the directory go. Calling it again does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            # A process that forked meanwhile has the descriptor too, and would hold the directory on.
            if fcntl is not None and self._holder == os.getpid():
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        except OSError:  # a file system without locks
            pass
        finally:
            os.close(descriptor)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_and_hold(path: str | os.PathLike[str]) -> Pin:
    """Makes a directory under `writing/` and holds it alone, so that no process takes it for a killed one's leftover.

    Raises:
        OSError: it cannot be made.
        BusyError: others hold it.
    """
    for _ in range(3):  # another process's clean-up may remove it before it is held
        os.makedirs(path, exist_ok=True)
        try:
            return Pin(path, alone=True)
        except (BusyError, FileNotFoundError):
            time.sleep(0.01)
    return Pin(path, alone=True)


@contextmanager
def held(path: str | os.PathLike[str], *, alone: bool = False) -> Iterator[None]:
    """Holds a store's directory for the body as a `Pin` does, but waits while others hold it.

    After 10 s, or where the file system has no locks, the body runs without.
    """
    pin = None
    until = time.monotonic() + WAIT_SECONDS
    while pin is None and time.monotonic() < until:
        try:
            pin = Pin(path, alone=alone, follow=True)
        except BusyError:
            time.sleep(0.01)
        except OSError:  # a file system without locks
            break
    try:
        yield
    finally:
        if pin is not None:
            pin.close()
