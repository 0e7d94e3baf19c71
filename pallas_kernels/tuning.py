"""Block sizes of the Pallas kernels, one small table: measured where marked so, else by what fits without spills.

On a machine with the chip, `python scripts/gpu_bench.py --only sweep` times every candidate, to choose these rows by.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp


class AttentionBlocks(NamedTuple):
    """Sizes of `selective_attention`'s tiles.

    Attributes:
        rows: query rows (queries x heads that share a KV head) a tile, an upper bound on a TPU; on Hopper, those of
            all its warpgroups.
        keys: keys a step.
        stages: key and value blocks in flight (GPU).
        warps: of a Triton program.
    """

    rows: int
    keys: int
    stages: int = 2
    warps: int = 4


# By backend, chip (the longest name that the device's name holds; "" is any), bytes of an element, and the largest
# head_dim that the sizes are for. Nothing here was measured on an accelerator yet: see docs/kernels.md.
SELECTIVE_ATTENTION: dict[tuple[str, str], list[tuple[int, int, AttentionBlocks]]] = {
    ("mosaic_gpu", ""): [
        (2, 64, AttentionBlocks(rows=128, keys=128, stages=4)),
        (2, 128, AttentionBlocks(rows=128, keys=128, stages=2)),
        (2, 256, AttentionBlocks(rows=128, keys=64, stages=2)),
    ],
    ("triton", ""): [
        (2, 64, AttentionBlocks(rows=64, keys=64, stages=3)),
        (2, 128, AttentionBlocks(rows=64, keys=64, stages=2)),
        (2, 256, AttentionBlocks(rows=64, keys=32, stages=1, warps=8)),
        (4, 64, AttentionBlocks(rows=32, keys=32, stages=1)),
        (4, 256, AttentionBlocks(rows=16, keys=16, stages=1, warps=8)),
    ],
    ("tpu", ""): [
        (2, 256, AttentionBlocks(rows=512, keys=1024)),
        (4, 256, AttentionBlocks(rows=512, keys=512)),
    ],
}


class BlendBlocks(NamedTuple):
    """Sizes of `blend_kv`'s blocks.

    Attributes:
        keys: keys a block, on a TPU an upper bound.
        block_bytes: of a block's keys at most (TPU); several such blocks are in VMEM at a time.
        warps: of a Triton program.
    """

    keys: int
    block_bytes: int = 2**19
    warps: int = 4


BLEND_KV = {"triton": BlendBlocks(keys=32), "tpu": BlendBlocks(keys=512)}


def attention_blocks(backend: str, chip: str, dtype: jnp.dtype, head_dim: int) -> AttentionBlocks | None:
    """Returns the block sizes of that backend on that chip; `None` where the table has none for them."""
    named = (name for of, name in SELECTIVE_ATTENTION if of == backend and name.lower() in chip.lower())
    rows = SELECTIVE_ATTENTION[backend, max(named, key=len)]
    fits = (blocks for size, widest, blocks in rows if size == jnp.dtype(dtype).itemsize and head_dim <= widest)
    return next(fits, None)
