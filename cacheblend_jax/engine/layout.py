"""A prompt's layout, the input of a prefill: where every token stands, and which of them have stored KV."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from cacheblend_jax.choices import MODES
from cacheblend_jax.engine.prompt import TokenizedPrompt
from cacheblend_jax.engine.shared_reads import Opens
from cacheblend_jax.errors import PromptError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import cache_shape
from cacheblend_jax.store import StoredChunk, chunk_key

logger = logging.getLogger(__name__)
NO_CONTEXT = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class PlacedChunk:
    """A chunk of a prompt (or its prefix) at its place: its one record, from layout to device.

    Attributes:
        key: its key in the store.
        fingerprint: of the model that `key` was made with; KV of other weights must not be stored under it.
        context_ids: int32, the ids that its stand-alone KV is computed after.
        token_ids: int32, its own ids.
        start: position of its first token in the prompt.
        exact: whether the context is precisely what stands before it, so that stored KV needs no recomputing.
        is_prefix: whether it is the prompt's prefix.
        stored: the open handle on its KV; `None` where the store has none, or was not asked yet.
        heads: the KV heads of it that are loaded: on several hosts, those of the host's own devices; `None`: all.
    """

    key: str
    fingerprint: str
    context_ids: np.ndarray
    token_ids: np.ndarray
    start: int
    exact: bool = False
    is_prefix: bool = False
    stored: StoredChunk | None = None
    heads: range | None = None

    @property
    def num_tokens(self) -> int:
        """Its own tokens, without the context."""
        return self.token_ids.size

    def is_within(self, max_positions: int) -> bool:
        """Whether its stand-alone KV can be computed by a model of so many positions: its context takes some."""
        return self.context_ids.size + self.num_tokens <= max_positions

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.num_tokens

    @property
    def tier(self) -> str:
        """Where its stored KV is.

        Raises:
            ValueError: it has no stored KV.
        """
        return self.handle.tier

    @property
    def is_in_memory(self) -> bool:
        """Whether its stored KV lies in host memory as values, where a device may read them; raises as `tier`."""
        return self.handle.host_entry is not None and self.handle.kv_dtype is None

    @property
    def num_bytes(self) -> int:
        """Bytes of its KV as it is stored; raises as `tier`."""
        return self.handle.num_bytes

    @property
    def handle(self) -> StoredChunk:
        """The open handle on its stored KV.

        Raises:
            ValueError: it has no stored KV.
        """
        if self.stored is None:
            raise ValueError(f"chunk {self.key[:16]} at {self.start} has no stored KV")
        return self.stored


@dataclass(frozen=True, eq=False)
class Layout:
    """A prompt's tokens in place.

    Attributes:
        token_ids: int32 `[tokens]`.
        loaded: the stored chunks (and prefix) to reuse.
        missing: the chunks whose stand-alone KV must be computed and stored, each once.
        exact, candidate: bool `[tokens]`; a token that is neither is forced.
        chunk_starts: int32 `[tokens]`, position of the first token of each token's chunk; prefix and suffix count as
            chunks.
        context_length: how many of the prompt's first tokens chunks are precomputed after.
        suffix_start: position of the suffix; of the last token where there is none.
        hits, misses: how many chunks the store has, and lacks; the prefix does not count.
    """

    token_ids: np.ndarray
    loaded: list[PlacedChunk]
    missing: list[PlacedChunk]
    exact: np.ndarray
    candidate: np.ndarray
    chunk_starts: np.ndarray
    context_length: int
    suffix_start: int
    hits: int
    misses: int

    def loaded_chunks(self, prompt: TokenizedPrompt) -> tuple[bool, ...]:
        """Returns of each of the prompt's chunks, in order, whether stored KV is used for it."""
        sizes = [prompt.prefix.size, *(ids.size for ids in prompt.chunks)]
        loaded = {chunk.start for chunk in self.loaded if not chunk.is_prefix}
        return tuple(start in loaded for start in np.cumsum(sizes)[:-1].tolist())


