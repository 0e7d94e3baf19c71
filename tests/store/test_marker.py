"""The marker of a store's directory: several processes may write it at the same time, and none undoes another's."""

from __future__ import annotations

import pytest
from etils import epath

from cacheblend_jax.store import marker, ownership
from cacheblend_jax.store.disk_log import DiskLog
from cacheblend_jax.store.marker import Marker, directory_id, read_marker, write_marker
from cacheblend_jax.store.pins import BusyError, Pin
from cacheblend_jax.store.places import Places


@pytest.fixture
def alone(monkeypatch) -> list[bool]:
    """Whether the directory was held alone, each time that a marker was written, or read to be written."""
    seen: list[bool] = []

    def watched(function):
        def call(root, *arguments, **options):
            try:
                Pin(root).close()
                seen.append(False)
            except BusyError:
                seen.append(True)
            return function(root, *arguments, **options)

        return call

    monkeypatch.setattr(marker, "read_marker", watched(read_marker))
    for module in (marker, ownership):
        monkeypatch.setattr(module, "write_marker", watched(write_marker))
    return seen


def test_a_directory_is_marked_by_one_process_at_a_time(tmp_path, alone):
    root = epath.Path(tmp_path)
    ownership.claim(root, DiskLog(root), local=True)
    identity = directory_id(root)
    del alone[1:]  # `directory_id` only reads
    ownership.claim(root, DiskLog(root), local=True)
    marker.remember_context(Places(root, local=True, writable=True), "", "text")
    assert alone == [True, True, True]
    assert (directory_id(root), read_marker(root).contexts[""]) == (identity, "text")


def test_a_directory_that_was_marked_meanwhile_stays_as_it_is(tmp_path, monkeypatch):
    """Where the file system has no locks, or an older release is the other one."""
    root = epath.Path(tmp_path)

    def later(*_) -> bool:
        write_marker(root, Marker("ab", 1), local=True)
        return True

    monkeypatch.setattr(ownership, "_is_free", later)
    ownership.claim(root, DiskLog(root), local=True)
    assert directory_id(root) == "ab"
