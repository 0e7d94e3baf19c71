"""Keys: a chunk's KV is found by everything it was computed from, and by nothing else."""

from __future__ import annotations

import hashlib

import numpy as np

TENANT_DIGITS = 16


def chunk_key(
    fingerprint: str, context_ids: np.ndarray, chunk_ids: np.ndarray, salt: str = "", tenant: str = ""
) -> str:
    """Returns SHA-256 (hex) over the length-prefixed model fingerprint, context ids, chunk ids and salt.

    Each field follows its length, so that no two different tuples of fields give the same bytes. A tenant is one more
    field, and its `tenant_prefix` stands before the digits: whose an entry is can be read off its key.
    """
    digest = hashlib.sha256()
    fields = [fingerprint.encode(), _id_bytes(context_ids), _id_bytes(chunk_ids), salt.encode()]
    for field in [*fields, tenant.encode()] if tenant else fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return tenant_prefix(tenant) + digest.hexdigest()


def tenant_prefix(tenant: str) -> str:
    """Returns what the keys of a tenant's entries begin with; nothing for those of no tenant."""
    return f"{hashlib.sha256(tenant.encode()).hexdigest()[:TENANT_DIGITS]}-" if tenant else ""


def is_of_tenant(key: str, tenant: str) -> bool:
    """Whether an entry is a tenant's; with an empty name, whether it is no tenant's."""
    return tenant_of(key) == tenant_prefix(tenant)


def tenant_of(key: str) -> str:
    """Returns the `tenant_prefix` that a key begins with; nothing where it has none."""
    prefix, dash, _ = key.rpartition("-")
    return prefix + dash


def _id_bytes(ids: np.ndarray) -> bytes:
    return np.asarray(ids).astype("<i4").tobytes()
