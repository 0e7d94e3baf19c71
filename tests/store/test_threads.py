"""The store among threads: the queue to the disk, uses that reach the index, and entries that change on their way."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath
from store_cases import fill, key_of, make_entry, same

import cacheblend_jax as cb
from cacheblend_jax.runtime import exit_hook
from cacheblend_jax.store import orbax_write
from cacheblend_jax.store.entry import QueuedEntry
from cacheblend_jax.store.persistent import MAX_UNWRITTEN_SECONDS, MAX_UNWRITTEN_USES
from cacheblend_jax.store.record import storage_name
from cacheblend_jax.store.writeback import WriteBack


def ends(action: Callable[[], object]) -> bool:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(300)  # the first write imports Orbax
    return not thread.is_alive()


def test_a_flush_does_not_wait_for_what_is_discarded(monkeypatch):
    monkeypatch.setattr(WriteBack, "_wake", lambda self: True)  # a writer that is late
    queue = WriteBack(lambda batch: None, 2**30)
    queue.submit(QueuedEntry("a", make_entry(1)), wait=False)

    def discard() -> None:
        while True:
            with queue._changed:
                if queue._hurry:  # `flush` waits
                    break
        queue.discard({"a"})

    discarding = threading.Thread(target=discard)
    discarding.start()
    assert ends(queue.flush)
    discarding.join()


def test_a_chore_that_fails_does_not_end_the_writing(caplog):
    written = []
    queue = WriteBack(written.extend, 2**30)
    queue.run_soon("division", lambda: 1 // 0)
    queue.submit(QueuedEntry("a", make_entry(1)), wait=False)
    assert ends(queue.close)
    assert [queued.key for queued in written] == ["a"]
    assert "ZeroDivisionError" in caplog.text


def test_without_a_thread_entries_stay_in_memory(tmp_path, monkeypatch, caplog):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    store = cb.ChunkStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert store.put(key_of(1), make_entry(1), uses=0)
        assert store.put(key_of(2), make_entry(2), wait=True)
    assert store.stats.dropped == 2
    assert caplog.text.count("can't start new thread") == 1
    assert store.put(key_of(3), make_entry(3))
    assert ends(store.close)
    assert (store.stats.written, store.stats.host.entries) == (1, 3)


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no forks here")
def test_a_forked_process_does_not_wait_at_its_exit():
    gate = threading.Event()
    queue = WriteBack(lambda batch: gate.wait(), 2**30)
    queue.submit(QueuedEntry("a", make_entry(1)), wait=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's: the fork runs none of it
        child = os.fork()
    if child == 0:
        os._exit(len(exit_hook._unfinished))
    assert os.waitpid(child, 0)[1] == 0
    assert queue in exit_hook._unfinished
    gate.set()
    queue.close()


def test_uses_reach_the_index_by_number_and_by_time(tmp_path, monkeypatch):
    fill(tmp_path, [1])
    with cb.ChunkStore(tmp_path) as store:
        monkeypatch.setattr(store._disk.queue, "run_soon", lambda name, chore: chore())

        def uses() -> int:
            return store._disk.disk.index.find(storage_name(key_of(1))).uses

        for _ in range(MAX_UNWRITTEN_USES - 1):
            store.get(key_of(1))
        assert uses() == 1
        store.get(key_of(1))
        assert uses() == 1 + MAX_UNWRITTEN_USES
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + MAX_UNWRITTEN_SECONDS)
        store.get(key_of(1))
        assert uses() == 2 + MAX_UNWRITTEN_USES


@pytest.mark.parametrize("read", ["get", "promote"])
@pytest.mark.parametrize("how", ["put", "remove", "clear"])
def test_what_changes_while_it_is_read_is_not_kept_as_it_was(tmp_path, monkeypatch, how, read):
    fill(tmp_path, [1])
    with cb.ChunkStore(tmp_path) as store:
        load = store._disk.load
        change = {
            "put": lambda: store.put(key_of(1), make_entry(2)),
            "remove": lambda: store.remove(key_of(1)),
            "clear": store.clear,
        }[how]

        def slow(key: str, *wanted):
            loaded = load(key, *wanted)
            change()
            return loaded

        monkeypatch.setattr(store._disk, "load", slow)
        getattr(store, read)(key_of(1))
        monkeypatch.undo()
        found = store.get(key_of(1))
        assert same(found, make_entry(2)) if how == "put" else found is None
        assert not store._loads._loads


def test_uses_of_what_is_not_written_are_forgotten(tmp_path):
    with cb.ChunkStore(tmp_path, disk_bytes=20_000) as store:

        def uses(key: str) -> int:
            return store._disk.disk.index.find(storage_name(key)).uses

        store.put(key_of(1), make_entry(1, tokens=400), uses=0)  # larger than the disk
        for _ in range(2):  # the second time there is nothing to write
            store.put(key_of(2), make_entry(2), uses=0)
            store.flush()
        assert (store.stats.written, store.stats.disk.rejected) == (1, 1)
        assert uses(key_of(2)) == 0
        for seed in (1, 2):  # other entries of the same keys, which a request has used
            store.put(key_of(seed), make_entry(seed + 2))
        store.flush()
        assert (store.stats.written, uses(key_of(1)), uses(key_of(2))) == (3, 1, 1)


def test_stores_of_one_process_save_one_after_the_other(tmp_path, monkeypatch):
    """Of two saves at the same time, Orbax may lose one."""
    meeting = threading.Barrier(2)

    def save(*_):
        with pytest.raises(threading.BrokenBarrierError):
            meeting.wait(0.2)

    monkeypatch.setattr(orbax_write.ocp, "save", save)
    with ThreadPoolExecutor(2) as stores:
        list(stores.map(lambda name: orbax_write.save_tree(epath.Path(tmp_path / name), {}), "ab"))


@pytest.mark.parametrize("what", ["flush", "submit"])
def test_an_interrupted_wait_hurries_nobody_any_more(monkeypatch, what):
    queue = WriteBack(lambda batch: None, 1)
    monkeypatch.setattr(queue, "_wake", lambda: True)  # a writer that is late
    queue.submit(QueuedEntry("a", make_entry(1)), wait=False)

    def interrupted(*_):
        assert queue._hurry == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(queue._changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.flush() if what == "flush" else queue.submit(QueuedEntry("b", make_entry(2)), wait=True)
    assert queue._hurry == 0
