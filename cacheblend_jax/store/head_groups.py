"""Groups of KV heads: a layer is stored and checked by them, so that a host can read the heads it needs alone."""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

MOST_GROUPS = 8  # of a layer: as many hosts can each read bytes of their own; more checksums would swell the records

Layer = Shaped[np.ndarray, "..."]  # of one of an entry's arrays


def num_groups(kv_heads: int) -> int:
    """Returns how many equal groups the KV heads of an entry are stored in: as many as can be, up to eight."""
    return max(groups for groups in range(1, MOST_GROUPS + 1) if kv_heads % groups == 0)


def head_axis(name: str) -> int:
    """Returns which axis of a layer of an entry's array (`ChunkEntry.arrays`) counts KV heads."""
    return 0 if name == "k_offset" else 1


def heads_first(layer: Layer, name: str) -> Layer:
    """Returns a layer as it is stored in groups: all of the first head, then all of the second. A view."""
    return np.moveaxis(_bits(layer), head_axis(name), 0)


def cut(layer: Layer, name: str, heads: range) -> Layer:
    """Returns some heads of a layer, as a view."""
    chosen = slice(heads.start, heads.stop)
    return layer[chosen] if head_axis(name) == 0 else layer[:, chosen]


def check_heads(heads: range, kv_heads: int) -> None:
    """Checks that an entry has the heads that are asked for.

    Raises:
        IndexError: it has not, or they are not consecutive.
    """
    if not (heads.step == 1 and 0 <= heads.start < heads.stop <= kv_heads):
        raise IndexError(f"heads must be consecutive and in [0, {kv_heads - 1}], got {heads}")


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns an array's values as whole numbers of their size: numpy copies those of dtypes not its own one by one."""
    return array.view(f"u{array.dtype.itemsize}")
