"""A store that tenants share: each holds at most its quota, and what is pinned stays."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack

from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.store.chunk_store import ChunkStore
from cacheblend_jax.store.entry import ChunkEntry
from cacheblend_jax.store.keys import is_of_tenant, tenant_of, tenant_prefix
from cacheblend_jax.store.wrapped import WrappedStore

MAX_PINS = 256  # each may hold a descriptor; processes often may have no more than 1,024
PINNED_SHARE = 0.5  # of the host's capacity: what is not pinned still finds room


class TenantStore(WrappedStore[ChunkStore]):
    """A `Store` whose entries belong to tenants: see `Prompt.tenant`. Safe to use from several threads.

    An entry beyond a tenant's quota takes the place of those of the same tenant, the least recently used first, that
    are not pinned; where these are too few, it is not stored.

    Args:
        store: keeps the entries; `close` closes it.
        quotas: bytes that a tenant may store, by name; those not named are bounded by the store alone.
        pinned_bytes: of the entries that may be pinned at a time; `None`: half of the host's capacity.
        tenants: how many there are: each may pin an equal share, so that none learns of, or lacks, what others pin.
    """

    def __init__(
        self,
        store: ChunkStore,
        quotas: Mapping[str, int] | None = None,
        *,
        pinned_bytes: int | None = None,
        tenants: int = 1,
    ) -> None:
        super().__init__(store)
        self.pinned_bytes = int(PINNED_SHARE * store.host_bytes) if pinned_bytes is None else pinned_bytes
        self._tenants = tenants
        self._quotas = {tenant_prefix(tenant): quota for tenant, quota in (quotas or {}).items()}
        self._held: dict[str, dict[str, int]] = {}  # the bytes of entries, by tenant and key; some may be evicted
        self._storing: dict[str, int] = {}  # the bytes of those that threads are storing right now
        self._pins: dict[str, tuple[ExitStack, int]] = {}  # what keeps an entry, and its bytes
        self._lock = threading.RLock()

    def put(self, key: str, entry: ChunkEntry, *, wait: bool = False, uses: int = 1) -> bool:
        """See `Store`; an entry for which its tenant's quota has no room is not kept."""
        owner = tenant_of(key)
        quota = self._quotas.get(owner)
        if quota is not None:
            entry = entry.quantised(self.kv_dtype)  # a quota counts the bytes that are stored
            with self._lock:
                if not self._has_room(owner, quota, key, entry.num_bytes):
                    return False
                self._held[owner][key] = self._storing[key] = entry.num_bytes
        try:
            is_stored = super().put(key, entry, wait=wait, uses=uses)
        finally:
            with self._lock:
                self._storing.pop(key, None)
        with self._lock:
            if is_stored and key in self._pins:  # the entry before it was damaged, or removed by another process
                self._hold(key, self._pins[key][1])
        return is_stored

    def remove(self, key: str) -> bool:
        """See `Store`.

        Raises:
            CacheBlendError: also where the entry is pinned.
        """
        with self._lock:
            if key in self._pins:
                raise CacheBlendError(f"entry {key[:24]} is pinned; unpin it first")
            was_there = super().remove(key)
            self._held.get(tenant_of(key), {}).pop(key, None)
            return was_there

    def close(self) -> None:
        """Lets go of what is pinned, and closes the store."""
        with self._lock:
            for held, _ in self._pins.values():
                held.close()
            self._pins.clear()
        super().close()

    def sizes_of(self, tenant: str) -> dict[str, int]:
        """Returns the bytes of each of a tenant's entries, by key, the least recently used first."""
        return {key: size for key, size in self.wrapped.sizes().items() if is_of_tenant(key, tenant)}

    def pin(self, key: str) -> bool:
        """Keeps an entry from being evicted until `unpin` or `close`; returns whether there is one that can be kept.

        One that is found damaged is dropped, pinned or not; the pin holds for the one that is stored in its place.

        Raises:
            CacheBlendError: the tenant has pinned too many, or too large ones.
        """
        with self._lock:
            if key in self._pins:
                return key in self.wrapped
            size = self.wrapped.sizes().get(key)
            if size is None:
                return False
            own = [num_bytes for other, num_bytes in self.pinned.items() if tenant_of(other) == tenant_of(key)]
            most, most_bytes = MAX_PINS // self._tenants, self.pinned_bytes // self._tenants
            if len(own) >= most or sum(own) + size > most_bytes:
                raise CacheBlendError(
                    f"no room to pin {size} bytes: at most {most} entries of together {most_bytes} bytes can be "
                    "pinned; unpin others"
                )
            return self._hold(key, size)

    def unpin(self, key: str) -> bool:
        """Undoes `pin`; returns whether the entry was pinned."""
        with self._lock:
            held, _ = self._pins.pop(key, (None, 0))
        if held is None:
            return False
        held.close()
        return True

    @property
    def pinned(self) -> dict[str, int]:
        """The bytes of each pinned entry, by key."""
        with self._lock:
            return {key: size for key, (_, size) in self._pins.items()}

    def _hold(self, key: str, size: int) -> bool:
        """Has an entry kept, in the place of one that was; returns whether it can be. The caller holds the lock."""
        held = self.wrapped.hold(key)
        if held is None:
            return False
        before, _ = self._pins.get(key, (None, 0))
        self._pins[key] = held, size
        if before is not None:
            before.close()
        return True

    def _has_room(self, owner: str, quota: int, key: str, num_bytes: int) -> bool:
        """Makes room for an entry within a quota, at the cost of the tenant's others. The caller holds the lock."""
        held = self._held.get(owner)
        if held is None or self._excess(held, quota, key, num_bytes) > 0:  # what was evicted since does not count
            there = self.wrapped.sizes() | self._storing
            held = self._held[owner] = {each: size for each, size in there.items() if tenant_of(each) == owner}
        excess, victims = self._excess(held, quota, key, num_bytes), []
        for other, size in held.items():
            if excess <= 0:
                break
            if other != key and other not in self._pins and other not in self._storing:
                victims.append(other)
                excess -= size
        if excess > 0:
            return False
        try:
            for victim in victims:
                self.remove(victim)
        except CacheBlendError:  # the directory cannot be written
            return False
        return True

    def _excess(self, held: Mapping[str, int], quota: int, key: str, num_bytes: int) -> int:
        return sum(held.values()) - held.get(key, 0) + num_bytes - quota
