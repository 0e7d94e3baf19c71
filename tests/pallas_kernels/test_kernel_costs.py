"""What the kernels compute and move, by the compiler's account and their own, against the least that is possible."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import blend_kv, selective_attention, tuning
from pallas_kernels.attention.tiles import cost as attention_cost
from pallas_kernels.attention.tiles import make_tiles
from pallas_kernels.attention.xla import block_sizes
from pallas_kernels.blending.traffic import cost

shape = jax.ShapeDtypeStruct


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1229, 8192), (200, 8192), (2048, 2048)])
def test_xla_attention_computes_little_but_its_products(num_queries, num_keys):
    heads, kv_heads, head_dim = 8, 4, 64
    q = shape((num_queries, heads, head_dim), jnp.float32)
    k = shape((num_keys, kv_heads, head_dim), jnp.float32)
    compiled = jax.jit(selective_attention).lower(q, k, k, shape((num_queries,), jnp.int32)).compile()
    # The compiler counts a loop's body once: here one step of unmasked keys and one of masked ones.
    tile, blocks = block_sizes(num_queries, num_keys)
    products = 4 * heads * head_dim * tile * (blocks.inner + blocks.edge)
    assert products <= compiled.cost_analysis()["flops"] <= 1.1 * products


NUM_KEYS, KV_HEADS, GROUP, HEAD_DIM = 8192, 8, 4, 128


@cache
def tiles_of(backend: str, num_queries: int, window: int | None):
    """The backend's tiles for that many queries at random positions, and which keys each of their rows sees."""
    blocks = tuning.attention_blocks(backend, "NVIDIA H200", jnp.dtype(jnp.bfloat16), HEAD_DIM)
    positions = np.sort(np.random.default_rng(0).choice(NUM_KEYS, num_queries, replace=False)).astype(np.int32)
    starts = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
    sizes = {"num_kv_heads": KV_HEADS, "tile_rows": blocks.rows, "block_keys": blocks.keys}
    visited = jax.jit(lambda *arrays: make_tiles(*arrays, **sizes).blocks)
    q = jnp.zeros((num_queries, KV_HEADS * GROUP, HEAD_DIM), jnp.bfloat16)
    return blocks, visited(q, positions, starts, np.int32(NUM_KEYS)), np.stack([starts, positions])


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton", "tpu"])
@pytest.mark.parametrize(("num_queries", "window"), [(1229, None), (8192, None), (1229, 2048)])
def test_tiles_visit_the_key_blocks_that_they_must_and_no_others(backend, num_queries, window):
    blocks, visited, seen = tiles_of(backend, num_queries, window)
    rows = np.repeat(seen, GROUP, axis=1)
    needed, fully_seen = 0, 0
    for tile in range(visited.begin.size):
        starts, positions = rows[:, tile * blocks.rows : (tile + 1) * blocks.rows]
        first = np.arange(0, NUM_KEYS, blocks.keys)[:, None]
        last = first + blocks.keys - 1
        needed += int(((positions >= first) & (starts <= last)).any(axis=1).sum())
        fully_seen += int(((positions >= last) & (starts <= first)).all(axis=1).sum())
    assert int((visited.end - visited.begin).sum()) == needed
    assert int((visited.inner_end - visited.inner_begin).sum()) == fully_seen  # and compute no mask for these


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize(("num_queries", "window"), [(1229, None), (8192, None), (1229, 2048)])
def test_tiles_compute_few_scores_that_nobody_sees(backend, num_queries, window):
    blocks, visited, (starts, positions) = tiles_of(backend, num_queries, window)
    computed = int((visited.end - visited.begin).sum()) * blocks.keys * blocks.rows
    visible = int((positions - starts + 1).astype(np.int64).sum()) * GROUP
    assert visible <= computed <= (1.1 if window is None else 1.25) * visible  # a window has two ragged ends


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton", "tpu"])
@pytest.mark.parametrize("num_queries", [1229, 8192])
def test_attention_declares_what_its_tiles_compute_and_read(backend, num_queries):
    blocks, visited, _ = tiles_of(backend, num_queries, None)
    q, k = (
        jnp.zeros((tokens, heads, HEAD_DIM), jnp.bfloat16)
        for tokens, heads in ((num_queries, KV_HEADS * GROUP), (NUM_KEYS, KV_HEADS))
    )
    declared = attention_cost(q, k, tile_rows=blocks.rows, block_keys=blocks.keys)
    keys_read = KV_HEADS * int((visited.end - visited.begin).sum()) * blocks.keys
    assert declared.flops == pytest.approx(4 * HEAD_DIM * blocks.rows * keys_read, rel=0.1)
    assert declared.transcendentals == pytest.approx(blocks.rows * keys_read, rel=0.1)
    queries_and_results = 2 * q.size * 2 + 4 * num_queries * KV_HEADS * GROUP
    assert declared.bytes_accessed == pytest.approx(keys_read * 2 * HEAD_DIM * 2 + queries_and_results, rel=0.1)


@pytest.mark.parametrize("rows", [128, 1293, 8192])
def test_blending_declares_no_more_traffic_than_the_least(rows):
    k_cached, k_fresh = (jnp.zeros((*shape, 8, 128), jnp.bfloat16) for shape in ((2, 8192), (rows,)))
    cached, fresh, cos = k_cached.nbytes // 2, k_fresh.nbytes, jnp.zeros((8192, 64))
    # Keys not replaced are read, all are written; fresh rows are read, of the values they alone are written.
    least = (cached - fresh) + cached + 3 * fresh + 2 * cos.nbytes + 4 * rows
    declared = cost(k_cached, k_fresh, cos).bytes_accessed
    assert least <= declared <= (1.15 if rows < 8192 else 1.3) * least


@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_attention_carries_what_it_declares(backend):
    q, k, positions = jnp.zeros((16, 4, 64)), jnp.zeros((256, 2, 64)), jnp.arange(0, 256, 16)
    jaxpr = str(jax.make_jaxpr(partial(selective_attention, implementation=backend))(q, k, k, positions))
    blocks = tuning.attention_blocks(backend, "", jnp.dtype(jnp.float32), 64)
    rows, keys = (128, 256) if backend == "tpu" else (blocks.rows, blocks.keys)  # on a TPU no larger than needed
    assert f"flops={attention_cost(q, k, tile_rows=rows, block_keys=keys).flops}" in jaxpr


@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_the_kernels_carry_what_they_declare(backend):
    k, fresh, cos, indices = jnp.zeros((256, 2, 32)), jnp.zeros((16, 2, 32)), jnp.zeros((256, 16)), jnp.arange(16)

    def blend(k, v, k_fresh, v_fresh, indices, cos, sin):
        return blend_kv(k, v, k_fresh, v_fresh, indices, cos=cos, sin=sin, implementation=backend)

    text = str(jax.make_jaxpr(blend)(k, k, fresh, fresh, indices, cos, cos))
    declared = cost(k[None], fresh, cos)
    assert f"bytes_accessed={declared.bytes_accessed}" in text


def test_a_backend_without_block_sizes_has_none():
    assert tuning.attention_blocks("new", "NVIDIA H200", jnp.dtype(jnp.float32), 64) is None
