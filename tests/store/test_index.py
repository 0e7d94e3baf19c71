"""The index by itself: transactions end however they fail."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from cacheblend_jax.store.index import Index


class Interrupted:
    """A connection whose `BEGIN` is interrupted once SQLite has begun, as by Ctrl-C while it waits for the lock."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection, self.interrupts = connection, True

    def execute(self, statement: str, *parameters):
        cursor = self.connection.execute(statement, *parameters)
        if self.interrupts and statement.startswith("BEGIN"):
            self.interrupts = False
            raise KeyboardInterrupt
        return cursor

    def __getattr__(self, name: str):
        return getattr(self.connection, name)


def test_a_transaction_that_is_interrupted_as_it_begins_ends(tmp_path):
    path = str(tmp_path / "index.sqlite")
    with closing(Index(path)) as index, closing(Index(path)) as other:
        index._writing = Interrupted(index._writing)
        with pytest.raises(KeyboardInterrupt):
            index.reserve("0" * 32, 1)
        assert not index._writing.in_transaction
        other.reserve("1" * 32, 1)
        index.reserve("2" * 32, 1)
        assert len(other.packs("writing")) == 2
