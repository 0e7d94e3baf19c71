"""CacheBlend for JAX: answer RAG prompts from precomputed, position-free chunk KV caches at full quality."""

from importlib import import_module
from typing import TYPE_CHECKING

from cacheblend_jax.runtime.lazy_names import imported

if TYPE_CHECKING:
    from cacheblend_jax.blend import SELECTORS, BlendConfig, Evidence, Selector, register_selector
    from cacheblend_jax.documents import BM25Retriever, read_documents, split_text
    from cacheblend_jax.engine import (
        Answer,
        Engine,
        FittedContext,
        Generation,
        PrefillResult,
        Prompt,
        Scheduler,
        SchedulerStats,
        neutral_text,
    )
    from cacheblend_jax.errors import (
        CacheBlendError,
        CheckpointError,
        DamagedEntryError,
        PromptError,
        QueueFull,
        SchedulerClosed,
    )
    from cacheblend_jax.model import KVCache, Model, Sampling, load_model
    from cacheblend_jax.runtime.trace import Trace
    from cacheblend_jax.store import ChunkEntry, ChunkStore

__all__ = [
    "SELECTORS",
    "Answer",
    "BM25Retriever",
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
    "QueueFull",
    "Sampling",
    "Scheduler",
    "SchedulerClosed",
    "SchedulerStats",
    "Selector",
    "Trace",
    "load_model",
    "neutral_text",
    "read_documents",
    "register_selector",
    "split_text",
]
# Imported when a name of theirs is first used, those that need the least first: the layers alone run without a store.
_HOMES = ("errors", "documents", "blend", "model", "runtime.trace", "store", "engine")


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return import_module(f"{__name__}.{name}")
    return imported(__name__, name, __all__, _HOMES)
