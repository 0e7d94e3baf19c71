"""How the next token is drawn: what a user says (`Sampling`), and the draw itself, inside a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from cacheblend_jax.errors import CacheBlendError, is_whole_number

HostOrDevice = Any  # a JAX array, or a NumPy number on the host


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at `temperature` 0, else from the softmax, cut by `top_k` and `top_p`.

    Attributes:
        temperature: divides the logits.
        top_k: keep the `top_k` likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens until their probabilities sum to `top_p`; 1 keeps all (arXiv 1904.09751).
        seed: the same seed draws the same tokens; below 2³².
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise CacheBlendError(f"temperature must be at least 0 and finite, got {self.temperature!r}")
        if not is_whole_number(self.top_k, least=0, below=2**31):
            raise CacheBlendError(f"top_k must be a whole number in [0, 2^31), got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise CacheBlendError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not is_whole_number(self.seed, least=0, below=2**32):
            raise CacheBlendError(f"seed must be a whole number in [0, 2^32), got {self.seed!r}")


def sample(
    logits: Float[Array, " vocab"],
    key: jax.Array,
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Int[Array, ""]:
    """Draws one token id; `temperature` must be positive, `top_k` 0 means no limit."""
    scaled = logits.astype(jnp.float32) / temperature
    order = jnp.argsort(scaled, descending=True)
    ranked = scaled[order]
    vocab_size = logits.shape[0]
    rank = jnp.arange(vocab_size, dtype=jnp.int32)
    ranked = jnp.where(rank < jnp.where(top_k == 0, vocab_size, top_k), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked)
    # A token stays unless the likelier ones reach top_p without it; the first one always stays. What
    # they sum to may be rounded to 1 long before the last.
    before = jnp.cumsum(probabilities) - probabilities
    ranked = jnp.where((before < top_p) | (rank == 0) | (jnp.asarray(top_p) >= 1), ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)].astype(jnp.int32)


@struct.dataclass
class Draw:
    """A `Sampling` as a program takes it: traced, so that one program draws in every way."""

    temperature: Float[HostOrDevice, ""]
    top_k: Int[HostOrDevice, ""]
    top_p: Float[HostOrDevice, ""]
    seed: UInt[HostOrDevice, ""]

    @classmethod
    def by(cls, sampling: Sampling) -> Draw:
        """Returns how `sampling` draws."""
        return cls(
            np.float32(sampling.temperature),
            np.int32(sampling.top_k),
            np.float32(sampling.top_p),
            np.uint32(sampling.seed),
        )


def next_token(logits: Float[Array, " vocab"], draw: Draw, number: Int[Array, ""]) -> Int[Array, ""]:
    """Draws an answer's token `number`, counted from 0 (traceable); greedily at temperature 0."""

    def drawn() -> Int[Array, ""]:
        key = jax.random.fold_in(jax.random.key(draw.seed), number)
        return sample(logits, key, draw.temperature, draw.top_k, draw.top_p)

    return lax.cond(draw.temperature > 0, drawn, lambda: jnp.argmax(logits).astype(jnp.int32))


def next_tokens(
    logits: Float[Array, "answers vocab"], draw: Draw, numbers: Int[Array, " answers"]
) -> Int[Array, " answers"]:
    """Draws a token for each of several answers, as `next_token` does for one; `draw` has one entry for each."""

    def drawn() -> Int[Array, " answers"]:  # one after another: only those that are not greedy are ranked
        return lax.map(lambda each: next_token(*each), (logits, draw, numbers))

    return lax.cond((draw.temperature > 0).any(), drawn, lambda: logits.argmax(axis=1).astype(jnp.int32))
