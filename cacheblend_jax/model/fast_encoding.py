"""A fast tokenizer's steps without the state that transformers keeps in it, so that no thread waits for another's text.

A fast tokenizer encodes batches without holding the GIL, but whether special tokens are text is state that each of its
calls sets, which fails, or changes ids, amid another call. So there are two copies, and neither's state ever changes.
They share the tokenizer's vocabulary, and take next to no memory or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

# Where a class has its own of these, its ids are not those of the steps alone.
METHODS = ("encode", "__call__", "_encode_plus")


class FastCopies(NamedTuple):
    """Two of the package tokenizers' `Tokenizer`, each for any number of threads at a time."""

    with_controls: Any  # special tokens that a text spells out become tokens
    without_controls: Any  # they stay in pieces

    def encode(self, text: str, *, control_tokens: bool) -> list[int]:
        """Returns a text's ids, computed in the calling thread without the GIL, as a batch of one is."""
        copy = self.with_controls if control_tokens else self.without_controls
        return copy.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns each text's ids, with special tokens in pieces, computed by as many threads as there are cores."""
        return [each.ids for each in self.without_controls.encode_batch_fast(texts, add_special_tokens=False)]


def fast_copies(tokenizer: Any) -> FastCopies | None:
    """Copies a tokenizer of transformers; `None` where it is none of its fast ones, or a class has its own ways."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or any(
        getattr(kind, name) is not getattr(PreTrainedTokenizerFast, name) for name in METHODS
    ):
        return None
    splits = bool(tokenizer.split_special_tokens)
    copies = [_copy(tokenizer.backend_tokenizer, splits_special) for splits_special in (splits, True)]
    return None if None in copies else FastCopies(*copies)


def _copy(backend: Any, splits_special: bool) -> Any:
    """Returns a tokenizer of the same parts; `None` where the added tokens do not come to the same ids."""
    copy = type(backend)(backend.model)
    copy.normalizer, copy.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    added = (token for _, token in sorted(backend.get_added_tokens_decoder().items()))
    for is_special, tokens in groupby(added, lambda token: token.special):  # each call looks at all that are there
        (copy.add_special_tokens if is_special else copy.add_tokens)(list(tokens))
    copy.encode_special_tokens = splits_special
    return copy if _added(copy) == _added(backend) else None


def _added(backend: Any) -> dict[int, Any]:
    return {number: token.__getstate__() for number, token in backend.get_added_tokens_decoder().items()}
