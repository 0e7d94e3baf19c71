"""Errors that users can fix: the command line prints them on one line and exits with code 2."""

import errno
from collections.abc import Callable
from typing import TypeGuard

FULL = (errno.ENOSPC, errno.EDQUOT)


class CacheBlendError(ValueError):
    """Bad usage or bad input: the message names the value, what was expected, and what to do."""


class CheckpointError(CacheBlendError):
    """A checkpoint cannot be loaded: unsupported, incomplete, or not a checkpoint at all."""


class PromptError(CacheBlendError):
    """A prompt cannot be laid out: empty, too long, with unknown token ids, or text without a tokenizer."""


class PromptTooLongError(PromptError):
    """A prompt has more tokens than the model takes; the message says how many that are."""


class QueueFull(CacheBlendError):
    """As many requests wait as a scheduler lets wait: try again later."""


class SchedulerClosed(CacheBlendError):
    """A scheduler takes no more requests: it was closed, or its thread has failed."""


class NotReadyError(CacheBlendError):
    """A prefill that was not to wait has something to wait for: the compiler, say.

    Attributes:
        work: does it; in any thread. After that, try again.
    """

    def __init__(self, message: str, work: Callable[[], object]) -> None:
        super().__init__(message)
        self.work = work


class DamagedEntryError(CacheBlendError):
    """A stored entry's bytes are not those that were written; the store has removed it, and its chunk is a miss."""


def reason_and_remedy(error: OSError, remedy: str = "choose another path") -> str:
    """Says why a file cannot be written, and what to do: `remedy`, unless space is what is missing."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}; {'free some space, or choose another file system' if error.errno in FULL else remedy}"


def is_whole_number(value: object, *, least: int, below: float = float("inf")) -> TypeGuard[int]:
    """Returns whether a value is a whole number in [least, below): an `int`, and not a `bool`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def one_line(error: BaseException) -> str:
    """Returns an error's first line, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
