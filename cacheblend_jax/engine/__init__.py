"""The engine: from a prompt to its blended KV cache and an answer."""

from cacheblend_jax.engine.engine import Engine

__all__ = ["Engine"]
