"""Small entries and stores of them, and processes that use them: what the tests of the store share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import cacheblend_jax as cb
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.maintenance import verify

LAYERS, HEADS, DIM = 3, 2, 8
BIG = 200  # tokens of an entry beside which the other files of a pack do not count
ROOT = Path(__file__).parents[1]


def make_entry(seed: int, tokens: int = 6, dtype=np.float32) -> cb.ChunkEntry:
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((LAYERS, tokens, HEADS, DIM)).astype(dtype) for _ in range(2))
    return cb.ChunkEntry(k, v, "fingerprint", (1, 2, 3))


def key_of(seed: int) -> str:
    return f"{seed:064x}"


def fill(directory: Path, seeds, one_by_one: bool = False, tokens: int = 6, **options) -> None:
    with cb.ChunkStore(directory, **options) as store:
        for seed in seeds:
            store.put(key_of(seed), make_entry(seed, tokens))
            if one_by_one:
                store.flush()
        store.flush()
        assert store.stats.written == len(seeds)


def same(actual: cb.ChunkEntry, wanted: cb.ChunkEntry) -> bool:
    arrays, expected = actual.arrays(), wanted.arrays()
    return actual.kv_dtype == wanted.kv_dtype and all(
        (a := arrays[name]).dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for name, b in expected.items()
    )


def packs(directory: Path) -> list[Path]:
    return sorted((directory / "packs").iterdir())


def run_python(code: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, check=check)


def largest_file(pack: Path) -> Path:
    return max((path for path in pack.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def report_of(directory: Path, **options) -> dict:
    disk = DiskTier(directory, 2**40)
    report = verify(disk, **options)
    disk.close()
    return report


def check_all(directory: Path, tokens=BIG, kv_dtype: str | None = None) -> int:
    """Every entry that is found is the one that was stored; returns how many were."""
    with cb.ChunkStore(directory) as store:
        keys = store.keys()
        for key in keys:
            entry = store.get(key)
            assert entry is None or same(entry, make_entry(int(key, 16), tokens).quantised(kv_dtype))
        assert store.stats.damaged == 0
    return len(keys)


def start_python(code: str, *arguments) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    preamble = "import sys\nfrom store_cases import *\n"
    command = [sys.executable, "-c", preamble + code, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, **pipes)
