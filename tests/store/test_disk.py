"""The store's directory: what was put comes back bit for bit in another process's hands, or is a miss; never wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from conftest import TWO_STAGES, family_model, random_prompt
from store_cases import BIG, LAYERS, fill, key_of, largest_file, make_entry, packs, run_python, same

import cacheblend_jax as cb
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.record import storage_name


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_was_stored_comes_back_bit_for_bit(tmp_path, dtype):
    wanted = {key_of(tokens): make_entry(tokens, tokens, dtype) for tokens in (1, 5, 40)}
    with cb.ChunkStore(tmp_path / "kv") as store:
        for key, entry in wanted.items():
            store.put(key, entry)
    with cb.ChunkStore(tmp_path / "kv") as store:
        assert sorted(store.keys()) == sorted(wanted)
        for key, entry in wanted.items():
            with store.open(key) as chunk:
                assert (chunk.tier, chunk.num_tokens, chunk.num_layers) == ("disk", entry.num_tokens, LAYERS)
                assert chunk.num_bytes == entry.num_bytes
                layers = [chunk.read_layer(layer) for layer in range(LAYERS)]
                with pytest.raises(IndexError, match=r"layer must be in \[0, 2\], got 3"):
                    chunk.read_layer(3)
            assert same(cb.ChunkEntry(*(np.stack(arrays) for arrays in zip(*layers, strict=True))), entry)
            loaded = store.get(key)
            assert same(loaded, entry)
            assert (loaded.fingerprint, loaded.context_ids) == ("fingerprint", (1, 2, 3))
            assert not loaded.k.flags.writeable
            with store.open(key) as chunk:
                assert chunk.tier == "host"
                assert chunk.read_layer(1)[1].tobytes() == entry.v[1].tobytes()
        assert store.stats.damaged == store.stats.misses == 0


def test_plain_orbax_reads_a_pack_and_a_single_entry(tmp_path):
    from orbax.checkpoint import v1 as ocp

    fill(tmp_path / "one", [1])
    (pack,) = packs(tmp_path / "one")
    tree = ocp.load(pack)
    assert same(cb.ChunkEntry(tree["k"], tree["v"]), make_entry(1))
    fill(tmp_path / "many", [1, 2, 3])
    (pack,) = packs(tmp_path / "many")
    trees = ocp.load(pack)
    for seed in (1, 2, 3):
        tree = trees[key_of(seed)]
        assert same(cb.ChunkEntry(tree["k"], tree["v"]), make_entry(seed))


@pytest.mark.parametrize("shape", [(2, 3, 1, 2), (2, 1, 1, 4), (1, 1, 1, 1), (3, 5, 3, 5), (2, 7, 2, 6)])
def test_every_shape_is_read_as_it_was_written_each_layer_a_storage_chunk(tmp_path, shape):
    from orbax.checkpoint import v1 as ocp

    k = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    with cb.ChunkStore(tmp_path, host_bytes=1) as store:
        store.put("a" * 64, cb.ChunkEntry(k, -k), wait=True)
        store.flush()
        assert same(store.get("a" * 64), cb.ChunkEntry(k, -k))
    (pack,) = packs(tmp_path)
    tree = ocp.load(pack)
    assert same(cb.ChunkEntry(tree["k"], tree["v"]), cb.ChunkEntry(k, -k))
    kvstore = {"driver": "ocdbt", "base": f"file://{pack}/state/"}
    for name in "kv":
        array = ts.open({"driver": "zarr3", "kvstore": kvstore, "path": f"{name}/"}).result()
        assert array.chunk_layout.read_chunk.shape == (1, *shape[1:])


def test_a_batch_shares_a_pack_of_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.store.writeback.LINGER_SECONDS", 60)  # whatever the machine's load
    fill(tmp_path, range(64))
    (pack,) = packs(tmp_path)
    assert sum(path.is_file() for path in pack.rglob("*")) <= 64


def test_a_key_never_names_a_path(tmp_path):
    keys = ["../../escape", "/etc/passwd", "a/b", "..", "", "\x00", "k" * 5000]
    with cb.ChunkStore(tmp_path / "deep" / "kv") as store:
        for seed, key in enumerate(keys):
            store.put(key, make_entry(seed))
    with cb.ChunkStore(tmp_path / "deep" / "kv") as store:
        for seed, key in enumerate(keys):
            assert same(store.get(key), make_entry(seed))
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["kv"]
    names = {path.name for path in (tmp_path / "deep" / "kv").rglob("*")}
    assert not any("escape" in name or "passwd" in name for name in names)


def test_another_salt_finds_nothing(tmp_path):
    prompt, model = random_prompt(3), family_model("llama3")
    with cb.ChunkStore(tmp_path, salt="mine") as mine:
        cb.Engine(model, mine).precompute(prompt)
    with cb.ChunkStore(tmp_path, salt="theirs") as theirs, cb.Engine(model, theirs, TWO_STAGES) as engine:
        assert engine.prefill(prompt).stats.hits == 0
    with cb.ChunkStore(tmp_path, salt="mine") as mine, cb.Engine(model, mine, TWO_STAGES) as engine:
        assert engine.prefill(prompt).stats.misses == 0


ANSWER = """
import sys
import numpy as np
import cacheblend_jax as cb
from conftest import TWO_STAGES, family_model, random_prompt
with cb.ChunkStore(sys.argv[1]) as store, cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
    for misses in (4, 0):  # the first request stored what it missed
        out = engine.prefill(random_prompt(5))
        assert out.stats.misses == misses, out.stats
    sys.stdout.buffer.write(out.logits.tobytes())
