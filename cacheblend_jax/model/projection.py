"""Projections of rows: how layers and embedder declare theirs, and how a GPU multiplies a single row."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from cacheblend_jax.model.config import ModelConfig
from pallas_kernels.dispatch import current_target


def linear(
    config: ModelConfig, inputs: int, outputs: int, *, bias: bool, axes: tuple[str | None, str | None], rngs: nnx.Rngs
) -> nnx.Linear:
    """A projection; `axes` are the names of its inputs and outputs in `sharding.ShardingRules`."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        bias_init=nnx.initializers.normal(0.1),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        kernel_metadata={"out_sharding": axes, "eager_sharding": False},
        bias_metadata={"out_sharding": axes[1:], "eager_sharding": False},
        rngs=rngs,
    )


def multiplied(by: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """Returns `by(rows)`, the product with a matrix; on a GPU a single row is multiplied twice.

    XLA for GPUs makes the product of a single row and a small matrix a multiplication and a sum, with all that is to be
    summed in memory in between (as it did with a decoded token's keys and values); and before cuBLAS multiplies a
    single row into float32 (logits) it converts the whole matrix.
    """
    if rows.shape[0] > 1 or current_target().platform != "gpu":
        return by(rows)
    return by(jnp.concatenate([rows, rows]))[:1]
