"""Where every token of a prompt stands, and which of them the store already knows: the input of a prefill."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacheblend_jax.engine.prompt import TokenizedPrompt
from cacheblend_jax.errors import PromptError
from cacheblend_jax.store import StoredChunk, chunk_key

MODES = ("full", "prefix", "reuse", "blend")
NO_CONTEXT = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Missing:
    """A chunk (or prefix) whose stand-alone KV is to be computed, and the context it is computed after.

    `fingerprint` is the model's that its key was made with: the KV of other weights must not be stored under it.
    """

    key: str
    fingerprint: str
    context_ids: np.ndarray
    token_ids: np.ndarray


@dataclass(frozen=True)
class Span:
    """A prefix or chunk at its place, and what is computed where it is missing."""

    start: int
    missing: Missing
    exact: bool
    is_prefix: bool

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.missing.token_ids.size


@dataclass(frozen=True)
class Found:
    """What the store holds of a span: an open handle, or nothing."""

    span: Span
    chunk: StoredChunk | None


@dataclass(frozen=True)
class Layout:
    """A prompt's tokens in place. `loaded` are the chunks to reuse; masks and starts are `[tokens]`."""

    token_ids: np.ndarray
    loaded: list[tuple[Span, StoredChunk]]
    to_store: list[Missing]
    exact: np.ndarray
    candidate: np.ndarray
    chunk_starts: np.ndarray
    context_length: int
    suffix_start: int
    hits: int
    misses: int


def context_of(prefix_ids: np.ndarray, context_tokens: int | None) -> np.ndarray:
    """Returns the ids that chunks are precomputed after: the first `context_tokens` of the prefix, or all (`None`)."""
    return prefix_ids if context_tokens is None else prefix_ids[:context_tokens]


def spans_of(
    prompt: TokenizedPrompt, mode: str, *, context_tokens: int | None, fingerprint: str, salt: str
) -> list[Span]:
    """Lays out the prefix and the chunks that a mode looks up: `full` none, `prefix` only exact ones.

    A span is exact where its context is precisely the ids that stand before it: a prefix always, the first chunk where
    the context is the whole prefix.

    Raises:
        PromptError: an unknown mode.
    """
    if mode not in MODES:
        raise PromptError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "full":
        return []
    context = context_of(prompt.prefix, context_tokens)

    def span(start: int, context_ids: np.ndarray, ids: np.ndarray, is_prefix: bool) -> Span:
        missing = Missing(chunk_key(fingerprint, context_ids, ids, salt), fingerprint, context_ids, ids)
        return Span(start, missing, exact=context_ids.size == start, is_prefix=is_prefix)

    spans = [span(0, NO_CONTEXT, prompt.prefix, True)] if prompt.prefix.size else []
    start = prompt.prefix.size
    for chunk in prompt.chunks:
        spans.append(span(start, context, chunk, False))
        start += chunk.size
    return [span for span in spans if span.exact or mode != "prefix"]


def look_up(spans: Sequence[Span], store: Any, handles: ExitStack, *, lost: Collection[str] = ()) -> list[Found]:
    """Opens what the store holds of the spans, in `handles`.

    Entries whose keys are among `lost` (could not be read a moment ago) count as missing.
    """
    found = []
    for span in spans:
        chunk = None if span.missing.key in lost else store.open(span.missing.key)
        found.append(Found(span, None if chunk is None else handles.enter_context(chunk)))
    return found


def lay_out(
    prompt: TokenizedPrompt, found: Sequence[Found], *, context_length: int, compute: Collection[int] = ()
) -> Layout:
    """Says of every token whether it is exact, a candidate, or forced (neither).

    The suffix is forced; without one, the prompt's last token is. So are the spans that start at a position in
    `compute`: stored, but not worth loading.
    """
    token_ids = prompt.token_ids
    exact, candidate = np.zeros(token_ids.size, bool), np.zeros(token_ids.size, bool)
    chunk_starts = np.zeros(token_ids.size, np.int32)
    start = prompt.prefix.size
    for chunk in prompt.chunks:
        chunk_starts[start : start + chunk.size] = start
        start += chunk.size
    loaded, to_store, hits, misses = [], {}, 0, 0
    for each in found:
        span = each.span
        if each.chunk is None:
            to_store[span.missing.key] = span.missing
        elif span.start not in compute:
            loaded.append((span, each.chunk))
            (exact if span.exact else candidate)[span.start : span.stop] = True
        hits += each.chunk is not None and not span.is_prefix
        misses += each.chunk is None and not span.is_prefix
    suffix_start = token_ids.size - prompt.suffix.size
    chunk_starts[suffix_start:] = suffix_start
    exact[-1] = candidate[-1] = False
    return Layout(
        token_ids,
        loaded,
        list(to_store.values()),
        exact,
        candidate,
        chunk_starts,
        context_length,
        min(suffix_start, token_ids.size - 1),
        hits,
        misses,
    )
