"""What a store holds of a prompt's chunks, before anything is computed for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.model.model import Model
from cacheblend_jax.store import Store
from cacheblend_jax.store.label import Label, label_of


@dataclass(frozen=True)
class ChunkLookup:
    """One chunk of a prompt, as it is looked up.

    Attributes:
        key: its key in the store.
        is_stored: whether the store has its KV.
        context_ids: the ids that its KV is computed after.
        label: what its KV is, or will be, called in the store.
    """

    key: str
    is_stored: bool
    context_ids: tuple[int, ...]
    label: Label


def look_up_chunks(model: Model, store: Store, chunks: Sequence[PlacedChunk]) -> list[ChunkLookup]:
    """Looks up a prompt's chunks, without its prefix. Counts no use, and reads no KV."""
    return [
        ChunkLookup(chunk.key, chunk.key in store, tuple(chunk.context_ids.tolist()), label_for(model, chunk))
        for chunk in chunks
        if not chunk.is_prefix
    ]


def label_for(model: Model, chunk: PlacedChunk) -> Label:
    """Returns the label of a chunk's KV; without a tokenizer, its text is unknown."""
    tokenizer = model.tokenizer
    text = "" if tokenizer is None else tokenizer.decode(chunk.token_ids.tolist(), skip_special_tokens=True)
    return label_of(model.name, text)
