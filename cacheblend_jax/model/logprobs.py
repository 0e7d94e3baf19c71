"""Log-probabilities of an answer's tokens, and of the likeliest ones in their places, on the device and on the host."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

MOST_ALTERNATIVES = 20  # as many as OpenAI's clients may ask for


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, before any temperature, and which were likeliest in its place.

    Attributes:
        logprob: of the token itself.
        likeliest: token ids with their log-probabilities, the likeliest first.
    """

    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@struct.dataclass
class LogprobRows:
    """What `TokenLogprobs` is of, on the device, for tokens of any arrangement; `MOST_ALTERNATIVES` for each."""

    logprob: Float[Array, "*tokens"]
    ids: Int[Array, "*tokens alternatives"]
    logprobs: Float[Array, "*tokens alternatives"]

    @classmethod
    def of(cls, logits: Float[Array, "answers vocab"], token_ids: Int[Array, " answers"]) -> LogprobRows:
        """Returns those of each answer's token (traceable)."""
        all_of_them = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        own = jnp.take_along_axis(all_of_them, token_ids[:, None], axis=-1)[:, 0]
        likeliest, ids = lax.top_k(all_of_them, min(MOST_ALTERNATIVES, logits.shape[-1]))
        return cls(own, ids.astype(jnp.int32), likeliest)

    @classmethod
    def empty(cls, steps: int, answers: int, vocab_size: int) -> LogprobRows:
        """Returns rows of zeros (traceable)."""
        shape = steps, answers, min(MOST_ALTERNATIVES, vocab_size)
        return cls(jnp.zeros(shape[:2]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))

    def with_row(self, step: Int[Array, ""], row: LogprobRows) -> LogprobRows:
        """Returns them with one step's replaced (traceable)."""
        return jax.tree.map(lambda rows, new: rows.at[step].set(new), self, row)

    def of_token(self, step: int, answer: int) -> TokenLogprobs:
        """Returns one token's, from rows that were brought to the host."""
        ids, logprobs = self.ids[step, answer].tolist(), self.logprobs[step, answer].tolist()
        return TokenLogprobs(float(self.logprob[step, answer]), tuple(zip(ids, logprobs, strict=True)))


def logprobs_of(logits: Float[np.ndarray, " vocab"], token_id: int) -> TokenLogprobs:
    """Returns a token's, from logits on the host: the first token of an answer has them from its prefill."""
    shifted = logits.astype(np.float64) - float(logits.max())
    all_of_them = shifted - np.log(np.exp(shifted).sum())
    order = np.argsort(-logits, kind="stable")[:MOST_ALTERNATIVES]
    likeliest = tuple((int(each), float(all_of_them[each])) for each in order)
    return TokenLogprobs(float(all_of_them[token_id]), likeliest)
