"""KV blending: cached keys are rotated to their places and the recomputed tokens' rows replaced, in one pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import choose_backend
from pallas_kernels.rotary import apply_rope


def blend_kv(
    k_cached: Float[Array, "keys kv_heads head_dim"],
    v_cached: Float[Array, "keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    *,
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    return_deviation: bool = False,
    implementation: str | None = None,
) -> (
    tuple[Float[Array, "keys kv_heads head_dim"], Float[Array, "keys kv_heads head_dim"]]
    | tuple[Float[Array, "keys kv_heads head_dim"], Float[Array, "keys kv_heads head_dim"], Float[Array, "tokens 2"]]
):
    """Returns one layer's blended `(k rotated, v)`: the cached rows, those at `indices` replaced by the fresh ones.

    `k_cached` and `k_fresh` are before RoPE; `cos` and `sin` (float32) hold every key's angles. `indices` ascend;
    an index of `keys` or more is padding and writes nothing. `implementation`: `None` (best) or `"xla"`.

    With `return_deviation` a third result, float32 `[tokens, 2]`: how far each fresh row is from the cached one that
    it replaces, `[Σ (k_fresh - k_cached)², Σ (v_fresh - v_cached)²]` over heads and dims, before RoPE, not divided by
    the layer's norms; zeros for padding.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.

    Source: CacheBlend (arXiv 2405.16444) §4.2, with keys cached before RoPE.
    """
    _validate(k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin)
    choose_backend(implementation, "blend_kv", {}, default="xla")
    with jax.named_scope("blend_kv"):
        blended = _blend_kv_xla(k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin)
        if not return_deviation:
            return blended
        at, is_row = jnp.minimum(indices, k_cached.shape[0] - 1), indices < k_cached.shape[0]
        parts = [_squared_distance(k_fresh, k_cached[at]), _squared_distance(v_fresh, v_cached[at])]
        return (*blended, jnp.where(is_row[:, None], jnp.stack(parts, axis=1), 0.0))


def _squared_distance(fresh: jax.Array, cached: jax.Array) -> jax.Array:
    return jnp.square(fresh.astype(jnp.float32) - cached.astype(jnp.float32)).sum(axis=(1, 2))


def _blend_kv_xla(k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin):
    # Few rows are fresh: one pass over the keys and a scatter beat a gather of a row for every key.
    num_keys = k_cached.shape[0]
    at = jnp.minimum(indices, num_keys - 1)
    places = jnp.where(indices < num_keys, indices, num_keys + jnp.arange(indices.shape[0], dtype=indices.dtype))

    def replace_rows(array: jax.Array, rows: jax.Array) -> jax.Array:
        return array.at[places].set(rows, mode="drop", indices_are_sorted=True, unique_indices=True)

    k = replace_rows(apply_rope(k_cached, cos, sin), apply_rope(k_fresh, cos[at], sin[at]))
    return k, replace_rows(v_cached, v_fresh)


def _validate(k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin) -> None:
    for name, array, wanted in (
        ("v_cached", v_cached, k_cached.shape),
        ("k_fresh", k_fresh, (*k_fresh.shape[:1], *k_cached.shape[1:])),
        ("v_fresh", v_fresh, k_fresh.shape),
        ("indices", indices, k_fresh.shape[:1]),
        ("cos", cos, (k_cached.shape[0], k_cached.shape[2] // 2)),
        ("sin", sin, (k_cached.shape[0], k_cached.shape[2] // 2)),
    ):
        if array.shape != wanted:
            raise ValueError(f"blend_kv: {name} must have shape {wanted}, got {array.shape}")
    for name, array in (("v_cached", v_cached), ("k_fresh", k_fresh), ("v_fresh", v_fresh)):
        if array.dtype != k_cached.dtype:
            raise ValueError(f"blend_kv: {name} must have k_cached's dtype {k_cached.dtype}, got {array.dtype}")