@dataclass(frozen=True, eq=False)
class ChunkContext:
    """What an engine's chunks are precomputed after: the first tokens of the prompt's prefix, then a fixed text.

    Attributes:
        prefix_tokens: how many tokens of the prefix; `None`: all of them.
        text_ids: int32, the text: it stands in no prompt.
        embeddings: float32 `[text, hidden]`, where a fitted context takes the text's place: its ids are no tokens'.
    """

    prefix_tokens: int | None = 4
    text_ids: np.ndarray = field(default_factory=lambda: NO_CONTEXT)
    embeddings: np.ndarray | None = None

    def after(self, prefix_ids: np.ndarray) -> np.ndarray:
        """Returns the ids that the chunks of a prompt with this prefix are precomputed after."""
        return np.concatenate([self.shared_with(prefix_ids), self.text_ids])

    def embeddings_after(self, prefix_ids: np.ndarray) -> np.ndarray | None:
        """Returns what stands for the ids of `after` that are no tokens': float32 `[ids, hidden]`, zeros elsewhere."""
        if self.embeddings is None:
            return None
        before = self.shared_with(prefix_ids).size
        return np.pad(self.embeddings, ((before, 0), (0, 0)))

    def shared_with(self, prefix_ids: np.ndarray) -> np.ndarray:
        """Returns those of them that stand in the prompt, too."""
        return prefix_ids if self.prefix_tokens is None else prefix_ids[: self.prefix_tokens]


def check_mode(mode: str) -> None:
    """Raises `PromptError` where a mode is unknown."""
    if mode not in MODES:
        raise PromptError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")


def place_chunks(
    prompt: TokenizedPrompt, mode: str, *, context: ChunkContext, fingerprint: str, salt: str
) -> list[PlacedChunk]:
    """Places the prefix and the chunks that a mode looks up: `full` none, `prefix` only exact ones.

    A chunk is exact where its context is precisely the ids that stand before it: a prefix always, the first chunk where
    the context is the whole prefix.

    Raises:
        PromptError: an unknown mode.
    """
    check_mode(mode)
    if mode == "full":
        return []
    after, before = context.after(prompt.prefix), prompt.token_ids

    def place(start: int, context_ids: np.ndarray, ids: np.ndarray, is_prefix: bool) -> PlacedChunk:
        key = chunk_key(fingerprint, context_ids, ids, salt, prompt.tenant)
        exact = np.array_equal(context_ids, before[:start])
        return PlacedChunk(key, fingerprint, context_ids, ids, start, exact, is_prefix)

    chunks = [place(0, NO_CONTEXT, prompt.prefix, True)] if prompt.prefix.size else []
    start = prompt.prefix.size
    for ids in prompt.chunks:
        chunks.append(place(start, after, ids, False))
        start += ids.size
    return [chunk for chunk in chunks if chunk.exact or mode != "prefix"]


def look_up(
    chunks: Sequence[PlacedChunk], store: Opens, handles: ExitStack, config: ModelConfig
) -> tuple[list[PlacedChunk], set[str]]:
    """Opens the chunks that the store holds; `handles` closes them.

    Returns the chunks, and the keys of those whose entries are not KV of this many tokens of this model: they count as
    missing.
    """
    looked_up, unusable = [], set()
    for chunk in chunks:
        stored = store.open(chunk.key)
        if stored is not None:
            handles.enter_context(stored)
            expected = cache_shape(config, chunk.num_tokens), np.dtype(config.dtype)
            if (stored.shape, stored.dtype) == expected:
                chunk = replace(chunk, stored=stored)
            else:
                logger.warning(
                    "a stored chunk is not used: it is %s%s, expected %s%s; it is computed and stored anew",
                    stored.dtype,
                    list(stored.shape),
                    expected[1],
                    list(expected[0]),
                )
                unusable.add(chunk.key)
        looked_up.append(chunk)
    return looked_up, unusable


def lay_out(
    prompt: TokenizedPrompt, chunks: Sequence[PlacedChunk], *, context_length: int, compute: Collection[int] = ()
) -> Layout:
    """Determines whether each token is exact, a candidate, or forced (neither).

    The suffix is forced; without one, the prompt's last token is. So are stored chunks that start at a position
    in `compute`: they are not worth loading.
    """
    token_ids = prompt.token_ids
    exact, candidate = np.zeros(token_ids.size, bool), np.zeros(token_ids.size, bool)
    chunk_starts = np.zeros(token_ids.size, np.int32)
    start = prompt.prefix.size
    for ids in prompt.chunks:
        chunk_starts[start : start + ids.size] = start
        start += ids.size
    suffix_start = token_ids.size - prompt.suffix.size
    chunk_starts[suffix_start:] = suffix_start
    loaded = [chunk for chunk in chunks if chunk.stored is not None and chunk.start not in compute]
    for chunk in loaded:
        (exact if chunk.exact else candidate)[chunk.start : chunk.stop] = True
    exact[-1] = candidate[-1] = False
    return Layout(
        token_ids,
        loaded,
        list({chunk.key: chunk for chunk in chunks if chunk.stored is None}.values()),
        exact,
        candidate,
        chunk_starts,
        context_length,
        min(suffix_start, token_ids.size - 1),
        hits=sum(chunk.stored is not None and not chunk.is_prefix for chunk in chunks),
        misses=sum(chunk.stored is None and not chunk.is_prefix for chunk in chunks),
    )
