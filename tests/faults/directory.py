"""Faults of a store's directory: flipped bits, killed writers, and more processes than it has room for."""

from __future__ import annotations

import collections
import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from store_cases import HEADS, LAYERS, check_all, fill, key_of, make_entry, packs, report_of, same, start_python

import cacheblend_jax as cb
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.stored_chunk import of_heads
from faults import require

Counts = dict[str, int]


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def flips(
    directory: Path,
    rounds: Iterable[int],
    seed: int = 0,
    entries: Sequence[int] = (1, 2, 3),
    kv_dtype: str | None = None,
) -> Counts:
    """Flips one bit of a pack's file in each round: `verify` finds it, and no lookup returns anything else than put."""
    fill(directory / "whole", entries, kv_dtype=kv_dtype)
    (pack,) = packs(directory / "whole")
    files = sorted(path.relative_to(pack) for path in pack.rglob("*") if path.is_file() and path.stat().st_size)
    kinds = {name.name if name.parent.name != "d" else "d" for name in files}
    require({"entries.json", "_METADATA", "manifest.ocdbt", "d", "_CHECKPOINT_METADATA"} <= kinds, kinds)
    rng, counts = random.Random(seed), collections.Counter(flips=0, found_by_lookups=0)
    for trial in rounds:
        _copy(directory)
        victim = directory / "kv" / "packs" / pack.name / files[trial % len(files)]
        flip(victim, rng.randrange(victim.stat().st_size), rng.randrange(8))
        require(report_of(directory / "kv")["problems"], f"round {trial}: not found: a flip in {victim}")
        with cb.ChunkStore(directory / "kv") as store:
            _check_entries(store, entries, f"round {trial}: a flip in {victim}", kv_dtype)
            counts.update(flips=1, found_by_lookups=store.stats.damaged > 0)
    return dict(counts)


