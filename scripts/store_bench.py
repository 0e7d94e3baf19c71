"""Times the store against plain Orbax and safetensors, its index with many keys, and prefills whose reads all fail."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

import cacheblend_jax as cb
from cacheblend_jax.store.entry_reader import EntryReader
from cacheblend_jax.store.index import Index
from cacheblend_jax.store.record import EntryRecord, dump_record, layer_checksums

LAYERS, HEADS, DIM = 16, 4, 64


def make_entry(tokens: int, dtype=np.float32) -> cb.ChunkEntry:
    rng = np.random.default_rng(tokens)
    return cb.ChunkEntry(
        *(rng.standard_normal((LAYERS, tokens, HEADS, DIM), np.float32).astype(dtype) for _ in range(2))
    )


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each run; they take turns. What a run returns tidies up, untimed."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            tidy = run()
            took = time.perf_counter() - began
            if turn:  # the first turn warms up
                times[name].append(took * 1e3)
            if callable(tidy):
                tidy()
    return {name: float(np.median(values)) for name, values in times.items()}


def bench_reading(directory: Path, repeats: int) -> dict[str, float]:
    from orbax.checkpoint import v1 as ocp

    entry = make_entry(512)
    with cb.ChunkStore(directory / "kv") as store:
        store.put("a", entry)
    save_file({"k": entry.k, "v": entry.v}, directory / "a.safetensors")
    ocp.save(directory / "orbax", {"k": entry.k, "v": entry.v})
    store = cb.ChunkStore(directory / "kv", host_bytes=1)  # nothing stays in memory

    def read_safetensors() -> None:
        tensors = load_file(directory / "a.safetensors")
        layer_checksums(tensors["k"])
        layer_checksums(tensors["v"])

    with store, store.open("a") as chunk:
        layers = iter(list(range(LAYERS)) * repeats * 2)
        return timed(
            {
                "store: get": lambda: store.get("a"),
                "safetensors + CRC": read_safetensors,
                "plain Orbax (no CRC)": lambda: ocp.load(directory / "orbax"),
                "store: open": lambda: store.open("a").close(),
                "store: one layer": lambda: chunk.read_layer(next(layers)),
            },
            repeats,
        )


def bench_writing(directory: Path, repeats: int, count: int) -> dict[str, float]:
    """So many entries of 16.8 MB; what was written is removed each time, for memory of the page cache to be at hand."""
    from orbax.checkpoint import v1 as ocp

    entries = [make_entry(512) for _ in range(count)]
    store = cb.ChunkStore(directory / f"kv-write-{count}", host_bytes=1)
    turn = iter(range(10**6))

    def write_store() -> Callable[[], object]:
        keys = [f"{next(turn):064x}" for _ in entries]
        for key, entry in zip(keys, entries, strict=True):
            store.put(key, entry, wait=True)
        store.flush()
        return lambda: [store.remove(key) for key in keys]

    def write_each(write: Callable[[Path, cb.ChunkEntry], None]) -> Callable[[], object]:
        place = directory / f"{count}-{next(turn)}"
        place.mkdir()
        for i, entry in enumerate(entries):
            write(place / str(i), entry)
        return lambda: shutil.rmtree(place)

    def write_safetensors(path: Path, entry: cb.ChunkEntry) -> None:
        save_file({"k": entry.k, "v": entry.v}, path)

    def write_orbax(path: Path, entry: cb.ChunkEntry) -> None:
        ocp.save(path, {"k": entry.k, "v": entry.v})

    with store:
        results = timed(
            {"store: put + flush": write_store, "safetensors": lambda: write_each(write_safetensors)}, repeats
        )
    # Apart: it leaves memory and page cache in a state that slows the others.
    return results | timed({"plain Orbax": lambda: write_each(write_orbax)}, max(repeats // 3, 1))


def bench_small(directory: Path, dtype) -> dict[str, float]:
    """128-token chunks of a 16-layer model, a batch of 64."""
    entries = [make_entry(128, dtype) for _ in range(64)]
    store = cb.ChunkStore(directory / "kv-small", host_bytes=1)
    results = []
    for turn in range(4):
        began = time.perf_counter()
        for i, entry in enumerate(entries):
            store.put(f"{turn * 64 + i:064x}", entry, wait=True)
        store.flush()
        results.append((time.perf_counter() - began) / 64 * 1e3)
    store.close()
    files = sum(path.is_file() for path in (directory / "kv-small" / "packs").rglob("*"))
    shutil.rmtree(directory / "kv-small")
    began = time.perf_counter()
    with open(directory / "raw", "wb") as file:
        for entry in entries:
            file.write(entry.k.data.cast("B") if dtype is np.float32 else entry.k.tobytes())
            file.write(entry.v.data.cast("B") if dtype is np.float32 else entry.v.tobytes())
        file.flush()
        os.fsync(file.fileno())
    raw = (time.perf_counter() - began) / 64 * 1e3
    return {"ms an entry": float(np.median(results[1:])), "files an entry": files / 256, "bare file + fsync, ms": raw}


def bench_small_entries(root: Path) -> dict[str, dict[str, float]]:
    """The second of two rounds: memory that a virtual machine has never touched is several times slower to write to."""
    for _ in range(2):
        report = {np.dtype(dtype).name: bench_small(root, dtype) for dtype in (np.float32, ml_dtypes.bfloat16)}
    return report


FIND = """
import json, resource, sys, time
import numpy as np
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from cacheblend_jax.store import disk  # imports are not the index
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
tier = disk.DiskTier(sys.argv[1], 2**60)
opened = time.perf_counter() - began
rng = np.random.default_rng(0)
names = [f"{i:064x}" for i in rng.integers(0, int(sys.argv[2]), 20000)]
times, cpu_times = [], []
for _ in range(5):
    began, cpu_began = time.perf_counter(), time.thread_time()
    for name in names:
        assert tier.index.find(name) is not None
    times.append((time.perf_counter() - began) / len(names) * 1e6)
    cpu_times.append((time.thread_time() - cpu_began) / len(names) * 1e6)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"start-up s": opened, "us a hit, first pass": times[0], "us a hit": float(np.median(times)),
                  "us of CPU a hit, first pass": cpu_times[0], "us of CPU a hit": float(np.median(cpu_times)),
                  "MB of memory": (peak - base) / 1e3}))
