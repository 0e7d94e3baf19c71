"""Faults that a directory survives: killed writers, flipped bits, lost and swapped files, crowds of processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath
from faults.directory import flip, flips, hammer, index_flips, kills
from store_cases import (
    BIG,
    ROOT,
    check_all,
    fill,
    key_of,
    largest_file,
    make_entry,
    packs,
    report_of,
    same,
    start_python,
)

import cacheblend_jax as cb
from cacheblend_jax.store.disk import DiskTier

pytestmark = pytest.mark.once
WRITE_UNTIL_KILLED = """
import itertools
with cb.ChunkStore(sys.argv[1]) as store:
    for seed in itertools.count(int(sys.argv[2])):
        store.put(key_of(seed), make_entry(seed, BIG))
        if seed % 3 == 0:
            store.flush()
            print(seed, flush=True)
"""


def test_killed_writers_lose_only_what_they_were_writing(tmp_path):
    assert kills(tmp_path, range(30))["entries_found"] > 10


def test_what_was_flushed_survives_a_kill(tmp_path):
    writer = start_python(WRITE_UNTIL_KILLED, tmp_path, 0)
    flushed = [int(writer.stdout.readline()) for _ in range(4)][-1]
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    with cb.ChunkStore(tmp_path) as store:
        assert all(same(store.get(key_of(seed)), make_entry(seed, BIG)) for seed in range(flushed + 1))


@pytest.mark.parametrize("entries", [(1,), (1, 2, 3)])
def test_flipped_bits_are_found_and_never_served(tmp_path, entries):
    # Most of the files serve others than the store's reader.
    assert flips(tmp_path, range(80), len(entries), entries)["found_by_lookups"] > 10


def test_flipped_bits_in_the_index_are_never_served(tmp_path):
    assert index_flips(tmp_path, range(20))["flips"] == 400


def damage_cases(pack: Path, other: Path) -> dict:
    data, other_data = largest_file(pack), largest_file(other)
    manifest = pack / "state" / "manifest.ocdbt"
    swap = pack.parent / "swap"

    def swap_packs():
        pack.rename(swap)
        other.rename(pack)
        swap.rename(other)

    return {
        "data truncated": lambda: os.truncate(data, data.stat().st_size // 2),
        "data empty": lambda: os.truncate(data, 0),
        "nothing reached the disk": lambda: [os.truncate(path, 0) for path in pack.rglob("*") if path.is_file()],
        "data deleted": data.unlink,
        "manifest truncated": lambda: os.truncate(manifest, 20),
        "manifest deleted": manifest.unlink,
        "pack deleted": lambda: shutil.rmtree(pack),
        "state deleted": lambda: shutil.rmtree(pack / "state"),
        "data of another entry": lambda: shutil.copy(other_data, data),
        "packs swapped": swap_packs,
        "a directory in place of data": lambda: (data.unlink(), data.mkdir()),
    }


@pytest.mark.parametrize("case", damage_cases(Path(__file__).parent, Path(__file__).parent))
def test_lost_and_swapped_files_are_misses(tmp_path, case, caplog):
    fill(tmp_path, range(2), one_by_one=True, tokens=BIG)
    damage_cases(*packs(tmp_path))[case]()
    assert report_of(tmp_path)["problems"]
    with cb.ChunkStore(tmp_path) as store:
        found = [store.get(key_of(seed)) for seed in range(2)]
        assert None in found
        assert all(entry is None or same(entry, make_entry(seed, BIG)) for seed, entry in enumerate(found))
        lost = sum(entry is None for entry in found)
        assert store.stats.damaged == lost == (2 if case == "packs swapped" else 1)
        assert "quarantined" in caplog.text
        for seed in range(2):
            store.put(key_of(seed), make_entry(seed, BIG))  # and they can be stored again
    assert check_all(tmp_path) == 2
    assert report_of(tmp_path)["problems"] == []


def test_a_damaged_layer_raises_and_leaves_the_others_of_its_pack(tmp_path):
    fill(tmp_path, range(3), tokens=BIG)
    (pack,) = packs(tmp_path)
    layer = make_entry(1, BIG).v[2].swapaxes(0, 1).tobytes()
    data = next(path for path in pack.rglob("*") if path.is_file() and layer in path.read_bytes())
    flip(data, data.read_bytes().index(layer) + 1000, 3)
    with cb.ChunkStore(tmp_path) as store:
        with store.open(key_of(1)) as chunk:
            assert chunk.read_layer(1)[0].tobytes() == make_entry(1, BIG).k[1].tobytes()
            with pytest.raises(cb.DamagedEntryError, match=r"layer 2 of entry .* has a wrong checksum"):
                chunk.read_layer(2)
        assert store.open(key_of(1)) is None
        assert store.stats.damaged == 1
        assert all(same(store.get(key_of(seed)), make_entry(seed, BIG)) for seed in (0, 2))
    kept = tmp_path / "quarantine" / pack.name
    assert layer not in data.read_bytes()
    assert (kept / data.relative_to(pack)).read_bytes() == data.read_bytes()


def test_quarantine_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.store.quarantine.MAX_PACKS", 3)
    fill(tmp_path, range(6), one_by_one=True, tokens=BIG)
    for pack in packs(tmp_path):
        os.truncate(largest_file(pack), 10)
    with cb.ChunkStore(tmp_path) as store:
        assert all(store.get(key_of(seed)) is None for seed in range(6))
        assert store.stats.damaged == 6
        assert store.stats.disk.bytes == 0
    assert len(list((tmp_path / "quarantine").iterdir())) == 3


def test_a_directory_copied_while_it_is_written_serves_nothing_wrong(tmp_path):
    stop = threading.Event()

    def write() -> None:
        with cb.ChunkStore(tmp_path / "kv", disk_bytes=40 * 90_000) as store:
            seed = 0
            while not stop.is_set():
                store.put(key_of(seed), make_entry(seed, BIG))
                seed += 1
                if seed % 4 == 0:
                    store.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for copy in range(6):
            while not (tmp_path / "kv" / "packs").is_dir() or len(packs(tmp_path / "kv")) < 3:
                time.sleep(0.01)
            subprocess.run(["cp", "-r", tmp_path / "kv", tmp_path / f"copy{copy}"], capture_output=True)
    finally:
        stop.set()
        writer.join()
    found = 0
    for copy in range(6):
        with cb.ChunkStore(tmp_path / f"copy{copy}") as store:
            for key in list(store.keys()):
                entry = store.get(key)
                assert entry is None or same(entry, make_entry(int(key, 16), BIG))
                found += entry is not None
    assert found > 0


WRITE_THE_SAME = """
with cb.ChunkStore(sys.argv[1]) as store:
    sys.stdin.readline()
    for seed in range(12):
        store.put(key_of(seed), make_entry(seed, BIG))
        store.flush()
