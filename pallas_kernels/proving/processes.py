"""Runs a process to its end, or ends it, and reads what it says: JSON, a line for each thing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any


@dataclass(frozen=True)
class End:
    """What a process said, and how it ended, as the rest of a sentence.

    Attributes:
        is_failure: it was ended, crashed, or said that it failed.
    """

    said: list[dict[str, Any]]
    how: str
    is_failure: bool


def ended(
    command: Sequence[str],
    environment: Mapping[str, str],
    limit_seconds: float,
    heard: Callable[[dict[str, Any]], None] = lambda said: None,
) -> End:
    """Runs a process, for `limit_seconds` at most.

    Args:
        heard: called with each thing when it is said, by another thread.

    Raises:
        OSError: it can't be started.
    """
    said: list[dict[str, Any]] = []
    complaints: list[str] = []

    def hear(line: str) -> None:
        if (one := _said(line)) is not None:
            said.append(one)
            heard(one)

    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        pipes = (child.stdout, hear), (child.stderr, complaints.append)
        listeners = [Thread(target=_listen, args=each, daemon=True) for each in pipes]
        for listener in listeners:
            listener.start()
        try:
            status = child.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            status = None
        except BaseException:
            child.kill()
            raise
        for listener in listeners:
            listener.join()
    if status is None:
        return End(said, f"ran for more than {limit_seconds:g} s", True)
    if status == 0:
        return End(said, "ended without results", False)
    how = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
    last = ("".join(complaints).strip().splitlines() or ["it said nothing"])[-1][:300]
    return End(said, f"{how}: {last}", True)


def _listen(pipe: Iterable[str], hear: Callable[[str], Any]) -> None:
    for line in pipe:
        hear(line)


def _said(line: str) -> dict[str, Any] | None:
    try:
        said = json.loads(line)
    except ValueError:  # cut off, or a library's own output
        return None
    return said if isinstance(said, dict) else None
