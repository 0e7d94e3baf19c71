"""Drawn cases of `selective_attention`, shared by the tests of all its backends, and their results in float64."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels import selective_attention
from pallas_kernels.attention.reference import selective_attention_reference

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


@dataclass(frozen=True)
class Case:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    positions: jax.Array
    starts: jax.Array | None
    kv_length: int
    window: int | None

    @property
    def masks(self) -> dict:
        return {"q_starts": self.starts, "kv_length": self.kv_length, "window": self.window}

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp in float64."""
        with jax.enable_x64(True):
            q, k, v = (jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64) for x in (self.q, self.k, self.v))
            out, lse = selective_attention_reference(q, k, v, self.positions, **self.masks)
            return np.asarray(out), np.asarray(lse)

    def check(self, implementation: str | None, *, poisoned: bool = False) -> None:
        """Compares the implementation with the reference; `poisoned`: with NaN in the keys beyond `kv_length`."""
        poison = (jnp.arange(self.k.shape[0]) >= self.kv_length)[:, None, None] & poisoned
        k, v = (jnp.where(poison, jnp.nan, x) for x in (self.k, self.v))
        options = self.masks | {"kv_length": jnp.int32(self.kv_length)}  # traced: one program for all lengths
        out, lse = selective_attention(
            self.q, k, v, self.positions, return_lse=True, implementation=implementation, **options
        )
        wanted, wanted_lse = self.reference()
        tolerance = TOLERANCE[str(self.q.dtype)]
        np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=tolerance * 4, rtol=tolerance)
        np.testing.assert_allclose(np.asarray(lse), wanted_lse, atol=tolerance * 4, rtol=tolerance)
        assert out.dtype == self.q.dtype
        assert lse.dtype == jnp.float32


@st.composite
def cases(
    draw,
    lengths=(1, 40, 300, 700),  # few, since each is compiled
    groups=((1, 1), (2, 3)),
    head_dims=(8, 80),
    dtypes=("bfloat16", "float16", "float32"),
    border=256,
) -> Case:
    """Positions with gaps, or with ties and at the borders of key blocks of `border` keys."""
    num_keys = draw(st.sampled_from(lengths))
    num_queries = draw(st.sampled_from((1, 24, num_keys)))
    kv_heads, group = draw(st.sampled_from(groups))
    head_dim = draw(st.sampled_from(head_dims))
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kv_length = draw(st.sampled_from((num_keys, max(num_keys // 2, 1), max(num_keys - 3, 1))))
    if draw(st.booleans()) and num_queries <= num_keys:
        positions = np.sort(rng.choice(num_keys, num_queries, replace=False))
    else:
        borders = [border - 1, border, 2 * border - 1, 2 * border]
        positions = np.sort(rng.choice([0, num_keys // 2, num_keys - 1, *borders], num_queries))
    starts = rng.integers(0, positions + 2) if draw(st.booleans()) else None

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return Case(
        array(num_queries, kv_heads * group, head_dim),
        array(num_keys, kv_heads, head_dim),
        array(num_keys, kv_heads, head_dim),
        jnp.asarray(positions, jnp.int32),
        None if starts is None else jnp.asarray(starts, jnp.int32),
        kv_length,
        draw(st.sampled_from((None, 1, 33))),
    )
