"""Host buffers that a device can take over without a copy."""

from __future__ import annotations

import math

import numpy as np

ALIGNMENT = 64  # what XLA's CPU client asks of a buffer that it uses in place


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array whose first byte is aligned to 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)