"""


@pytest.mark.once
def test_another_process_answers_with_the_same_bits(tmp_path):
    answered = run_python(ANSWER, tmp_path).stdout
    assert len(packs(tmp_path)) > 0
    with cb.ChunkStore(tmp_path) as store, cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        out = engine.prefill(random_prompt(5))
    assert (out.stats.misses, out.stats.executor) == (0, "streamed")
    assert out.logits.tobytes() == answered


def test_a_clean_exit_writes_what_waits(tmp_path):
    code = "import sys, cacheblend_jax as cb; from store_cases import *\n"
    code += "store = cb.ChunkStore(sys.argv[1]); [store.put(key_of(i), make_entry(i)) for i in range(5)]"
    run_python(code, tmp_path)
    with cb.ChunkStore(tmp_path) as store:
        assert all(same(store.get(key_of(seed)), make_entry(seed)) for seed in range(5))


# --- tiers and eviction ----------------------------------------------------------------------------------------------


def pack_bytes(tmp_path: Path) -> int:
    fill(tmp_path / "measure", [1], tokens=BIG)
    with cb.ChunkStore(tmp_path / "measure") as store:
        return store.stats.disk.bytes


def test_the_disk_keeps_what_was_seen_twice(tmp_path):
    capacity = int(4.5 * pack_bytes(tmp_path))
    with cb.ChunkStore(tmp_path / "kv", disk_bytes=capacity, host_bytes=1) as store:
        for seed in range(3):
            store.put(key_of(seed), make_entry(seed, BIG))
            store.flush()
        assert store.get(key_of(0)) is not None
        store.flush()
        for seed in range(10, 20):  # one request that is larger than the store
            store.put(key_of(seed), make_entry(seed, BIG))
            store.flush()
            assert store.stats.disk.bytes <= capacity
        assert same(store.get(key_of(0)), make_entry(0, BIG))
        assert store.get(key_of(1)) is None
        assert store.stats.disk.evicted >= 8


def test_what_is_renewed_is_evicted_from_the_disk_after_what_was_used_before(tmp_path):
    capacity = int(3.5 * pack_bytes(tmp_path))
    with cb.ChunkStore(tmp_path / "kv", disk_bytes=capacity, host_bytes=1) as store:
        for seed in range(3):
            store.put(key_of(seed), make_entry(seed, BIG), uses=0)
            store.flush()
        store.get(key_of(1))  # the index does not know of it yet
        store.renew([key_of(0)])
        assert [found.uses for found in map(store._disk.disk.index.find, names(store, range(3)))] == [0, 1, 0]
        for seed in (3, 4):
            store.put(key_of(seed), make_entry(seed, BIG))
            store.flush()
        assert set(store.keys()) == {key_of(seed) for seed in (0, 3, 4)}


def names(store: cb.ChunkStore, seeds) -> list[str]:
    return [store._disk.disk._name(key_of(seed)) for seed in seeds]


def test_an_entry_in_use_is_not_evicted_from_the_disk_even_by_another_store(tmp_path):
    capacity = int(2.5 * pack_bytes(tmp_path))
    with cb.ChunkStore(tmp_path / "kv", disk_bytes=capacity) as store:
        store.put(key_of(1), make_entry(1, BIG), uses=0)
    with cb.ChunkStore(tmp_path / "kv", disk_bytes=capacity) as reader, reader.open(key_of(1)) as chunk:
        fill(tmp_path / "kv", range(10, 16), one_by_one=True, tokens=BIG, disk_bytes=capacity)
        assert chunk.read_layer(0)[0].tobytes() == make_entry(1, BIG).k[0].tobytes()
    fill(tmp_path / "kv", range(20, 26), one_by_one=True, tokens=BIG, disk_bytes=capacity)
    with cb.ChunkStore(tmp_path / "kv") as reader:
        assert reader.get(key_of(1)) is None


def test_an_entry_in_use_is_not_evicted_from_memory():
    size = make_entry(0).num_bytes
    store = cb.ChunkStore(host_bytes=2 * size)
    store.put("used", make_entry(1))
    with store.open("used") as chunk:
        for seed in range(5):
            store.put(f"other {seed}", make_entry(seed))
        assert "used" in store
        assert chunk.tier == "host"
    chunk.close()  # once more does nothing
    for seed in range(5):
        store.put(f"other {seed}", make_entry(seed))
        store.get(f"other {seed}")
    assert "used" not in store


def test_a_flood_leaves_what_was_seen_twice_in_memory():
    size = make_entry(0).num_bytes
    store = cb.ChunkStore(host_bytes=10 * size)
    for seed in range(6):
        store.put(f"hot {seed}", make_entry(seed))
        store.get(f"hot {seed}")
    for seed in range(100):
        store.put(f"flood {seed}", make_entry(seed), uses=seed % 2)
    assert all(f"hot {seed}" in store for seed in range(6))
    for seed in range(20):  # but a working set that nobody asks for any more gives way to the next
        store.put(f"new {seed}", make_entry(seed))
        store.get(f"new {seed}")
    assert not any(f"hot {seed}" in store for seed in range(6))


def test_a_hit_on_disk_is_kept_in_memory(tmp_path):
    fill(tmp_path, [1])
    with cb.ChunkStore(tmp_path) as store:
        store.get(key_of(1))
        store.get(key_of(1))
        stats = store.stats
        assert (stats.hits, stats.disk.hits, stats.host.entries, stats.host.bytes) == (2, 1, 1, make_entry(1).num_bytes)


def test_what_is_larger_than_the_disk_stays_in_memory(tmp_path):
    with cb.ChunkStore(tmp_path, disk_bytes=2**17) as store:
        store.put(key_of(1), make_entry(1, tokens=500))
        store.flush()
        assert store.stats.disk.rejected == 1
        assert store.get(key_of(1)) is not None
    assert packs(tmp_path) == []


def test_a_later_entry_of_the_same_key_takes_over(tmp_path):
    with cb.ChunkStore(tmp_path) as store:
        for seed in (1, 2, 2):
            store.put("a", make_entry(seed))
            store.flush()
        assert store.stats.written == 2  # the same bits again are not written again
    assert len(packs(tmp_path)) == 1
    with cb.ChunkStore(tmp_path) as store:
        assert same(store.get("a"), make_entry(2))


def test_removing_and_clearing_reach_the_disk(tmp_path):
    fill(tmp_path, range(4))
    with cb.ChunkStore(tmp_path) as store:
        assert store.remove(key_of(0))
        assert not store.remove(key_of(0))
        assert len(store) == 3
        store.clear()
        assert len(store) == 0
    assert packs(tmp_path) == []


def test_a_full_queue_leaves_the_disk_out_and_blocks_nobody(tmp_path, monkeypatch):
    gate = threading.Event()
    write = DiskTier.write

    def slow_write(self, entries):
        gate.wait()
        write(self, entries)

    monkeypatch.setattr(DiskTier, "write", slow_write)
    with cb.ChunkStore(tmp_path, queue_bytes=3 * make_entry(0).num_bytes) as store:
        for seed in range(10):
            assert store.put(key_of(seed), make_entry(seed))
        assert store.stats.dropped == 7
        waiting = threading.Thread(target=store.put, args=("patient", make_entry(99)), kwargs={"wait": True})
        waiting.start()
        gate.set()
        waiting.join()
        store.flush()
        assert (store.stats.written, store.stats.host.entries) == (4, 10 + 1)


def test_a_clock_that_goes_backwards_changes_no_order(tmp_path, monkeypatch):
    capacity = int(3.5 * pack_bytes(tmp_path))
    with cb.ChunkStore(tmp_path / "kv", disk_bytes=capacity, host_bytes=1) as store:
        now = time.time_ns()
        for step, seed in enumerate([1, 2, 3, 4]):
            monkeypatch.setattr(time, "time_ns", lambda step=step: now - step * 10**15)
            store.put(key_of(seed), make_entry(seed, BIG))
            store.flush()
        assert [store.get(key_of(seed)) is not None for seed in (1, 2, 3, 4)] == [False, True, True, True]


# --- a directory that fails ------------------------------------------------------------------------------------------


def as_read_only(directory: Path):
    """Mounts a directory read-only over itself; needs root (permission bits do not bind root)."""
    for options in (["--bind", directory, directory], ["-o", "remount,bind,ro", directory]):
        if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("needs the right to mount")


@pytest.mark.parametrize("closed", [True, False])
def test_a_read_only_directory_is_read(tmp_path, closed):
    fill(tmp_path, [1, 2])
    if not closed:
        (tmp_path / "index.sqlite").unlink()
    if os.geteuid() == 0:
        as_read_only(tmp_path)
    else:
        tmp_path.chmod(0o500)
    try:
        with cb.ChunkStore(tmp_path) as store:
            assert same(store.get(key_of(1)), make_entry(1))
            assert store.put(key_of(3), make_entry(3))
            store.flush()
            assert same(store.get(key_of(3)), make_entry(3))
            assert store.stats.written == 0
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", tmp_path], check=True)
        else:
            tmp_path.chmod(0o700)


def test_errors_of_the_file_system_fail_no_request(tmp_path, monkeypatch, caplog):
    from cacheblend_jax.store import packing

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_pack", refuse)
    with cb.ChunkStore(tmp_path) as store, cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        prompt = random_prompt(8)
        engine.prefill(prompt)
        engine.flush()
        assert engine.prefill(prompt).stats.misses == 0
        assert store.stats.write_errors > 0
        assert store.stats.disk.bytes == 0
    assert sum("No space left" in record.message for record in caplog.records) == 1


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    fill("kv", range(2), one_by_one=True)
    with cb.ChunkStore("kv") as store:
        monkeypatch.chdir("other")
        store.put(key_of(2), make_entry(2))
        store.flush()
        assert all(same(store.get(key_of(seed)), make_entry(seed)) for seed in range(3))
        assert store.directory == tmp_path / "kv"
    assert DiskTier.exists("../kv")
    assert list(Path().iterdir()) == []


def test_a_backslash_in_the_path_is_refused(tmp_path):
    with pytest.raises(cb.CacheBlendError, match="has a backslash in its path"):
        cb.ChunkStore(tmp_path / "back\\slash")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_store_is_named(tmp_path):
    (tmp_path / "kv").write_text("")
    with pytest.raises(cb.CacheBlendError, match="is a file; expected a directory"):
        cb.ChunkStore(tmp_path / "kv")


def test_an_entry_of_another_format_version_is_a_miss_with_a_clear_message(tmp_path, caplog, monkeypatch):
    from cacheblend_jax.store import record

    monkeypatch.setattr(record, "FORMAT_VERSION", 0)
    monkeypatch.setattr("cacheblend_jax.store.head_groups.MOST_GROUPS", 1)
    monkeypatch.setattr("cacheblend_jax.store.pack.FORMAT_VERSION", 0)
    fill(tmp_path, [1])
    monkeypatch.undo()
    for index_lost in (False, True):
        if index_lost:
            (tmp_path / "index.sqlite").unlink()
        caplog.clear()
        with cb.ChunkStore(tmp_path) as store:
            assert store.get(key_of(1)) is None
            assert key_of(1) not in store
            assert store.stats.outdated == 1
            assert store.stats.damaged == 0
        assert "format version 0; this code reads versions 1 to 3" in caplog.text
    with cb.ChunkStore(tmp_path) as store:  # it can be stored anew
        store.put(key_of(1), make_entry(1))
    with cb.ChunkStore(tmp_path) as store:
        assert same(store.get(key_of(1)), make_entry(1))


def test_an_index_that_is_lost_or_broken_is_made_anew(tmp_path):
    fill(tmp_path, range(6), one_by_one=True)
    with cb.ChunkStore(tmp_path) as store:
        store.get(key_of(0))
    whole = (tmp_path / "index.sqlite").read_bytes()
    for broken in (None, b"", b"not a database" * 1000, whole[:5000], whole[:4096] + b"\xff" * (len(whole) - 4096)):
        (tmp_path / "index.sqlite").unlink()
        if broken is not None:
            (tmp_path / "index.sqlite").write_bytes(broken)
        with cb.ChunkStore(tmp_path) as store:
            found = [store.get(key_of(seed)) for seed in range(6)]
            assert all(entry is None or same(entry, make_entry(seed)) for seed, entry in enumerate(found))
        with cb.ChunkStore(tmp_path) as store:
            assert all(same(store.get(key_of(seed)), make_entry(seed)) for seed in range(6))


def test_another_version_of_the_index_is_made_anew(tmp_path):
    fill(tmp_path, range(2))
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with cb.ChunkStore(tmp_path) as store:
        assert same(store.get(key_of(1)), make_entry(1))


def test_the_same_bytes_are_read_through_tensorstores_memory_driver(tmp_path):
    import tensorstore as ts

    from cacheblend_jax.store.entry_reader import EntryReader, tensorstore_context
    from cacheblend_jax.store.pack import read_contents

    fill(tmp_path, [1, 2])
    (pack,) = packs(tmp_path)
    base = {"driver": "memory", "path": "bucket/"}
    memory = ts.KvStore.open(base, context=tensorstore_context()).result()
    for file in (pack / "state").rglob("*"):
        if file.is_file():
            memory.write(str(file.relative_to(pack / "state")), file.read_bytes()).result()
    from etils import epath

    for record in read_contents(epath.Path(pack)).records:
        entry = EntryReader(base, record).read()
        assert same(entry, make_entry(int(record.key, 16)))


def test_a_directory_without_renames_and_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.store.disk.is_local", lambda path: False)
    fill(tmp_path, range(3), one_by_one=True, tokens=BIG)
    assert not (tmp_path / "index.sqlite").exists()
    damage = largest_file(packs(tmp_path)[0])
    damage.write_bytes(damage.read_bytes()[:200])
    with cb.ChunkStore(tmp_path) as store:
        found = [store.get(key_of(seed)) for seed in range(3)]
        assert sum(entry is None for entry in found) == store.stats.damaged == 1
        assert all(entry is None or same(entry, make_entry(seed, BIG)) for seed, entry in enumerate(found))
        store.clear()
    assert packs(tmp_path) == []


def test_names_of_the_index_are_hexadecimal():
    assert storage_name(key_of(7)) == key_of(7)
    assert len({storage_name(key) for key in ("a", "b", "../a", key_of(1).upper())}) == 4
    assert json.dumps(storage_name("../a")).isascii()


def test_a_chunk_read_from_disk_is_in_memory_for_the_next_request(tmp_path):
    prompt = random_prompt(5)
    with cb.ChunkStore(tmp_path / "kv") as store, cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        keys = engine.precompute(prompt)
        engine.flush()
    with cb.ChunkStore(tmp_path / "kv") as store, cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        assert engine.prefill(prompt).stats.executor == "streamed"
        engine.flush()
        for key in keys:
            with store.open(key) as chunk:
                assert chunk.tier == "host"
        assert engine.prefill(prompt).stats.executor == "resident"


def test_a_default_capacity_does_not_shrink_what_is_there(tmp_path, monkeypatch):
    entries = [make_entry(seed, 64) for seed in range(4)]
    with cb.ChunkStore(tmp_path, disk_bytes=2**30) as store:
        for number, entry in enumerate(entries):
            store.put(key_of(number), entry)
            store.flush()
        kept = store.stats.disk.bytes
    monkeypatch.setattr("cacheblend_jax.store.disk.DEFAULT_BYTES", kept // 2)  # room for the new one, not for them all
    with cb.ChunkStore(tmp_path) as store:
        store.put(key_of(9), make_entry(9, 64))
        store.flush()
        assert store.stats.written == 1
        assert store.stats.disk.entries >= 3
        assert kept / 2 < store.stats.disk.bytes <= kept
