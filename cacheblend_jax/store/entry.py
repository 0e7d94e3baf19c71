"""One chunk's stored KV."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ChunkEntry:
    """K before RoPE and V of a chunk computed alone, each `[layers, tokens, kv_heads, head_dim]`, on the host."""

    k: np.ndarray
    v: np.ndarray

    def __post_init__(self) -> None:
        if self.k.shape != self.v.shape or self.k.ndim != 4 or self.k.dtype != self.v.dtype:
            raise ValueError(
                "k and v must be of one shape [layers, tokens, kv_heads, head_dim] and one dtype, "
                f"got {self.k.dtype}{list(self.k.shape)} and {self.v.dtype}{list(self.v.shape)}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.k.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V."""
        return self.k.nbytes + self.v.nbytes
