"""Keys: a chunk's KV is found by everything it was computed from, and by nothing else."""

from __future__ import annotations

import hashlib

import numpy as np


def chunk_key(fingerprint: str, context_ids: np.ndarray, chunk_ids: np.ndarray, salt: str = "") -> str:
    """Returns SHA-256 (hex) over the length-prefixed model fingerprint, context ids, chunk ids and salt.

    Each field follows its length, so that no two different tuples of fields give the same bytes.
    """
    digest = hashlib.sha256()
    fields = (fingerprint.encode(), _id_bytes(context_ids), _id_bytes(chunk_ids), salt.encode())
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.hexdigest()


def _id_bytes(ids: np.ndarray) -> bytes:
    return np.asarray(ids).astype("<i4").tobytes()
