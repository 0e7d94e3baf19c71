"""Texts that chunks can be precomputed after, so that none is computed as a text's beginning: see `Engine`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from cacheblend_jax.errors import CacheBlendError

PLAIN, NEUTRAL = "plain", "neutral"


def neutral_text() -> str:
    """Returns a text of about 450 tokens, in English, on nothing that people ask about: for `Engine(context=…)`."""
    return (files("cacheblend_jax.engine") / "neutral_text.txt").read_text(encoding="utf-8")


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
