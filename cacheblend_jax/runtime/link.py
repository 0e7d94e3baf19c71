"""The link: how bytes go from host memory to a model's devices, at which speed, and whether it is worth hiding."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from cacheblend_jax.runtime.placing import OwnPart, put
from cacheblend_jax.runtime.throttle import Throttle

logger = logging.getLogger(__name__)


@runtime_checkable
class Link(Protocol):
    """The way from host memory to a model's devices.

    Attributes:
        is_hidden: whether transfers run beside computation, so that layers are worth sending one by one.
        is_ordered: whether a transfer waits for the programs that were dispatched before it.
        bytes_per_s: its speed; `None` where that has to be measured.
    """

    is_hidden: bool
    is_ordered: bool
    bytes_per_s: float | None

    def put(self, tree: Any, placement: jax.sharding.Sharding, own: OwnPart | None = None) -> Any:
        """Puts arrays on the devices; they may still be on their way when this returns.

        Args:
            own: where several processes share the devices, the part of the arrays that this one has.
        """

    def page_lock(self, buffer: np.ndarray) -> PageLock | None:
        """Page-locks a buffer, so that devices read it by themselves; `None` where it stays pageable."""


class DeviceLink:
    """The link that the devices have."""

    bytes_per_s: float | None = None

    def __init__(self, placement: jax.sharding.Sharding) -> None:
        device: Any = next(iter(placement.device_set))
        self.is_hidden = self.is_ordered = device.platform != "cpu"
        self._client = device.client

    def put(self, tree: Any, placement: jax.sharding.Sharding, own: OwnPart | None = None) -> Any:
        """See `Link`."""
        return put(tree, placement, own)

    def page_lock(self, buffer: np.ndarray) -> PageLock | None:
        """See `Link`. A CPU device takes buffers over as they are."""
        if not self.is_hidden or not buffer.nbytes:
            return None
        try:
            return PageLock(self._client, buffer)
        except Exception as error:  # whatever the plugin raises: transfers are slower, but right
            _say_pageable(str(error).splitlines()[0])
            return None


class SimulatedLink:
    """A link of any speed in a device's place: for tests, and for planning with a machine that is not at hand.

    Args:
        bytes_per_s: of all transfers together.
        latency_s: seconds of each.
        clock: returns the time in seconds.
        sleep: waits so many seconds.

    Raises:
        CacheBlendError: a bandwidth that is not positive and finite, or a latency that is negative or not finite.
    """

    is_hidden = True
    is_ordered = False  # `put` returns when the bytes have arrived

    def __init__(
        self,
        bytes_per_s: float,
        latency_s: float = 0.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._throttle = Throttle(bytes_per_s, latency_s, clock=clock, sleep=sleep)
        self.bytes_per_s: float | None = bytes_per_s

    def put(self, tree: Any, placement: jax.sharding.Sharding, own: OwnPart | None = None) -> Any:
        """See `Link`; returns after the time that the bytes take. What arrives is a copy, as on a device."""
        self._throttle.wait_for(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        return put(jax.tree.map(np.copy, tree), placement, own)

    def page_lock(self, buffer: np.ndarray) -> PageLock | None:
        """See `Link`: nothing would read it."""
        return None


class PageLock:
    """Keeps a buffer page-locked for a client's devices until `release`, or until nobody has the lock.

    The buffer lives as long: a device must never read memory that has been given back.
    """

    def __init__(self, client: Any, buffer: np.ndarray) -> None:
        client.dma_map(buffer.ctypes.data, buffer.nbytes)
        self._release = weakref.finalize(self, _unlock, client, buffer)
        self._release.atexit = False  # the process's end releases it, and the client may be gone by then

    def release(self) -> None:
        """Lets the buffer be pageable again; nothing may be on its way from it."""
        self._release()


def _unlock(client: Any, buffer: np.ndarray) -> None:
    client.dma_unmap(buffer.ctypes.data)


@cache
def _say_pageable(reason: str) -> None:
    logger.warning("memory could not be page-locked, so that KV goes to the device more slowly: %s", reason)
