"""Blending cached KV with the recomputed KV of the tokens that need it."""

from cacheblend_jax.blend.config import BlendConfig
from cacheblend_jax.blend.selectors import SELECTORS, Evidence, Selector, register_selector

__all__ = ["SELECTORS", "BlendConfig", "Evidence", "Selector", "register_selector"]
