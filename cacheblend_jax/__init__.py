"""CacheBlend for JAX: answer RAG prompts from precomputed, position-free chunk KV caches at full quality."""

from cacheblend_jax.blend import SELECTORS, BlendConfig, Evidence, Selector, register_selector
from cacheblend_jax.engine import Engine, FittedContext, Generation, PrefillResult, Prompt, neutral_text
from cacheblend_jax.errors import CacheBlendError, CheckpointError, DamagedEntryError, PromptError
from cacheblend_jax.model import KVCache, Model, Sampling, load_model
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkEntry, ChunkStore

__all__ = [
    "SELECTORS",
    "BlendConfig",
    "CacheBlendError",
    "CheckpointError",
    "ChunkEntry",
    "ChunkStore",
    "DamagedEntryError",
    "Engine",
    "Evidence",
    "FittedContext",
    "Generation",
    "KVCache",
    "Model",
    "PrefillResult",
    "Prompt",
    "PromptError",
    "Sampling",
    "Selector",
    "Trace",
    "load_model",
    "neutral_text",
    "register_selector",
]
