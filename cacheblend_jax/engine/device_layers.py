"""Layers of stored KV on the device: those that stay there after a prefill, and those of one that has all KV there.

What stays is as the blend reads it, for prompts placed alike.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.streamed import layers_wanted
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.quantised_kv import StoredCache, StoredLayer, stored_layer
from cacheblend_jax.store.memory import MemoryTier

REMEMBERED = 256  # placements that were asked for
FREE_SHARE = 0.25  # of the device's memory that neither weights nor the first prefill take


@dataclass(eq=False)
class PlacedLayers:
    """The layers of one placement of chunks that are on the device, by number: the first ones, at most `room`.

    The loading of later layers has the most to hide behind, so that these need the memory least.
    """

    room: int = 0
    num_bytes: int = 0
    layers: dict[int, StoredLayer] = field(default_factory=dict)

    def keep(self, layer: int, kv: StoredLayer) -> bool:
        """Takes over a layer if it has room; returns whether it has."""
        takes = layer < self.room and layer not in self.layers
        if takes:
            self.layers[layer] = kv
        return takes


class DeviceLayers:
    """The placements whose layers stay on the device, bounded in bytes; those that one prompt used are evicted first.

    A placement is its chunks and where each stands. Layers are read where they are: a hit copies nothing. Safe to use
    from several threads: what a prefill reads stays until it is done, whoever drops it.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._tier: MemoryTier[PlacedLayers] = MemoryTier(capacity)
        self._is_paused = False
        self._asked: OrderedDict[str, bool] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that layers take, or will."""
        return self._tier.bytes

    def num_kept(self, name: str) -> int:
        """Returns how many layers of a placement are on the device."""
        with self._lock:
            placed = self._tier.peek(name)
        return 0 if placed is None else len(placed.layers)

    def of(self, name: str, layer_bytes: int, num_layers: int, *, copied: bool = False) -> PlacedLayers:
        """Returns a placement's layers, with room for those that are not there yet, as far as the capacity goes.

        Args:
            copied: whether a layer has to be copied to stay: there is no room for a placement that was not asked for
                lately.
        """
        with self._lock:
            if (placed := self._tier.get(name)) is not None:
                return placed
            if copied and not self._is_known(name):
                return PlacedLayers()
            room = 0 if self._is_paused else min(num_layers, self._tier.capacity // layer_bytes)
            self._is_paused = False
            placed = PlacedLayers(room, room * layer_bytes)
            if room:
                self._tier.put(name, placed, uses=1)
            return placed

    def _is_known(self, name: str) -> bool:
        """Returns whether a placement was asked for before, and takes note of it."""
        is_known = self._asked.pop(name, False)
        self._asked[name] = True
        while len(self._asked) > REMEMBERED:
            self._asked.popitem(last=False)
        return is_known

    def forget(self, name: str) -> None:
        """Drops a placement's layers, if there are any."""
        with self._lock:
            self._tier.remove(name)

    def drop(self) -> bool:
        """Gives all memory back; returns whether there was any.

        The next prefill keeps nothing, and later ones half as much as until now.
        """
        with self._lock:
            had_any = self._tier.drop()
            self._tier.capacity //= 2
            self._is_paused = True
            return had_any


class LayersOnDevice:
    """Layers of stored KV that is on the device, one after another; `None` for each where nothing is stored.

    Args:
        run: runs what cuts a layer out, or compiles it where `cached` is shapes.
        indices: the layers' numbers, each an array by itself.
        in_place: whether `cached` becomes the blended cache. Its layers are then cut out for a question pass alone, and
            later `None` stands for each.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        plan: Plan,
        cached: StoredCache | None,
        indices: Sequence[jax.Array],
        *,
        in_place: bool,
    ) -> None:
        self._run, self._cached = run, cached
        wanted = layers_wanted(plan, len(indices))
        self._cut_out = iter([indices[layer] for layer in (wanted[len(indices) :] if in_place else wanted)])

    def next(self) -> StoredLayer | None:
        """Returns the next layer's KV."""
        if self._cached is None or (index := next(self._cut_out, None)) is None:
            return None
        return self._run(stored_layer, self._cached, index)

    def placed(self, blended: KVCache) -> KVCache:
        """Returns the cache: its layers are in place."""
        return blended

    def used_until(self, result: Any) -> None:
        """Does nothing: what was cut out goes with its last reader."""


def placement_name(chunks: Sequence[PlacedChunk], num_keys: int, kv_dtype: str | None = None) -> str:
    """Returns what stands for the chunks, their places, the number of keys of a padded layer, and its dtype."""
    return " ".join([str(num_keys), str(kv_dtype), *(f"{chunk.key}@{chunk.start}" for chunk in chunks)])


def free_share(devices: Sequence[Any], needed: int) -> int:
    """Returns `FREE_SHARE` of the memory that programs which take `needed` bytes leave over on each device.

    0 where a device does not tell how much memory it has, as a CPU.

    Args:
        devices: as JAX lists them.
    """
    stats = [device.memory_stats() or {} for device in devices]
    free = min(each.get("bytes_limit", 0) - max(each.get("bytes_in_use", 0), needed) for each in stats)
    return max(0, int(FREE_SHARE * free))
