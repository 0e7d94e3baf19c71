"""The engine: from a prompt to its blended KV cache and an answer."""

from cacheblend_jax.engine.controller import Decision
from cacheblend_jax.engine.delays import Tier, cheapest_tier
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.profile import Profile

__all__ = ["Decision", "Engine", "Profile", "Tier", "cheapest_tier"]
