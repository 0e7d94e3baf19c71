"""Block sizes of the Pallas kernels: chosen by what compiles without spilling.

`python scripts/gpu_bench.py --only sweep` times the candidates on the device at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp


class AttentionBlocks(NamedTuple):
    """Sizes of `selective_attention`'s tiles.

    Attributes:
        rows: query rows (queries x heads that share a KV head) per tile; an upper bound on a TPU, and on Hopper the
            rows of both computing warpgroups together.
        keys: keys per step; an upper bound on a TPU.
        stages: key and value blocks in flight (GPUs).
        warps: warps of a Triton program.
    """

    rows: int
    keys: int
    stages: int = 2
    warps: int = 4


# By backend and chip: the longest chip name that the device's name contains counts, and "" matches any. Each row
# holds the bytes of an element, the largest head_dim that the sizes are for, and the sizes; the first that fits counts.
# None of them has been measured on an accelerator yet (docs/kernels.md).
SELECTIVE_ATTENTION: dict[tuple[str, str], list[tuple[int, int, AttentionBlocks]]] = {
    ("mosaic_gpu", ""): [
        (2, 64, AttentionBlocks(rows=128, keys=128, stages=4)),
        (2, 128, AttentionBlocks(rows=128, keys=128, stages=2)),
        (2, 256, AttentionBlocks(rows=128, keys=64, stages=2)),
    ],
    ("triton", ""): [
        (2, 64, AttentionBlocks(rows=64, keys=32, stages=2)),  # with 64 keys, threads spill on Ampere
        (2, 128, AttentionBlocks(rows=64, keys=64, stages=2)),
        (2, 256, AttentionBlocks(rows=64, keys=32, stages=1, warps=8)),
        # With 4 warps, or 16 x 16 at head_dim 128, threads spill some bytes on one chip or another.
        (4, 64, AttentionBlocks(rows=32, keys=32, stages=1, warps=8)),
        (4, 128, AttentionBlocks(rows=32, keys=16, stages=1, warps=8)),
        (4, 256, AttentionBlocks(rows=16, keys=16, stages=1, warps=8)),
    ],
    # In bfloat16 n rows compute n operations for each byte of keys and values; 240 keep a v5e busy, 560 a v6e.
    ("tpu", "v6"): [
        (2, 256, AttentionBlocks(rows=1024, keys=1024)),
        (4, 256, AttentionBlocks(rows=512, keys=512)),
    ],
    ("tpu", ""): [
        (2, 256, AttentionBlocks(rows=512, keys=1024)),
        (4, 256, AttentionBlocks(rows=512, keys=512)),
    ],
}


class BlendBlocks(NamedTuple):
    """Sizes of `blend_kv`'s blocks.

    Attributes:
        keys: keys per block; an upper bound on a TPU.
        block_bytes: upper bound of the bytes of a block's keys (TPU); several such blocks are in VMEM at a time.
        warps: warps of a Triton program.
    """

    keys: int
    block_bytes: int = 2**19
    warps: int = 4


BLEND_KV = {"triton": BlendBlocks(keys=32), "tpu": BlendBlocks(keys=512)}


def attention_blocks(backend: str, chip: str, dtype: jnp.dtype, head_dim: int) -> AttentionBlocks | None:
    """Returns a backend's block sizes on a chip; `None` where the table has none for that dtype and head_dim."""
    chips = (name for of, name in SELECTIVE_ATTENTION if of == backend and name.lower() in chip.lower())
    rows = SELECTIVE_ATTENTION.get((backend, max(chips, key=len, default="")), [])
    fitting = (blocks for size, widest, blocks in rows if size == jnp.dtype(dtype).itemsize and head_dim <= widest)
    return next(fitting, None)
