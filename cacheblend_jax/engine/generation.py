"""Generation: decodes an answer after a prefill over a cache that grows in place, or scores a given one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.engine.agreement import Alone, Together
from cacheblend_jax.engine.growing_text import GrowingText
from cacheblend_jax.engine.prompt import check_length, checked_ids
from cacheblend_jax.engine.results import Context, GenerateStats, Generation, PrefillResult
from cacheblend_jax.errors import PromptError, is_whole_number
from cacheblend_jax.model.decode import MOST_AT_ONCE, Decoded, decode_tokens, extend
from cacheblend_jax.model.decode_by_layer import (
    DecodedByLayer,
    cache_by_layer,
    compile_decoding_by_layer,
    decode_by_layer,
)
from cacheblend_jax.model.kv_cache import GrowingCache, KVCache, abstract_cache, with_room
from cacheblend_jax.model.layer_cache import CacheByLayer
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.rope import Angles, rope_tables
from cacheblend_jax.model.sampling import Draw, Sampling, next_token
from cacheblend_jax.runtime.placing import put

BLOCK_OF_HOSTS = 8  # tokens that come together where several hosts decode them, which would measure different times
BLOCK_SECONDS = 0.05  # tokens that come together come this often: fluent to a reader, and the host's share is small


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded: `Engine.generate`'s arguments of the same names.

    Raises:
        PromptError: `max_new_tokens` or `tokens_at_once` is no such whole number.
    """

    max_new_tokens: int
    sampling: Sampling | None
    stop_token_ids: Collection[int] | None
    tokens_at_once: int | None

    def __post_init__(self) -> None:
        most, at_once = self.max_new_tokens, self.tokens_at_once
        if not is_whole_number(most, least=1):
            raise PromptError(f"max_new_tokens must be a whole number of at least 1, got {most!r}")
        if at_once is not None and not is_whole_number(at_once, least=1, below=MOST_AT_ONCE + 1):
            raise PromptError(f"tokens_at_once must be None or a whole number in [1, {MOST_AT_ONCE}], got {at_once!r}")

    def asked(self) -> dict[str, object]:
        """Returns the arguments, which must be the same on all hosts."""
        stops = None if self.stop_token_ids is None else sorted(map(int, self.stop_token_ids))
        return asdict(self) | {"stop_token_ids": stops}


class TokenStream:
    """An answer as it is decoded: an iterator over `(token id, text that it adds)`.

    A character may span tokens: its text comes with the token that completes it.
    """

    def __init__(
        self, model: Model, buckets: Buckets, prefill: PrefillResult, how: Decoding, agreement: Alone | Together
    ) -> None:
        self._model, self._buckets, self._prefill, self._how = model, buckets, prefill, how
        self._agreement = agreement
        self._stops = frozenset(model.stop_token_ids if how.stop_token_ids is None else how.stop_token_ids)
        self._tokens = self._decode()
        self._token_ids: list[int] = []
        self._text = GrowingText(model.tokenizer)
        self._finish_reason, self._decode_s = "length", 0.0
        self._cache: GrowingCache | CacheByLayer | None = None
        self._num_cached = prefill.token_ids.size

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        token, seconds = next(self._tokens)
        if token in self._stops:
            self._finish_reason = "stop"
            self._tokens.close()
            raise StopIteration
        self._token_ids.append(token)
        self._decode_s += seconds
        return token, self._text.add(token)

    def to_its_end(self, on_token: Callable[[int, str], None] | None) -> Generation:
        """Decodes the rest; calls `on_token` with each token's id and the text that it adds."""
        for token, text in self:
            if on_token is not None:
                on_token(token, text)
        return self.generation

    @property
    def generation(self) -> Generation:
        """The answer so far, with its statistics."""
        decoded = max(len(self._token_ids) - 1, 0)
        per_token = self._decode_s / decoded if decoded else 0.0
        stats = GenerateStats(self._prefill.stats, decoded, per_token, self._finish_reason)
        return Generation(self._text.text, list(self._token_ids), stats)

    @property
    def context(self) -> Context:
        """The prompt and the answer so far, to be continued."""
        token_ids = np.concatenate([self._prefill.token_ids, np.asarray(self._token_ids, np.int32)])
        if self._cache is None or self._cache.is_lost:
            return replace(self._prefill.context, token_ids=token_ids)
        return Context(token_ids, self._cache, min(self._num_cached, token_ids.size))

    def _decode(self) -> Generator[tuple[int, float], None, None]:
        """Yields token ids, ending after a stop token, each with its share of its block's seconds.

        The first comes from the prefill.
        """
        model, out, how, config = self._model, self._prefill, self._how, self._model.config
        length, number = out.token_ids.size, 1
        room = min(how.max_new_tokens, config.max_positions - length + 1)
        sampling = how.sampling or Sampling()
        draw = Draw.by(sampling)
        is_greedy = sampling.temperature == 0
        token = out.next_token if is_greedy else int(model.runner(next_token, out.logits, draw, np.int32(0)))
        yield token, 0.0
        if room == 1:
            return
        is_stop = np.isin(np.arange(config.vocab_size), list(self._stops))
        size = self._buckets.length(length + room - 1)
        self._cache = _cache_to_decode(model, out.padded_cache, size)
        angles, limit = angles_of(model, size), how.tokens_at_once or 1
        while number < room:
            began = time.perf_counter()
            place, limit = length + number - 1, min(limit, room - number)
            token_ids = self._decode_block(self._cache, token, place, number, limit, is_stop, draw, angles)
            number += len(token_ids)
            self._num_cached = length + number - 1  # the last token has not run yet
            seconds = (time.perf_counter() - began) / len(token_ids)
            for token in token_ids:
                yield token, seconds
            in_time = BLOCK_OF_HOSTS if model.spans_hosts else max(int(BLOCK_SECONDS / seconds), 1)
            limit = how.tokens_at_once or in_time

    def _decode_block(self, cache: GrowingCache | CacheByLayer, *arguments: Any) -> list[int]:
        """Decodes the next tokens, up to a limit, where all hosts do."""
        with self._agreement.request():
            self._agreement.meet("an answer's next tokens")

            def run() -> Decoded | DecodedByLayer:
                return jax.block_until_ready(_decode_block(self._model, cache, *arguments))

            block = self._agreement.run(run)
            self._cache = block.cache
            return np.asarray(block.token_ids)[: int(block.num_tokens)].tolist()


