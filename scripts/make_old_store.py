"""Writes the store of tests/data/store-versions-1-and-2: an entry of each format version before heads had checksums.

Run at commit 0e90299, the last one that writes them: PYTHONPATH=.:tests python scripts/make_old_store.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from store_cases import DIM, HEADS, LAYERS, key_of, make_entry

import cacheblend_jax as cb


def main(directory: Path) -> None:
    for seed, kv_dtype in ((1, None), (2, "int8")):
        with cb.ChunkStore(directory, kv_dtype=kv_dtype) as store:
            plain = make_entry(seed)
            bias = np.full((LAYERS, HEADS, DIM), seed, np.float32)
            entry = cb.ChunkEntry(plain.k, plain.v, plain.fingerprint, plain.context_ids, k_offset=bias)
            store.put(key_of(seed), entry)
    for index in directory.glob("index.sqlite*"):
        index.unlink()  # it is made anew from the packs
    for empty in ("writing", "quarantine"):
        (directory / empty).rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
