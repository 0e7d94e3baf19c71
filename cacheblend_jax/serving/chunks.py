"""`/v1/chunks`: computes chunks ahead, says what is stored, deletes, pins and unpins. Each tenant sees its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.serving.errors import ApiError, invalid
from cacheblend_jax.serving.service import Service
from cacheblend_jax.store import TenantStore
from cacheblend_jax.store.keys import is_of_tenant

OBJECT = "cacheblend.chunk"
PAGE, LARGEST_PAGE = 100, 1000


def precomputed(service: Service, prompt: Prompt, *, pin: bool) -> dict[str, Any]:
    """Computes and stores a prompt's chunks, each by itself, and says of each what became of it.

    Raises:
        PromptError: one is too long, before any is computed.
        ApiError: there is no room to pin one; what was computed until then is stored.
    """
    engine, data = service.engine, []
    alone = [replace(prompt, chunks=(chunk,), suffix=()) for chunk in prompt.chunks]
    found = [engine.look_up(each)[0] for each in alone]
    for each, before in zip(alone, found, strict=True):
        stored = bool(engine.precompute(each))
        pinned = pin and stored and _pin(service.store, before.key)
        data.append(
            {
                "id": before.key,
                "object": OBJECT,
                "tokens": len(each.chunks[0]),
                "stored": stored,
                "created": stored and not before.is_stored,
                "pinned": pinned or before.key in service.store.pinned,
            }
        )
    return {"object": "list", "data": data}


def looked_up(engine: Engine, store: TenantStore, prompt: Prompt) -> dict[str, Any]:
    """Says of each of a prompt's chunks whether it is stored; computes nothing."""
    pinned = store.pinned
    data = []
    for chunk in prompt.chunks:
        (found,) = engine.look_up(replace(prompt, chunks=(chunk,), suffix=()))
        fields = {"id": found.key, "object": OBJECT, "tokens": len(chunk), "stored": found.is_stored}
        data.append({**fields, "pinned": found.key in pinned})
    return {"object": "list", "data": data}


def listed(service: Service, tenant: str, query: Mapping[str, str]) -> dict[str, Any]:
    """Lists a tenant's entries, prefixes among them, the least recently used first.

    Args:
        query: `limit`, and `after`: the last id of the page before.

    Raises:
        ApiError: either makes no sense.
    """
    limit, after = query.get("limit", str(PAGE)), query.get("after")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= LARGEST_PAGE):
        raise invalid(f"limit must be a whole number in [1, {LARGEST_PAGE}]", "limit")
    sizes = service.store.sizes_of(tenant)
    if after is not None and after not in sizes:
        raise invalid("after must be the id of a stored chunk", "after")
    keys = list(sizes)
    keys = keys[0 if after is None else keys.index(after) + 1 :]
    shown = list(islice(keys, int(limit)))
    pinned, token_bytes = service.store.pinned, bytes_per_token(service.engine.model.config)
    data = [_described(key, sizes[key], token_bytes, key in pinned) for key in shown]
    total = {"total": len(sizes), "total_bytes": sum(sizes.values()), "quota_bytes": service.tenants.quotas.get(tenant)}
    return {"object": "list", "data": data, "has_more": len(shown) < len(keys), **total}


def described(service: Service, tenant: str, key: str) -> dict[str, Any]:
    """Describes one of a tenant's entries.

    Raises:
        ApiError: there is none.
    """
    if not is_of_tenant(key, tenant) or key not in service.store:
        raise _unknown()
    size = service.store.sizes_of(tenant).get(key)
    if size is None:
        raise _unknown()
    token_bytes = bytes_per_token(service.engine.model.config)
    return _described(key, size, token_bytes, key in service.store.pinned)


def deleted(service: Service, tenant: str, key: str) -> dict[str, Any]:
    """Deletes one of a tenant's entries.

    Raises:
        ApiError: there is none, or it is pinned.
    """
    described(service, tenant, key)
    try:
        service.store.remove(key)
    except CacheBlendError as error:
        raise ApiError(409, str(error), code="chunk_not_removable") from error
    return {"id": key, "object": OBJECT, "deleted": True}


def pinned(service: Service, tenant: str, key: str) -> dict[str, Any]:
    """Pins one of a tenant's entries.

    Raises:
        ApiError: there is none, or no room to pin it.
    """
    description = described(service, tenant, key)
    if not _pin(service.store, key):
        raise ApiError(409, "the entry cannot be kept where it is stored", code="chunk_not_pinnable")
    return {**description, "pinned": True}


def unpinned(service: Service, tenant: str, key: str) -> dict[str, Any]:
    """Unpins one of a tenant's entries, also one that is gone since: a damaged one is dropped although it is pinned.

    Raises:
        ApiError: there is none.
    """
    was_pinned = is_of_tenant(key, tenant) and service.store.unpin(key)
    if was_pinned and key not in service.store:
        return {"id": key, "object": OBJECT, "pinned": False}
    return {**described(service, tenant, key), "pinned": False}


def _pin(store: TenantStore, key: str) -> bool:
    try:
        return store.pin(key)
    except CacheBlendError as error:
        raise ApiError(409, str(error), code="too_many_pinned") from error


def bytes_per_token(config: ModelConfig) -> int:
    """Returns the bytes of a token's K and V, in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * np.dtype(config.dtype).itemsize


def _described(key: str, size: int, token_bytes: int, is_pinned: bool) -> dict[str, Any]:
    return {"id": key, "object": OBJECT, "bytes": size, "tokens": size // token_bytes, "pinned": is_pinned}


def _unknown() -> ApiError:
    return ApiError(404, "there is no stored chunk of this id", code="chunk_not_found")
