"""Texts that chunks can be precomputed after, so that none is computed as a text's beginning: see `Engine`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cacheblend_jax.engine.encoding import encode
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.model import Model
from cacheblend_jax.store import Store

PLAIN, NEUTRAL = "plain", "neutral"
LARGEST_SHARE = 0.25  # of the positions that a model takes: a longer text by default would leave chunks little room


def neutral_text() -> str:
    """Returns a text of about 450 tokens, in English, on nothing that people ask about: for `Engine(context=…)`."""
    return (files("cacheblend_jax.engine") / "neutral_text.txt").read_text(encoding="utf-8")


def default_context(model: Model, store: Store) -> str:
    """Returns what chunks are precomputed after by default: the text that the store remembers, or the neutral one.

    None (an empty text) for a model that cannot read the neutral text: one without a tokenizer, whose tokenizer has no
    tokens for some of its words (the bundled one), or that takes too few tokens.
    """
    if (remembered := store.remembered_context()) is not None:
        return remembered
    return neutral_text() if _reads(model, neutral_text()) else ""


def context_text(name: str) -> str:
    """Returns a context by its name: `"plain"` (none), `"neutral"` (the packaged text), or the path of a text file.

    Raises:
        CacheBlendError: the file cannot be read.
    """
    if name == PLAIN:
        return ""
    if name == NEUTRAL:
        return neutral_text()
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CacheBlendError(
            f"context {name!r} is neither {PLAIN!r}, {NEUTRAL!r} nor a readable text file: {error}"
        ) from error


def _reads(model: Model, text: str) -> bool:
    if model.tokenizer is None:
        return False
    ids = encode(model.tokenizer, text)
    return len(ids) <= LARGEST_SHARE * model.config.max_positions and model.tokenizer.unk_token_id not in ids
