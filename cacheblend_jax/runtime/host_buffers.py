"""Host buffers that devices read without a copy in between, and that are reused from request to request.

A CPU device takes them over as they are; others read them by themselves where they are page-locked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np

from cacheblend_jax.runtime.link import PageLock

ALIGNMENT = 4096  # bytes: page-locking is by pages; XLA's CPU client wants 64 of a buffer that it uses in place


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array whose first byte is aligned to a page."""
    return _aligned(np.empty, shape, dtype)


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns zeros so aligned; of many, the system hands each page out when it is first written to."""
    return _aligned(np.zeros, shape, dtype)


def _aligned(make: Callable[..., np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = make(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


class HostBuffers:
    """A pair of host buffers, for K and V, that grow as needed and are reused.

    Rows that a request does not write hold what an earlier one left there (at first zeros): finite values that never
    reach a result.

    Args:
        page_lock: page-locks a buffer; returns `None` where it cannot.
    """

    def __init__(self, dtype: np.dtype, page_lock: Callable[[np.ndarray], PageLock | None] = lambda _: None) -> None:
        self._k, self._v = (aligned_empty((0,), dtype) for _ in range(2))
        self._page_lock = page_lock
        self._locks: list[PageLock | None] = []
        self._growing = threading.Lock()

    def arrays(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the buffers of K and V, of that shape. Nothing may be on its way from those returned before."""
        size = math.prod(shape)
        with self._growing:
            if self._k.size < size:
                self._release()
                self._k, self._v = (aligned_zeros((size,), self._k.dtype) for _ in range(2))
                self._locks = [self._page_lock(buffer) for buffer in (self._k, self._v)]
            return self._k[:size].reshape(shape), self._v[:size].reshape(shape)

    def _release(self) -> None:
        for lock in self._locks:
            if lock is not None:
                lock.release()
        self._locks = []
