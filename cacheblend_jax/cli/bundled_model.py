"""The bundled model knows a few hundred words: refuses, or warns, where it would be given others to read."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cacheblend_jax.cli.options import print_warning
from cacheblend_jax.engine.prompt import encode
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model import Model
from cacheblend_jax.model.demo import demo_directory

WORD = re.compile(r"\w+")
NAMED_WORDS = 3


def check_reads(model: Model, texts: Iterable[str], named: str | None) -> None:
    """Checks that a model can read texts: only the bundled one may be unable to.

    Where the user has named it, a warning is printed instead of an error.

    Args:
        named: the model that the user has named; `None`: the default was taken.

    Raises:
        CacheBlendError: the default was taken, and the texts have words that it does not know.
    """
    if model.directory != demo_directory():
        return
    unknown = unknown_words(model, texts)
    if not unknown:
        return
    reason = f"the bundled model knows only the records that it was trained on, and none of {', '.join(unknown)}"
    if named is None:
        raise CacheBlendError(f"{reason}; name a model of your own: --model DIR_OR_HUB_ID")
    print_warning(f"{reason}; its answers mean nothing (--model names another)")


def unknown_words(model: Model, texts: Iterable[str], limit: int = NAMED_WORDS) -> list[str]:
    """Returns the first words of texts that a model's tokenizer has no tokens for, quoted; at most `limit` of them."""
    tokenizer, seen, unknown = model.tokenizer, set[str](), list[str]()
    for text in texts:
        for word in WORD.findall(text):
            if word in seen:
                continue
            seen.add(word)
            if tokenizer.unk_token_id in encode(tokenizer, word):
                unknown.append(repr(word))
                if len(unknown) == limit:
                    return unknown
    return unknown