def head_flips(directory: Path, rounds: Iterable[int], seed: int = 0, kv_dtype: str | None = None) -> Counts:
    """As `flips`, for two hosts that read half of the heads each: what they read is what was put, or damage."""
    fill(directory / "whole", [1], kv_dtype=kv_dtype)
    (pack,) = packs(directory / "whole")
    files = sorted(path.relative_to(pack) for path in (pack / "state" / "d").iterdir())
    rng, counts = random.Random(seed), collections.Counter(flips=0, found_by_reads=0)
    wanted = make_entry(1).quantised(kv_dtype)
    for trial in rounds:
        _copy(directory)
        victim = directory / "kv" / "packs" / pack.name / files[trial % len(files)]
        flip(victim, rng.randrange(victim.stat().st_size), rng.randrange(8))
        for half in (range(HEADS // 2), range(HEADS // 2, HEADS)):
            with cb.ChunkStore(directory / "kv") as store:
                _check_heads(store, wanted, half, f"round {trial}: a flip in {victim}")
                counts.update(found_by_reads=store.stats.damaged)
        counts.update(flips=1)
    return dict(counts)


def _check_heads(store: cb.ChunkStore, wanted: cb.ChunkEntry, heads: range, where: str) -> None:
    with store.open(key_of(1)) or contextlib.nullcontext() as chunk, contextlib.suppress(cb.DamagedEntryError):
        for layer in range(LAYERS if chunk is not None else 0):
            for read, whole in zip(chunk.read_layer(layer, heads), wanted.layer(layer), strict=True):
                right = of_heads(whole, heads)
                arrays = zip(read, right, strict=True) if isinstance(read, tuple) else [(read, right)]
                same_bits = all(a is b is None or a.tobytes() == b.tobytes() for a, b in arrays)
                require(same_bits, where, f"layer {layer} of {heads} is wrong")


def index_flips(directory: Path, rounds: Iterable[int], seed: int = 0, bits: int = 20) -> Counts:
    """Flips some bits of the index in each round: nothing wrong is served, and the store goes on storing."""
    fill(directory / "whole", range(4), one_by_one=True)
    rng, counts = random.Random(seed), collections.Counter(flips=0)
    size = (directory / "whole" / "index.sqlite").stat().st_size
    for trial in rounds:
        _copy(directory)
        for _ in range(bits):
            flip(directory / "kv" / "index.sqlite", rng.randrange(size), rng.randrange(8))
        with cb.ChunkStore(directory / "kv") as store:
            _check_entries(store, range(4), f"round {trial}: flips in the index")
            store.put(key_of(9), make_entry(9))
            store.flush()
            require(same(store.get(key_of(9)), make_entry(9)), f"round {trial}: what was put is not there")
        counts["flips"] += bits
    return dict(counts)


def _copy(directory: Path) -> None:
    shutil.rmtree(directory / "kv", ignore_errors=True)
    shutil.copytree(directory / "whole", directory / "kv")


def quantised_flips(directory: Path, rounds: Iterable[int], seed: int = 0) -> Counts:
    """As `flips`, in a pack of quantised entries."""
    return flips(directory, rounds, seed, kv_dtype="int8")


def _check_entries(store: cb.ChunkStore, seeds: Iterable[int], where: str, kv_dtype: str | None = None) -> None:
    for seed in seeds:
        entry = store.get(key_of(seed))
        require(entry is None or same(entry, make_entry(seed).quantised(kv_dtype)), where, f"entry {seed} is wrong")


def tell(process: subprocess.Popen, number: float) -> None:
    """Writes a line to a process; what to do next."""
    with contextlib.suppress(BrokenPipeError):  # it has ended: its exit code says why
        process.stdin.write(f"{number}\n".encode())
        process.stdin.flush()


FORKING_WRITER = """
import os, random, signal, time
with cb.ChunkStore(sys.argv[1] + "/warm") as store:  # imports and first-use costs are paid before the forks
    pass
from cacheblend_jax.store import orbax_write
for line in sys.stdin:
    round_ = int(line)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = cb.ChunkStore(sys.argv[1] + "/kv", kv_dtype=sys.argv[3] or None)
        for seed in range(round_ * 1000, round_ * 1000 + 1000):
            store.put(key_of(seed), make_entry(seed, BIG))
            if seed % 3 == 0:
                store.flush()
                os.write(writing, b".")
        os._exit(0)
    if round_ % 2:  # whatever the machine's load, half of the writers have stored something
        os.read(reading, 1)
    time.sleep(random.Random(f"{sys.argv[2]} {round_}").uniform(0.0, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reading)
    os.close(writing)
    print(round_, flush=True)
"""


def kills(directory: Path, rounds: Iterable[int], seed: int = 0, kv_dtype: str | None = None) -> Counts:
    """Kills a writer at some instant in each round; the next one opens the store. Then only whole entries are there.

    The writers are forks of one process, so that they share what it has imported.
    """
    writer = start_python(FORKING_WRITER, directory, seed, kv_dtype or "")
    killed = 0
    for round_ in rounds:
        tell(writer, round_)
        if not writer.stdout.readline():  # it has ended
            break
        killed += 1
    _, errors = writer.communicate(timeout=120)
    require(writer.returncode == 0, errors.decode())
    found = check_all(directory / "kv", kv_dtype=kv_dtype)
    report = report_of(directory / "kv")
    require(report["problems"] == [], report["problems"])
    require(not any((directory / "kv" / "writing").iterdir()), "something is left in writing/")
    disk = DiskTier(directory / "kv", 2**40)
    require(disk.index.packs("writing") == disk.index.packs("dead") == [], "the index holds packs of dead writers")
    require({path.name for path in packs(directory / "kv")} == set(disk.index.packs("ready")), "packs and index differ")
    disk.close()
    return {"kills": killed, "entries_found": found}


HAMMER = """
import random, time
rng = random.Random(int(sys.argv[2]))
with cb.ChunkStore(sys.argv[1], disk_bytes=int(sys.argv[3]), host_bytes=300_000) as store:
    lookups = hits = 0
    for line in sys.stdin:
        until = time.monotonic() + float(line)
        while time.monotonic() < until:
            seed = min(int(rng.expovariate(0.05)), 99)
            chunk = store.open(key_of(seed)) if rng.random() < 0.3 else None
            if chunk is not None:
                with chunk:
                    layer = rng.randrange(LAYERS)
                    k, v = chunk.read_layer(layer)
                    wanted = make_entry(seed, BIG)
                    assert k.tobytes() == wanted.k[layer].tobytes() and v.tobytes() == wanted.v[layer].tobytes()
            entry = store.get(key_of(seed))
            lookups += 1
            if entry is None:
                store.put(key_of(seed), make_entry(seed, BIG))
            else:
                hits += 1
                assert same(entry, make_entry(seed, BIG))
            if rng.random() < 0.02:
                store.flush()
        print(flush=True)
    store.flush()
    stats = store.stats
    assert stats.damaged == stats.write_errors == stats.read_errors == 0, stats
    print(lookups, hits, stats.disk.hits, stats.written, stats.disk.evicted)
"""
ENTRY_BYTES = 85_000  # on disk, of `make_entry(seed, BIG)`


def hammer(
    directory: Path, rounds: Iterable[int], seed: int = 0, processes: int = 4, seconds: float = 2.0, room: int = 30
) -> Counts:
    """Several processes look up and store a hundred entries in a directory with room for `room`, `seconds` a round."""
    capacity = room * ENTRY_BYTES
    crowd = [start_python(HAMMER, directory, 1000 * seed + number, capacity) for number in range(processes)]
    for _ in rounds:
        for process in crowd:
            tell(process, seconds)
        answers = [process.stdout.readline() for process in crowd]
        if not all(answers):  # one has ended
            break
    counts = []
    for process in crowd:
        output, errors = process.communicate(timeout=120)
        require(process.returncode == 0, errors.decode()[-3000:])
        counts.append([int(number) for number in output.split()])
    report = report_of(directory)
    require(report["problems"] == [], report["problems"])
    with cb.ChunkStore(directory, disk_bytes=capacity) as store:
        held = store.stats.disk.bytes
    on_disk = sum(path.stat().st_size for path in (directory / "packs").rglob("*") if path.is_file())
    require(held == on_disk, f"the store counts {held} bytes, {on_disk} are there")
    require(held <= capacity, f"{held} bytes are more than the capacity of {capacity}")
    names = ("lookups", "hits", "disk_hits", "written", "evicted")
    return dict(zip(names, map(sum, zip(*counts, strict=True)), strict=True))
