"""The column sums of attention's weights: what each key receives from all the queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.partition import by_shares, current_partition
from pallas_kernels.soft_cap import soft_capped
from pallas_kernels.visibility import first_visible


def attention_mass(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    lse: Float[Array, "queries heads"],
    q_positions: Int[Array, " queries"],
    *,
    q_starts: Int[Array, " queries"] | None = None,
    kv_length: Int[Array, ""] | int | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, " keys"]:
    """Returns the attention that each key receives: the sum of its softmax weights over queries and heads.

    `lse` is what `selective_attention(..., return_lse=True)` returned for the same arguments; queries whose `lse` is
    `-inf` (padding) add nothing. The results sum to heads x valid queries, less what sinks receive. Memory is
    O(heads x 8 x keys).
    """
    if q.shape[0] == 0:
        return jnp.zeros(k.shape[0], jnp.float32)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    kv_length = k.shape[0] if kv_length is None else kv_length
    starts = first_visible(q_positions, q_starts, window)
    starts = jnp.zeros_like(q_positions) if starts is None else starts
    partition = current_partition()

    def of_share(*arrays: Any) -> Float[Array, " keys"]:
        mass = _mass(*arrays, scale=scale, soft_cap=soft_cap)
        return mass if partition is None else partition.summed(mass, "heads")

    axes = [(None, "heads"), (None, "kv_heads"), (None, "heads"), (), (), ()]
    return by_shares(of_share, axes, ())(q, k, lse, q_positions, starts, kv_length)


def _mass(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    lse: Float[Array, "queries heads"],
    q_positions: Int[Array, " queries"],
    starts: Int[Array, " queries"],
    kv_length: Int[Array, ""] | int,
    *,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, " keys"]:
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    column = jnp.arange(num_keys, dtype=jnp.int32)[None, :]

    def add_tile(mass: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        rows, row_lse, positions, first = tile
        rows = rows.reshape(-1, num_kv_heads, group, head_dim)
        scores = jnp.einsum("qhgd,khd->hgqk", rows, k, preferred_element_type=jnp.float32) * scale
        scores = soft_capped(scores, soft_cap)
        row_lse = row_lse.reshape(-1, num_kv_heads, group, 1).transpose(1, 2, 0, 3)
        visible = (column >= first[:, None]) & (column <= positions[:, None]) & (column < kv_length)
        weights = jnp.where(visible[None, None] & (row_lse > -jnp.inf), jnp.exp(scores - row_lse), 0.0)
        return mass + weights.sum(axis=(0, 1, 2)), None

    tile_size = min(8, num_queries)
    padding = -num_queries % tile_size
    tiles = (
        jnp.pad(q, ((0, padding), (0, 0), (0, 0))),
        jnp.pad(lse, ((0, padding), (0, 0)), constant_values=-jnp.inf),
        jnp.pad(q_positions, (0, padding)),
        jnp.pad(starts, (0, padding)),
    )
    tiles = jax.tree.map(lambda x: x.reshape(-1, tile_size, *x.shape[1:]), tiles)
    with jax.named_scope("attention_mass"):
        mass, _ = lax.scan(add_tile, jnp.zeros(num_keys, jnp.float32), tiles)
    return mass
