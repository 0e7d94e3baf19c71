"""Runs a process to its end, or ends it, and reads what it said: JSON, a line for each thing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class End:
    """What a process said, and how it ended, as the rest of a sentence."""

    said: list[dict[str, Any]]
    how: str


def ended(command: Sequence[str], environment: Mapping[str, str], limit_seconds: float) -> End:
    """Runs a process, for `limit_seconds` at most.

    Raises:
        OSError: it can't be started.
    """
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        try:
            written, complaints = child.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            return End(_said(child.communicate()[0]), f"ran for more than {limit_seconds:g} s")
        except BaseException:
            child.kill()
            raise
    if child.returncode == 0:
        return End(_said(written), "ended without results")
    how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else f"exited with {child.returncode}"
    last = (complaints.strip().splitlines() or ["it said nothing"])[-1][:300]
    return End(_said(written), f"{how}: {last}")


def _said(written: str) -> list[dict[str, Any]]:
    found = []
    for line in written.splitlines():
        try:
            said = json.loads(line)
        except ValueError:  # cut off, or a library's own output
            continue
        if isinstance(said, dict):
            found.append(said)
    return found
