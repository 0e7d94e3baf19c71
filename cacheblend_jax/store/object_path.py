"""Paths on object storage, whose clients raise errors of their own: here all of them are `OSError`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from etils.epath.gpath import PosixGPath

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def os_errors(path: object) -> Iterator[None]:
    """Has the body raise `OSError` for whatever a client of object storage raises: no credentials, no connection.

    Raises:
        OSError: the client failed; names the path.
        ImportError: there is no client.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def _translated(method: Method) -> Method:
    @wraps(method)
    def call(self: ObjectPath, *arguments: Any, **options: Any) -> Any:
        with os_errors(self):
            return method(self, *arguments, **options)

    return call  # type: ignore[return-value]


class ObjectPath(PosixGPath):
    """A path on object storage, whose methods raise `OSError` as `os_errors` says."""

    exists = _translated(PosixGPath.exists)
    is_dir = _translated(PosixGPath.is_dir)
    mkdir = _translated(PosixGPath.mkdir)
    rmtree = _translated(PosixGPath.rmtree)
    unlink = _translated(PosixGPath.unlink)
    stat = _translated(PosixGPath.stat)
    read_bytes = _translated(PosixGPath.read_bytes)
    write_bytes = _translated(PosixGPath.write_bytes)

    def iterdir(self) -> Iterator[Any]:
        """Returns what is in a directory; all of it is listed at once."""
        with os_errors(self):
            return iter(list(super().iterdir()))
