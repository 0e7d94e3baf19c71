"""The results file of an evaluation: written row by row, so that an interrupted run can be continued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy


class ResultsFile:
    """Records of an evaluation, kept as JSON lines where there is a path: a header, then a line for each record.

    Args:
        path: a new file, or one that an evaluation with the same `header` has begun; `None`: kept in memory only.
        header: what records of one file have in common; files of another header are refused.

    Attributes:
        records: those of the file, then those added; see `Evaluator.evaluate_row`.

    Raises:
        CacheBlendError: the file is no results file, has another header, or cannot be written.
    """

    def __init__(self, path: str | Path | None, header: dict[str, Any]) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        if self._path.exists() and self._path.stat().st_size:
            self._read(self._path, header)
        else:
            self._append(self._path, [header])

    def done(self) -> set[tuple[str, str]]:
        """Returns the row and the setting of every record."""
        return {(record["row"], record["setting"]) for record in self.records}

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Appends records."""
        self.records += records
        if self._path is not None:
            self._append(self._path, records)

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        except ValueError as error:
            raise CacheBlendError(f"{path} is not a results file: {error}; choose another --out") from error
        found = lines[0] if lines and isinstance(lines[0], dict) else {}
        if other := [name for name in header if name not in found or found[name] != header[name]]:
            raise CacheBlendError(f"{path} holds results of another {' and '.join(other)}; choose another --out")
        if torn:  # a run was killed while it wrote its last line
            path.write_bytes(whole + b"\n")
        self.records = lines[1:]

    @staticmethod
    def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise CacheBlendError(f"cannot write --out {path}: {reason_and_remedy(error)}") from error
