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

# One program for all cases of equal shapes. Backends' block sizes are not in its key: they must stay as they are in one
# process, as the fixture `small_blocks` sees to.
_attend_compiled = jax.jit(selective_attention, static_argnames=("window", "soft_cap", "return_lse", "implementation"))
attend_by_reference = jax.jit(selective_attention_reference, static_argnames=("window", "scale", "soft_cap"))


def attend(*arrays, implementation: str | None = None, **options):
    """`selective_attention` of numpy or jax arrays."""
    if implementation != "mosaic_gpu":
        return _attend_compiled(*arrays, implementation=implementation, **options)
    # The warpgroups of its interpreter are threads that wait for each other: as a part of a program they starve.
    arrays, options = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x, (arrays, options)
    )
    return selective_attention(*arrays, implementation=implementation, **options)


def as_float64(x: np.ndarray) -> jax.Array:
    """Needs x64 switched on."""
    return jnp.asarray(np.asarray(x).astype(np.float64))


@dataclass(frozen=True)
class Case:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    positions: np.ndarray
    starts: np.ndarray | None
    kv_length: int
    window: int | None
    soft_cap: float | None = None
    sinks: np.ndarray | None = None

    @property
    def scores(self) -> dict:
        return {"soft_cap": self.soft_cap, "sinks": self.sinks}

    @property
    def masks(self) -> dict:
        # The length is traced: one program for all lengths.
        return {"q_starts": self.starts, "kv_length": np.int32(self.kv_length), "window": self.window}

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp in float64."""
        with jax.enable_x64(True):
            q, k, v = map(as_float64, (self.q, self.k, self.v))
            out, lse = attend_by_reference(q, k, v, self.positions, **self.masks, **self.scores)
            return np.asarray(out), np.asarray(lse)

    def check(self, implementation: str | None, *, poisoned: bool = False) -> None:
        """Compares the implementation with the reference; `poisoned`: with NaN in the keys beyond `kv_length`."""
        k, v = self.k.copy(), self.v.copy()
        if poisoned:
            k[self.kv_length :] = v[self.kv_length :] = np.nan
        options = {"return_lse": True, "implementation": implementation} | self.scores
        out, lse = attend(self.q, k, v, self.positions, **options, **self.masks)
        wanted, wanted_lse = self.reference()
        tolerance = TOLERANCE[str(self.q.dtype)]
        np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=tolerance * 4, rtol=tolerance)
        np.testing.assert_allclose(np.asarray(lse), wanted_lse, atol=tolerance * 4, rtol=tolerance)
        assert out.dtype == self.q.dtype
        assert lse.dtype == jnp.float32


@st.composite
def cases(
    draw,
    lengths,
    head_dims,
    borders,
    groups=((1, 1), (2, 3)),
    dtypes=("bfloat16", "float16", "float32"),
) -> Case:
    """Positions with gaps, or with ties and at the borders of key blocks: multiples of `borders`.

    Few `lengths` and `head_dims`, since each is compiled.
    """
    num_keys = draw(st.sampled_from(lengths))
    num_queries = draw(st.sampled_from((1, 24, num_keys)))
    kv_heads, group = draw(st.sampled_from(groups))
    head_dim = draw(st.sampled_from(head_dims))
    dtype = jnp.dtype(draw(st.sampled_from(dtypes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kv_length = draw(st.sampled_from((num_keys, max(num_keys // 2, 1), max(num_keys - 3, 1))))
    if draw(st.booleans()) and num_queries <= num_keys:
        positions = np.sort(rng.choice(num_keys, num_queries, replace=False))
    else:
        at_borders = [place for border in borders for place in (border - 1, border, 2 * border - 1, 2 * border)]
        positions = np.sort(rng.choice([0, num_keys // 2, num_keys - 1, *at_borders], num_queries))
    starts = rng.integers(0, positions + 2).astype(np.int32) if draw(st.booleans()) else None

    def array(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    return Case(
        array(num_queries, kv_heads * group, head_dim),
        array(num_keys, kv_heads, head_dim),
        array(num_keys, kv_heads, head_dim),
        positions.astype(np.int32),
        starts,
        kv_length,
        draw(st.sampled_from((None, 1, 33))),
    )