"""


def test_two_processes_write_the_same_chunks(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    code = "import sys\nfrom store_cases import *\n" + WRITE_THE_SAME
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [threading.Thread(target=writer.communicate, args=(b"go\n",)) for writer in writers]
    for output in outputs:
        output.start()
    for output in outputs:
        output.join()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert check_all(tmp_path) == 12
    assert len(packs(tmp_path)) == 12  # the second writer's copy is not kept


def test_four_processes_hammer_one_store_beyond_its_capacity(tmp_path):
    assert min(hammer(tmp_path, [0], seconds=5).values()) > 0


def test_verify_repairs(tmp_path):
    fill(tmp_path, range(4), one_by_one=True, tokens=BIG)
    first, *_ = packs(tmp_path)
    shutil.rmtree(first)
    disk = DiskTier(tmp_path, 2**40)
    lost = disk.index.packs("ready")[-1]
    lost = lost if lost != first.name else disk.index.packs("ready")[0]
    disk.index.bury(lost)
    disk.index.forget_pack(lost, "dead")  # the index does not know it any more
    disk.close()
    assert {problem["problem"] for problem in report_of(tmp_path)["problems"]} == {
        "its files are gone",
        "the index does not know it",
    }
    report_of(tmp_path, repair=True)
    assert report_of(tmp_path)["problems"] == []
    assert check_all(tmp_path) == 3


def test_a_pack_says_what_it_holds(tmp_path):
    from cacheblend_jax.store.pack import read_contents

    fill(tmp_path, [5])
    (record,) = read_contents(epath.Path(packs(tmp_path)[0])).records
    assert (record.key, record.dtype, record.shape) == (key_of(5), "float32", make_entry(5).k.shape)
    assert (record.fingerprint, record.context_ids) == ("fingerprint", (1, 2, 3))
