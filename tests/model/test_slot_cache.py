"""A cache of slots, in either order of its axes: each slot's query sees its own keys, and no others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheblend_jax.model.kv_cache import KVCache, LayerKV
from cacheblend_jax.model.sampling import Draw, Sampling, next_token, next_tokens
from cacheblend_jax.model.slot_cache import AS_IT_IS, CPU_ORDER, SlotCache
from pallas_kernels import selective_attention

LAYERS, SLOTS, CAPACITY, KV_HEADS, HEAD_DIM = 2, 3, 40, 2, 8
attend = jax.jit(selective_attention, static_argnames=("scale", "soft_cap", "window", "return_lse"))


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def empty(orders) -> SlotCache:
    shape = (LAYERS, SLOTS, CAPACITY, KV_HEADS, HEAD_DIM)
    stacks = (jnp.full([shape[axis] for axis in order], jnp.nan) for order in orders)  # what must never be seen
    return SlotCache(*stacks, orders, "float32")


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.once), 5])
@pytest.mark.parametrize("orders", [AS_IT_IS, CPU_ORDER], ids=["as it is", "cpu"])
def test_a_query_of_each_slot_sees_the_keys_of_its_slot(orders, window):
    lengths = [17, 40, 0]  # the second is full, the third idle
    rows = LayerKV(drawn(1, SLOTS, KV_HEADS, HEAD_DIM), drawn(2, SLOTS, KV_HEADS, HEAD_DIM))
    stacks = [drawn(seed, LAYERS, 48, KV_HEADS, HEAD_DIM) for seed in range(3, 7)]
    prompts = [KVCache(*stacks[:2]), KVCache(*stacks[2:])]
    positions = jnp.asarray([lengths[0] - 1, lengths[1] - 1, CAPACITY], jnp.int32)
    q, layer = drawn(5, SLOTS, 2 * KV_HEADS, HEAD_DIM), 1
    sinks = drawn(6, 2 * KV_HEADS)

    @jax.jit
    def attended(cache, index):
        for slot, prompt in enumerate(prompts):
            cache = cache.with_slot(jnp.int32(slot), prompt)
        cache = cache.with_rows(index, positions, rows)
        starts = None if window is None else jnp.maximum(positions - window + 1, 0)
        options = {"scores": {"scale": 0.3, "soft_cap": 2.0}, "sinks": sinks}
        return cache, cache.layer(index).attended(
            q, positions, starts=starts, kv_length=cache.lengths(positions), **options
        )

    cache, (out, lse) = attended(empty(orders), layer)
    assert cache.capacity == CAPACITY
    for slot, prompt in enumerate(prompts):
        keys, position = lengths[slot], slice(slot, slot + 1)
        k, v = (np.array(x)[layer, :keys] for x in (prompt.k, prompt.v))
        k[-1], v[-1] = rows.k[slot], rows.v[slot]
        options = {"scale": 0.3, "soft_cap": 2.0, "sinks": sinks, "window": window, "return_lse": True}
        alone = attend(q[position], k, v, positions[position], **options)
        np.testing.assert_allclose(out[position], alone[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[position], alone[1], rtol=1e-5)
        kept = cache.cut(0, jnp.int32(slot), CAPACITY)  # the other layer has no fresh row
        np.testing.assert_array_equal(kept.k, prompt.k[0, :CAPACITY])
        np.testing.assert_array_equal(kept.v, prompt.v[0, :CAPACITY])
    np.testing.assert_array_equal(out[2], 0)
    assert np.isnan(cache.cut(layer, jnp.int32(2), CAPACITY).k).all()  # an idle slot's row is not written


def test_tokens_of_several_answers_are_drawn_as_each_alone():
    logits, numbers = drawn(1, 4, 50) * 3, jnp.asarray([0, 7, 1, 2], jnp.int32)
    ways = [Sampling(), Sampling(1.5, seed=3), Sampling(), Sampling(0.7, top_k=9, top_p=0.8, seed=2**32 - 1)]
    draw_one = jax.jit(next_token)
    for chosen in (ways, [Sampling()] * 4):
        draws = jax.tree.map(lambda *each: jnp.stack([jnp.asarray(x) for x in each]), *map(Draw.by, chosen))
        alone = [int(draw_one(*each)) for each in zip(logits, map(Draw.by, chosen), numbers, strict=True)]
        assert jax.jit(next_tokens)(logits, draws, numbers).tolist() == alone
