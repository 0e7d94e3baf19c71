"""What the kernels compute and move, by the compiler's account and their own, against the least that is possible."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import blend_kv, selective_attention, tuning
from pallas_kernels.blend_kv_traffic import cost
from pallas_kernels.query_tiles import make_tiles
from pallas_kernels.selective_attention_xla import block_sizes

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


@pytest.mark.parametrize("backend", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize(("num_queries", "window"), [(1229, None), (8192, None), (1229, 2048)])
def test_tiles_visit_few_keys_that_they_do_not_see(backend, num_queries, window):
    num_keys, kv_heads, group, head_dim = 8192, 8, 4, 128
    blocks = tuning.attention_blocks(backend, "NVIDIA H200", jnp.dtype(jnp.bfloat16), head_dim)
    positions = np.sort(np.random.default_rng(0).choice(num_keys, num_queries, replace=False)).astype(np.int32)
    starts = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
    tiles = make_tiles(
        jnp.zeros((num_queries, kv_heads * group, head_dim), jnp.bfloat16),
        jnp.asarray(positions),
        jnp.asarray(starts),
        jnp.int32(num_keys),
        num_kv_heads=kv_heads,
        tile_rows=blocks.rows,
        block_keys=blocks.keys,
    )
    visited = int((tiles.blocks.end - tiles.blocks.begin).sum()) * blocks.keys * blocks.rows
    masked_steps = visited - int((tiles.blocks.inner_end - tiles.blocks.inner_begin).sum()) * blocks.keys * blocks.rows
    seen = int((positions - starts + 1).astype(np.int64).sum()) * group
    assert seen <= visited <= (1.1 if window is None else 1.25) * seen  # a window has two ragged ends
    assert masked_steps <= (0.2 if window is None else 0.4) * visited


@pytest.mark.parametrize("rows", [128, 1293, 8192])
def test_blending_declares_no_more_traffic_than_the_least(rows):
    k_cached, k_fresh = (jnp.zeros((tokens, 8, 128), jnp.bfloat16) for tokens in (8192, rows))
    cached, fresh, cos = k_cached.nbytes, k_fresh.nbytes, jnp.zeros((8192, 64))
    # Keys not replaced are read, all are written; fresh rows are read, of the values they alone are written.
    least = (cached - fresh) + cached + 3 * fresh + 2 * cos.nbytes + 4 * rows
    declared = cost(k_cached, k_fresh, cos, False).bytes_accessed
    assert least <= declared <= (1.15 if rows < 8192 else 1.3) * least


@pytest.mark.parametrize("backend", ["triton", "tpu"])
def test_the_kernels_carry_what_they_declare(backend):
    k, fresh, cos, indices = jnp.zeros((256, 2, 32)), jnp.zeros((16, 2, 32)), jnp.zeros((256, 16)), jnp.arange(16)

    def blend(k, v, k_fresh, v_fresh, indices, cos, sin):
        return blend_kv(k, v, k_fresh, v_fresh, indices, cos=cos, sin=sin, implementation=backend)

    text = str(jax.make_jaxpr(blend)(k, k, fresh, fresh, indices, cos, cos))
    declared = cost(k, fresh, cos, False)
    assert f"bytes_accessed={declared.bytes_accessed}" in text
