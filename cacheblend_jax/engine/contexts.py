"""Texts that chunks can be precomputed after, so that none is computed as a text's beginning: see `Engine`."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from cacheblend_jax.choices import FITTED_SUFFIX, NEUTRAL, PLAIN
from cacheblend_jax.engine.fitted_context import FittedContext
from cacheblend_jax.engine.layout import ChunkContext
from cacheblend_jax.engine.prompt import TextOrIds, check_length, ids_of
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.encoding import encode
from cacheblend_jax.model.model import Model
from cacheblend_jax.store import Store

PACKAGED = files("cacheblend_jax.engine") / "fitted"
LARGEST_SHARE = 0.25  # of the positions that a model takes: a longer text by default would leave chunks little room


def neutral_text() -> str:
    """Returns a text of about 450 tokens, in English, on nothing that people ask about: for `Engine(context=…)`."""
    return (files("cacheblend_jax.engine") / "neutral_text.txt").read_text(encoding="utf-8")


def default_context(model: Model, store: Store) -> str | FittedContext:
    """Returns what chunks are precomputed after by default.

    That is the text that the store remembers; else a packaged context that was fitted to the model (SmolLM2 has one);
    else the neutral text; none (an empty text) for a model that cannot read it: one without a tokenizer, whose
    tokenizer has no tokens for some of its words (the bundled one), or that takes too few tokens.
    """
    if (remembered := store.remembered_context()) is not None:
        return remembered
    for packaged in PACKAGED.iterdir():
        with as_file(packaged) as path:
            if packaged.name.endswith(FITTED_SUFFIX) and (context := FittedContext.load(path)).fits(model):
                return context
    return neutral_text() if _reads(model, neutral_text()) else ""


def named_context(name: str) -> str | FittedContext:
    """Returns a context by its name: `"plain"` (none), `"neutral"` (the packaged text), or the path of a file.

    A file is text, or, where its name ends in `.safetensors`, a fitted context.

    Raises:
        CacheBlendError: the file cannot be read.
    """
    if name.endswith(FITTED_SUFFIX):
        return FittedContext.load(name)
    if name == PLAIN:
        return ""
    if name == NEUTRAL:
        return neutral_text()
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CacheBlendError(
            f"context {name!r} is neither {PLAIN!r}, {NEUTRAL!r} nor a readable file: {error}"
        ) from error


def chunk_context(context: TextOrIds | FittedContext, context_tokens: int | None, model: Model) -> ChunkContext:
    """Returns what chunks are precomputed after, where so many of the prefix's tokens and a context stand before them.

    Raises:
        PromptError: the context is no text and no ids, or leaves no room for a chunk.
        CacheBlendError: it was fitted to another model.
    """
    if isinstance(context, FittedContext):
        context.check(model)
        chosen = ChunkContext(context_tokens, context.token_ids, context.embeddings)
    else:
        ids = ids_of(context, "context", model.tokenizer, model.config.vocab_size)
        chosen = ChunkContext(context_tokens, ids)
    least = (context_tokens or 0) + chosen.text_ids.size + 1
    check_length(least, model.config.max_positions, "the context with a chunk")
    return chosen


def _reads(model: Model, text: str) -> bool:
    if model.tokenizer is None:
        return False
    ids = encode(model.tokenizer, text)
    return len(ids) <= LARGEST_SHARE * model.config.max_positions and model.tokenizer.unk_token_id not in ids
