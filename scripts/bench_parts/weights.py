"""Random weights of any size, for what does not depend on their values."""

from __future__ import annotations

import cacheblend_jax as cb
from cacheblend_jax.model.weights_digest import SameLeaves


def random_weights(config: cb.ModelConfig) -> cb.Model:
    """A model whose weights are random, and never hashed: for large ones that takes longer than all else."""
    model = cb.model.random_model(config)
    model._hashed["fingerprint"] = (SameLeaves(model.params), "0" * 64)
    return model
