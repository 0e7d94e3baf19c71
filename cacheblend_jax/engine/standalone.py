"""Stand-alone KV: computes a chunk's after its context alone, for the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np

from cacheblend_jax.blend.buckets import Buckets, buckets_up_to
from cacheblend_jax.blend.layer_step import PromptSequence
from cacheblend_jax.blend.resident import standalone
from cacheblend_jax.engine.chunk_lookup import label_for
from cacheblend_jax.engine.generation import angles_of
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.kv_cache import KVCache, abstract_cache
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.quantised_kv import key_biases
from cacheblend_jax.runtime.placing import on_host
from cacheblend_jax.store import ChunkEntry

# Tokens. A shorter context is computed anew with each chunk: that is faster than blending its KV in.
SHARED_CONTEXT = 64


class Standalone:
    """Computes the stand-alone KV of a model's chunks, in any number of threads.

    Args:
        context_embeddings: of a fitted context, see `ChunkContext`.
    """

    def __init__(self, model: Model, buckets: Buckets, context_embeddings: np.ndarray | None) -> None:
        self._model, self._buckets, self._context_embeddings = model, buckets, context_embeddings
        self._shared_context: tuple[Hashable, KVCache] | None = None
        self._sharing = threading.Lock()

    def entry(self, chunk: PlacedChunk) -> ChunkEntry:
        """Computes a chunk's KV after its context alone.

        Raises:
            CacheBlendError: the weights are no longer those that the chunk's key was made with.
        """
        model, context_ids = self._model, chunk.context_ids
        if _is_shared(context_ids.size):
            begin = 0
            kv = self._kv_of(chunk.token_ids, self._context_kv(context_ids, chunk.fingerprint), context_ids.size)
        else:
            begin = context_ids.size
            kv = self._kv_of(np.concatenate([context_ids, chunk.token_ids]))
        k, v = (np.ascontiguousarray(on_host(x)[:, begin : begin + chunk.num_tokens]) for x in (kv.k, kv.v))
        if model.fingerprint != chunk.fingerprint:
            raise CacheBlendError("the model's weights changed while a chunk waited to be stored; it is not stored")
        origin = chunk.fingerprint, tuple(context_ids.tolist()), label_for(model, chunk)
        k_offset = key_biases(model.params, model.config)
        return ChunkEntry(k, v, *origin, k_offset=k_offset).hand_over()

    def sizes(self, context_tokens: int, chunk_tokens: int) -> set[tuple[int, int]]:
        """Returns what `warm_up` takes for chunks of up to `chunk_tokens` tokens after such a context."""
        length, most = self._buckets.length, self._model.config.max_positions
        if not _is_shared(context_tokens):
            return {(0, size) for size in buckets_up_to(length, min(context_tokens + chunk_tokens, most))}
        sizes = buckets_up_to(length, min(chunk_tokens, most - context_tokens))
        return {(0, length(context_tokens)), *((context_tokens, size) for size in sizes)}

    def sizes_of(self, chunks: Iterable[PlacedChunk]) -> set[tuple[int, int]]:
        """Returns what `warm_up` takes for these chunks."""
        length, sizes = self._buckets.length, set()
        for chunk in chunks:
            context = chunk.context_ids.size
            if _is_shared(context):
                sizes |= {(0, length(context)), (context, length(chunk.num_tokens))}
            else:
                sizes.add((0, length(context + chunk.num_tokens)))
        return sizes

    def warm_up(self, shared_tokens: int, size: int) -> None:
        """Compiles the program that computes stand-alone KV, padded to `size` tokens.

        Args:
            shared_tokens: tokens of a context whose own KV is there already; 0 for none.
        """
        no_tokens, context, rows = np.zeros(size, np.int32), None, 0
        if shared_tokens:
            rows = self._buckets.length(shared_tokens)
            context = abstract_cache(self._model.config, rows, self._model.cache_placement)
        name = (standalone, rows, size, self._context_embeddings is None)  # engines of one model share a runner
        self._model.runner.prepare(name, lambda run: self._run(run, no_tokens, 0, context, shared_tokens))

    def _kv_of(self, token_ids: np.ndarray, context: KVCache | None = None, context_length: int = 0) -> KVCache:
        padded = np.zeros(self._buckets.length(token_ids.size), np.int32)
        padded[: token_ids.size] = token_ids
        return self._run(self._model.runner, padded, token_ids.size, context, context_length)

    def _context_kv(self, context_ids: np.ndarray, fingerprint: str) -> KVCache:
        """Returns a context's own KV, on the device; the one used last is kept, since most chunks have the same."""
        name = fingerprint, context_ids.tobytes()
        with self._sharing:  # also while it is computed: who wants the same waits for it
            shared = self._shared_context
            if shared is None or shared[0] != name:
                shared = self._shared_context = (name, self._kv_of(context_ids))
            return shared[1]

    def _run(
        self,
        run: Callable[..., Any],
        padded_ids: np.ndarray,
        length: int,
        context: KVCache | None = None,
        context_length: int = 0,
    ) -> KVCache:
        rows = 0 if context is None else context.k.shape[1]
        angles = angles_of(self._model, rows + padded_ids.size)
        sequence = PromptSequence(np.asarray(context_length + length, np.int32), angles)
        start = np.asarray(context_length, np.int32)
        embeddings = self._embeddings_of(padded_ids) if context is None else None
        arrays = (self._model.params, padded_ids, context, start, sequence, embeddings)
        return run(standalone, *arrays, config=self._model.config)

    def _embeddings_of(self, padded_ids: np.ndarray) -> np.ndarray | None:
        """Returns what stands for the negative ids among a context's: its fitted embeddings, which come in a row."""
        if self._context_embeddings is None:
            return None
        rows = np.zeros((padded_ids.size, self._model.config.hidden_size), np.float32)
        if (fitted := padded_ids < 0).any():
            rows[fitted] = self._context_embeddings
        return rows


def _is_shared(context_tokens: int) -> bool:
    return context_tokens >= SHARED_CONTEXT
