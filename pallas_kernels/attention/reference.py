"""What `selective_attention` means, in plain `jnp` over a dense mask: every backend is tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.soft_cap import soft_capped
from pallas_kernels.visibility import first_visible


def selective_attention_reference(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    v: Float[Array, "keys kv_heads head_dim"],
    q_positions: Int[Array, " queries"],
    *,
    q_starts: Int[Array, " queries"] | None = None,
    kv_length: Int[Array, ""] | int | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    """Returns what `selective_attention(..., return_lse=True)` must, computed in the dtype of `q`."""
    num_keys, num_kv_heads, head_dim = k.shape
    kv_length = num_keys if kv_length is None else kv_length
    starts = first_visible(q_positions, q_starts, window)
    starts = jnp.zeros_like(q_positions) if starts is None else starts
    column = jnp.arange(num_keys)[None, :]
    valid = (q_positions < kv_length)[:, None]
    visible = (column >= starts[:, None]) & (column <= q_positions[:, None]) & (column < kv_length) & valid
    k, v = (jnp.where((column < kv_length).T[..., None], x, 0) for x in (k, v))
    k, v = (jnp.repeat(x, q.shape[1] // num_kv_heads, axis=1) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * (head_dim**-0.5 if scale is None else scale)
    scores = soft_capped(scores, soft_cap)
    sees_any = visible.any(axis=1)
    scores = jnp.where(visible | ~sees_any[:, None], scores, -jnp.inf)  # rows that see nothing: finite, for gradients
    lse = jax.nn.logsumexp(scores, axis=-1)
    if sinks is not None:
        lse = jnp.logaddexp(lse, sinks.astype(lse.dtype)[:, None])
    weights = jnp.where(visible, jnp.exp(scores - lse[..., None]), 0.0)
    return jnp.einsum("hqk,khd->qhd", weights, v), jnp.where(sees_any, lse, -jnp.inf).T
