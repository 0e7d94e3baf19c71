"""Generation: decodes an answer after a prefill over a cache that grows in place, or scores a given one."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.engine.results import GenerateStats, Generation, PrefillResult
from cacheblend_jax.model.decode import Sampling, decode_step, extend, sample
from cacheblend_jax.model.kv_cache import KVCache, abstract_cache
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.rope import Angles, rope_tables

_draw = jax.jit(sample)


class TokenStream:
    """An answer as it is decoded: an iterator over `(token id, text that it adds)`, each as soon as it is known.

    A character may span tokens: its text comes with the token that completes it.

    Args:
        room: how many tokens at most, the first one included.
        stops: decoding ends before any of these.
    """

    def __init__(
        self,
        model: Model,
        buckets: Buckets,
        prefill: PrefillResult,
        *,
        room: int,
        sampling: Sampling,
        stops: Collection[int],
    ) -> None:
        self._model, self._prefill, self._stops = model, prefill, set(stops)
        self._tokens = decode(model, buckets, prefill, room, sampling)
        self._token_ids: list[int] = []
        self._text, self._finish_reason, self._decode_s = "", "length", 0.0

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
        grown = self._decoded_text()
        added, self._text = grown[len(self._text) :], grown
        return token, added

    @property
    def generation(self) -> Generation:
        """The answer so far, with its statistics."""
        decoded = max(len(self._token_ids) - 1, 0)
        per_token = self._decode_s / decoded if decoded else 0.0
        stats = GenerateStats(self._prefill.stats, decoded, per_token, self._finish_reason)
        return Generation(self._text, list(self._token_ids), stats)

    def _decoded_text(self) -> str:
        if self._model.tokenizer is None:
            return ""
        text = self._model.tokenizer.decode(self._token_ids, skip_special_tokens=True)
        return text.rstrip("\ufffd")  # a character that is not complete yet


def decode(
    model: Model, buckets: Buckets, out: PrefillResult, room: int, sampling: Sampling
) -> Generator[tuple[int, float], None, None]:
    """Yields up to `room` token ids, each with the seconds of its decoding step; the first needs no step."""
    length = out.token_ids.size
    key = None if sampling.temperature == 0 else jax.random.key(sampling.seed)

    def choose(logits: jax.Array | np.ndarray, likeliest: jax.Array | int, step: int) -> int:
        if key is None:
            return int(likeliest)
        step_key = jax.random.fold_in(key, step)
        return int(_draw(jnp.asarray(logits), step_key, sampling.temperature, sampling.top_k, sampling.top_p))

    token = choose(out.logits, out.next_token, 0)
    yield token, 0.0
    if room == 1:
        return
    size = buckets.length(length + room - 1)
    cache = jax.device_put(_resized(out.padded_cache, size), model.placement)
    angles = _angles(model, size)
    for step in range(1, room):
        began = time.perf_counter()
        logits, likeliest, cache = _decode_one(model, cache, token, length + step - 1, angles)
        token = choose(logits, likeliest, step)
        yield token, time.perf_counter() - began


def continuation_logits(model: Model, buckets: Buckets, out: PrefillResult, token_ids: np.ndarray) -> np.ndarray:
    """Returns the logits that each token of a given continuation is drawn from; see `Engine.continuation_logits`."""
    if token_ids.size == 1:
        return out.logits[None]
    size = buckets.length(out.token_ids.size + token_ids.size - 1)
    cache = jax.device_put(_resized(out.padded_cache, size), model.placement)
    arrays = model.params, cache, token_ids[:-1], np.int32(out.token_ids.size), _angles(model, size)
    after, _ = model.runner(extend, *arrays, donate=("cache",), config=model.config)
    return np.concatenate([out.logits[None], np.asarray(after)])


def warm_up_decoding(model: Model, size: int) -> None:
    """Compiles the program that decodes one token over a cache of `size` tokens."""
    _decode_one(model, abstract_cache(model.config, size, model.placement), 0, 0, _angles(model, size))


def _decode_one(model: Model, cache: KVCache, token: int, position: int, angles: Angles) -> tuple[Any, Any, KVCache]:
    arrays = model.params, cache, np.int32(token), np.int32(position), angles
    return model.runner(decode_step, *arrays, donate=("cache",), config=model.config)


def _angles(model: Model, size: int) -> Angles:
    return jax.device_put(rope_tables(model.config, size), model.placement)


@partial(jax.jit, static_argnames="size")  # else it is several programs
def _resized(cache: KVCache, size: int) -> KVCache:
    """Copies a cache into one with room for `size` tokens: decoding donates the copy, not the result's own."""
    length = min(cache.k.shape[1], size)

    def resize(x: jax.Array) -> jax.Array:
        return jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype).at[:, :length].set(x[:, :length])

    return KVCache(resize(cache.k), resize(cache.v))
