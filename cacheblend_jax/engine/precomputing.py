"""Chunks ahead of the prompts that use them: where they would stand, and their KV computed and stored."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from cacheblend_jax.engine.agreement import Alone, Together
from cacheblend_jax.engine.background import Background
from cacheblend_jax.engine.groups import Groups
from cacheblend_jax.engine.layout import ChunkContext, PlacedChunk
from cacheblend_jax.engine.prefilling import Prefiller
from cacheblend_jax.engine.prompt import Prompt, TextOrIds, check_length, tokenize_parts
from cacheblend_jax.engine.results import StoredKeys
from cacheblend_jax.model.model import Model
from cacheblend_jax.store import Store

logger = logging.getLogger(__name__)


def place_ahead(
    prompt: Prompt | Sequence[TextOrIds], prefix: TextOrIds, prefiller: Prefiller, context: ChunkContext, model: Model
) -> list[PlacedChunk]:
    """Places a prompt's chunks, or chunks to be used after `prefix`, whose number is not limited.

    Raises:
        PromptError: invalid text or ids; the prefix, or a chunk with what it is computed after, is longer than the
            model takes.
    """
    most = model.config.max_positions
    if isinstance(prompt, Prompt):
        tokenized = prefiller.tokenize(prompt)
    else:
        alone = Prompt(prefix, prompt, np.zeros(0, np.int32))
        tokenized = tokenize_parts(alone, model.tokenizer, model.config.vocab_size)
    before = context.after(tokenized.prefix)
    check_length(tokenized.prefix.size, most, "the prefix")
    for i, ids in enumerate(tokenized.chunks):
        check_length(before.size + ids.size, most, f"chunk {i} with its context")
    return prefiller.place(tokenized, "blend")


def store_ahead(
    chunks: Sequence[PlacedChunk],
    store: Store,
    groups: Groups,
    background: Background,
    progress: Callable[[int, int], None] | None,
    agreement: Alone | Together,
) -> StoredKeys:
    """Computes and stores those chunks that are not stored; see `Engine.precompute`."""
    done, counting = itertools.count(1), threading.Lock()

    def store_alike(alike: Sequence[PlacedChunk]) -> None:
        chunk = alike[0]
        background.wait_for([chunk.key])
        with agreement.request():
            if agreement.lack(chunk.key, store):
                entry = groups.standalone(chunk)
                if agreement.writes and chunk.key not in store:
                    # No request has used it yet: it is evicted before entries that were used.
                    store.put(chunk.key, entry, wait=True, uses=0)
        if progress is not None:
            with counting:
                for _ in alike:
                    progress(next(done), len(chunks))

    by_key: dict[str, list[PlacedChunk]] = {}
    for chunk in chunks:
        by_key.setdefault(chunk.key, []).append(chunk)
    store.renew(by_key)  # lest what is found go for what is missing
    groups.each(store_alike, list(by_key.values()))
    if not agreement.is_alone:
        background.flush_on_all()  # for hosts that share a directory to find them there
    keys = [chunk.key for chunk in chunks if not chunk.is_prefix]
    stored = StoredKeys(keys, [key in store for key in keys])
    if stored.unstored:
        logger.warning(
            "%d of %d chunks are not stored: the store has no room for them; raise its host_bytes or disk_bytes",
            len(stored.unstored),
            len(keys),
        )
    return stored