"""


def bench_index(directory: Path, keys: int) -> dict[str, float]:
    """An index of many fake entries, 64 a pack, looked up in a fresh process."""
    root = directory / "kv-index"
    (root / "packs").mkdir(parents=True)
    Index(str(root / "index.sqlite")).close()
    connection = sqlite3.connect(root / "index.sqlite")
    crcs = tuple(range(LAYERS))
    packs = ((i, f"{i:032x}", "ready", 2**20, 0, i) for i in range(keys // 64 + 1))
    connection.executemany("INSERT INTO packs VALUES(?, ?, ?, ?, ?, ?)", packs)

    def rows():
        for i in range(keys):
            key = f"{i:064x}"
            record = EntryRecord(
                key, key, "bfloat16", (LAYERS, 128, HEADS, DIM), crcs, crcs, 0.0, "f" * 64, (1, 2, 3, 4)
            )
            yield (bytes.fromhex(key), i // 64, 1, i, record.num_bytes, *dump_record(record))

    connection.executemany("INSERT INTO entries VALUES(?, ?, ?, ?, ?, ?, ?)", rows())
    connection.commit()
    connection.close()
    output = subprocess.run([sys.executable, "-c", FIND, str(root), str(keys)], capture_output=True, check=True)
    return json.loads(output.stdout) | {"MB of file": (root / "index.sqlite").stat().st_size / 1e6}


def bench_failing(directory: Path, repeats: int) -> dict[str, float]:
    """Median TTFT in milliseconds, warm: of full prefills, and of blends all of whose reads from disk fail.

    Every turn has a new store, which does not know that reads fail; after the first blend of a turn it does.
    """
    model = cb.load_model("demo", dtype="float32")
    rng = np.random.default_rng(0)

    def ids(size: int) -> list[int]:
        return rng.integers(5, 360, size).tolist()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    prompts = [cb.Prompt(ids(9), [ids(190) for _ in range(8)], ids(20)) for _ in range(2 * repeats + 2)]
    one_size = {"length_buckets": (1600,)}
    with cb.ChunkStore(directory / "kv-failing") as store, cb.Engine(model, store, **one_size) as engine:
        for prompt in prompts:
            engine.precompute(prompt)
    times: dict[str, list[float]] = {"full": [], "reads fail": [], "known to fail": []}
    with mock.patch.object(EntryReader, "read_layer", fail):
        for first, second in zip(prompts[::2], prompts[1::2], strict=True):
            with (
                cb.ChunkStore(directory / "kv-failing", host_bytes=1) as store,  # nothing stays in memory
                cb.Engine(model, store, **one_size) as engine,
            ):
                engine.warmup(1600, prefix_tokens=9, suffix_tokens=20, modes=("blend", "full"))
                programs = model.runner.count
                for name, prompt, mode in (
                    ("full", first, "full"),
                    ("reads fail", first, "blend"),
                    ("known to fail", second, "blend"),
                ):
                    stats = engine.prefill(prompt, mode).stats
                    assert (stats.candidates, model.runner.count) == (0, programs)
                    times[name].append(stats.ttft_s * 1e3)
                    engine.flush()  # the next does not share the cores with what is being stored
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="where to write (a temporary directory)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("reading", "writing", "small", "index", "failing"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parsed = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("cacheblend_jax").setLevel(logging.ERROR)  # reads that fail on purpose
    root = Path(tempfile.mkdtemp(prefix="store-bench-", dir=parsed.directory))
    benches = {
        "reading": lambda: bench_reading(root, parsed.repeats),
        "writing": lambda: {
            "1 entry": bench_writing(root, parsed.repeats, 1),
            "15 entries": bench_writing(root, parsed.repeats, 15),
        },
        "small": lambda: bench_small_entries(root),
        "index": lambda: bench_index(root, parsed.keys),
        "failing": lambda: bench_failing(root, parsed.repeats),
    }
    try:
        report = {name: bench() for name, bench in benches.items() if parsed.only in (None, name)}
    finally:
        shutil.rmtree(root)
    print(json.dumps(report, indent=2))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB", file=sys.stderr)
    if parsed.json:
        parsed.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