def continuation_logits(
    model: Model, buckets: Buckets, out: PrefillResult, token_ids: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Returns the logits that each token of a given continuation is drawn from; see `Engine.continuation_logits`."""
    ids = checked_ids(token_ids, "the continuation", model.config.vocab_size)
    if ids.size == 0:
        raise PromptError("the continuation has no tokens")
    length = out.token_ids.size + ids.size - 1
    check_length(length, model.config.max_positions, "the prompt with its continuation")
    if ids.size == 1:
        return out.logits[None]
    size = buckets.length(length)
    cache = grown(model, out.padded_cache, size)
    arrays = model.params, cache, ids[:-1], np.int32(out.token_ids.size), angles_of(model, size)
    after, _ = model.runner(extend, *arrays, donate=("cache",), config=model.config)
    return np.concatenate([out.logits[None], np.asarray(after)])


def warm_up_decoding(model: Model, prefilled_size: int, size: int) -> None:
    """Compiles what decodes over a cache of `size` tokens, after a prefill whose cache is of `prefilled_size`."""
    config, draw = model.config, Draw.by(Sampling())
    model.runner(next_token, jax.ShapeDtypeStruct((config.vocab_size,), np.float32), draw, np.int32(0))
    cache = _cache_to_decode(model, abstract_cache(config, prefilled_size, model.cache_placement), size)
    angles = angles_of(model, size)
    if isinstance(cache, CacheByLayer):
        compile_decoding_by_layer(model.runner, model.step_params, cache, draw, angles, config=config)
    else:
        _decode_block(model, cache, 0, 0, 0, 0, np.zeros(config.vocab_size, bool), draw, angles)


def _cache_to_decode(model: Model, cache: KVCache, size: int) -> GrowingCache | CacheByLayer:
    """Copies a prefill's cache into one with room for `size` tokens, of the kind that its model decodes over."""
    return cache_by_layer(model.runner, cache, size) if model.takes_layers else grown(model, cache, size)


def grown(model: Model, cache: KVCache | GrowingCache, size: int) -> GrowingCache:
    """Copies a cache into one with room for `size` tokens: decoding donates the copy, not the result's own."""
    return model.runner(with_room, cache, num_keys=size)


def _decode_block(
    model: Model,
    cache: GrowingCache | CacheByLayer,
    token: int,
    position: int,
    number: int,
    limit: int,
    is_stop: np.ndarray,
    draw: Draw,
    angles: Angles,
) -> Decoded | DecodedByLayer:
    if isinstance(cache, CacheByLayer):
        place = token, position, number, limit
        return decode_by_layer(
            model.runner, model.step_params, cache, *place, is_stop, draw, angles, config=model.config
        )
    scalars = (np.int32(each) for each in (token, position, number, limit))
    arrays = model.params, cache, *scalars, is_stop, draw, angles
    return model.runner(decode_tokens, *arrays, donate=("cache",), config=model.config)


def angles_of(model: Model, size: int) -> Angles:
    """Returns the angles of positions 0 … size - 1, on the model's device."""
    return put(rope_tables(model.config, size), model.placement)
