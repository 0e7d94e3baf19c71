"""Host buffers that a CPU device can take over without a copy, and that are reused from request to request."""

from __future__ import annotations

import math

import numpy as np

ALIGNMENT = 64  # bytes; XLA's CPU client requires it of a buffer that it uses in place


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array whose first byte is aligned to 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


class HostBuffers:
    """A pair of host buffers, for K and V, that grow as needed and are reused.

    Rows that a request does not write hold what an earlier one left there (at first zeros): finite values that never
    reach a result.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self._k, self._v = (aligned_empty((0,), dtype) for _ in range(2))

    def arrays(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the buffers of K and V, aligned so that a CPU device takes them over without a copy."""
        size = math.prod(shape)
        if self._k.size < size:
            self._k, self._v = (aligned_empty((size,), self._k.dtype) for _ in range(2))
            self._k[:] = self._v[:] = 0
        return self._k[:size].reshape(shape), self._v[:size].reshape(shape)
