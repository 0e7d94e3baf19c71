"""CacheBlend for JAX: answer RAG prompts from precomputed, position-free chunk KV caches at full quality."""

from cacheblend_jax.blend import SELECTORS, BlendConfig, Evidence, register_selector
from cacheblend_jax.engine.controller import AutoBlend, Decision, Tier, cheapest_tier
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.profile import Profile
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.engine.results import Generation, KVCache, PrefillResult
from cacheblend_jax.errors import CacheBlendError, CheckpointError, DamagedEntryError, PromptError
from cacheblend_jax.model import Model, ModelConfig, load_model, random_model
from cacheblend_jax.model.decode import Sampling
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkEntry, ChunkStore, StoredChunk, StoreStats, ThrottledStore

__all__ = [
    "SELECTORS",
    "AutoBlend",
    "BlendConfig",
    "CacheBlendError",
    "CheckpointError",
    "ChunkEntry",
    "ChunkStore",
    "DamagedEntryError",
    "Decision",
    "Engine",
    "Evidence",
    "Generation",
    "KVCache",
    "Model",
    "ModelConfig",
    "PrefillResult",
    "Profile",
    "Prompt",
    "PromptError",
    "Sampling",
    "StoreStats",
    "StoredChunk",
    "ThrottledStore",
    "Tier",
    "Trace",
    "cheapest_tier",
    "load_model",
    "random_model",
    "register_selector",
]
