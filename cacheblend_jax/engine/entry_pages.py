"""Entries that a device reads where they lie in host memory: cut into pages, whose rows it places into the cache.

A layer of a prompt is spread over the entries of its chunks. To send it from there by itself would take two small
transfers for each chunk; to put it together in host memory first takes the host longer than the link takes. So entries
are cut, across their layers, into pages of a few megabytes, and programs place the rows of a page where they belong in
the blended cache, which holds stored KV until each layer's step makes it blended KV.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.store import ChunkEntry

PAGE_BYTES = 2**23  # of K, and of V: a transfer takes Python 65 us, in which the link moves 3.5 MB
PAGES_TOGETHER = 8  # that a program places
MOST_SENT = 1.5  # times what is stored: beyond that, too many entries are much smaller than a page

PageKV = tuple[Shaped[Array, "rows kv_heads head_dim"], Shaped[Array, "rows kv_heads head_dim"]]  # on the device


class Page(NamedTuple):
    """Some of an entry's rows, one after another across its layers; a row is one token's K, or V, in one layer.

    Attributes:
        first: the row that it begins with.
        placed_from: the first row that is placed; those before are not wanted, or in the page before.
        start: position of the chunk's first token in the prompt.
    """

    entry: ChunkEntry
    first: int
    placed_from: int
    start: int

    @property
    def layer(self) -> int:
        """The first layer that it has rows for."""
        return self.placed_from // self.entry.num_tokens

    def is_copied(self, count: int) -> bool:
        """Whether its entry has fewer rows than a page, so that it is copied into one."""
        return self.entry.k.shape[0] * self.entry.num_tokens < count

    @property
    def place(self) -> tuple[int, int, int, int]:
        """What `place_pages` is told of it."""
        return self.first, self.placed_from, self.entry.num_tokens, self.start

    def rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns that many rows of K and of V, each `[rows, kv_heads, head_dim]`: views, but of a smaller entry."""
        k, v = (_rows(x.reshape(-1, *x.shape[2:]), self.first, count) for x in (self.entry.k, self.entry.v))
        return k, v


def _rows(of: np.ndarray, first: int, count: int) -> np.ndarray:
    if len(of) >= count:
        return of[first : first + count]
    padded = np.zeros((count, *of.shape[1:]), of.dtype)
    padded[: len(of)] = of
    return padded


def page_rows(config: ModelConfig) -> int:
    """Returns the rows of a page."""
    return max(1, PAGE_BYTES // (config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize))


def are_worth_sending(pages: int, rows: int, wanted_rows: int) -> bool:
    """Returns whether so many pages, of so many rows each, hold few that are not wanted; one page more may."""
    return pages * rows <= MOST_SENT * wanted_rows + rows


def cut_into_pages(
    chunks: Sequence[PlacedChunk], config: ModelConfig, first_layer: int, kept: Collection[int] = ()
) -> list[Page] | None:
    """Returns pages with the layers of chunks that a prefill reads, by the layers that need them first.

    `None` where they are not worth it, or a chunk is not in host memory as the cache is to hold it.

    Args:
        first_layer: the first one that is read; of exact chunks, all are.
        kept: layers that are not wanted.
    """
    rows, pages, wanted_rows = page_rows(config), list[Page](), 0
    for chunk in chunks:
        entry, shape = chunk.handle.host_entry, (chunk.num_tokens, config.num_kv_heads, config.head_dim)
        if entry is None or chunk.heads is not None or entry.scales is not None:
            return None
        if entry.k.shape != (config.num_layers, *shape) or entry.k.dtype != jnp.dtype(config.dtype):
            return None  # reading it says what is wrong
        layers = [layer for layer in range(0 if chunk.exact else first_layer, config.num_layers) if layer not in kept]
        pages += _cut(chunk, entry, rows, layers)
        wanted_rows += len(layers) * chunk.num_tokens
    if not are_worth_sending(len(pages), rows, wanted_rows):
        return None
    return sorted(pages, key=lambda page: page.layer)


def _cut(chunk: PlacedChunk, entry: ChunkEntry, rows: int, layers: Sequence[int]) -> Iterator[Page]:
    tokens, all_rows, placed = entry.num_tokens, entry.k.shape[0] * entry.num_tokens, 0
    for layer in layers:
        placed = max(placed, layer * tokens)
        while placed < (layer + 1) * tokens:
            first = max(0, min(placed, all_rows - rows))
            yield Page(entry, first, placed, chunk.start)
            placed = first + rows


def places_of(pages: Sequence[Page], num_keys: int) -> Int[np.ndarray, "pages 4"]:
    """Returns what `place_pages` is told of `PAGES_TOGETHER` pages: of these, and of none in the place of others."""
    nowhere = [(0, 0, 0, num_keys)] * (PAGES_TOGETHER - len(pages))
    return np.array([*(page.place for page in pages), *nowhere], np.int32)


def place_pages(cache: KVCache, pages: Sequence[PageKV], places: Int[Array, "pages 4"]) -> KVCache:
    """Returns a cache with the rows of pages in their places (traceable)."""
    num_layers, num_keys = cache.k.shape[:2]

    def keys_of(page: PageKV, place: Int[Array, "4"]) -> Int[Array, " rows"]:
        """Returns which of all layers' keys each row of a page becomes; one beyond the last where it is not placed."""
        first, placed_from, tokens, start = place
        number = jnp.arange(page[0].shape[0], dtype=jnp.int32)
        row, tokens_or_one = first + number, jnp.maximum(tokens, 1)
        key = row // tokens_or_one * num_keys + start + row % tokens_or_one
        is_placed = (row >= placed_from) & (row < num_layers * tokens)
        return jnp.where(is_placed, key, num_layers * num_keys + number)

    def placed(stack: Shaped[Array, "layers keys ..."], parts: Sequence[Shaped[Array, "rows ..."]]) -> jax.Array:
        flat = stack.reshape(-1, *stack.shape[2:])
        for part, at in zip(parts, keys, strict=True):
            flat = flat.at[at].set(part, mode="drop", unique_indices=True)
        return flat.reshape(stack.shape)

    keys = [keys_of(page, place) for page, place in zip(pages, places, strict=True)]
    return KVCache(placed(cache.k, [k for k, _ in pages]), placed(cache.v, [v for _, v in pages]))
