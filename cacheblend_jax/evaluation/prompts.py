"""Prompts of random token ids, for timing: what a prefill costs does not depend on what the tokens say."""

from __future__ import annotations

import numpy as np

from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.errors import CacheBlendError

CHUNKS = 8
QUESTION_TOKENS = 32


def random_prompt(
    vocab_size: int,
    tokens: int,
    *,
    chunks: int = CHUNKS,
    prefix_tokens: int = 0,
    question_tokens: int = QUESTION_TOKENS,
    seed: int = 0,
) -> Prompt:
    """Returns a prompt of random ids; the same for the same arguments.

    Args:
        tokens: in all chunks together, split as evenly as it goes.
        chunks: their number.
        prefix_tokens: before the chunks.
        question_tokens: after the chunks.

    Raises:
        CacheBlendError: fewer tokens than chunks, or a negative number of tokens.
    """
    if not 1 <= chunks <= tokens:
        raise CacheBlendError(f"tokens must be at least chunks, and chunks at least 1; got {tokens} and {chunks}")
    if min(prefix_tokens, question_tokens) < 0:
        raise CacheBlendError(
            f"prefix_tokens and question_tokens must be at least 0, got {prefix_tokens} and {question_tokens}"
        )
    rng = np.random.default_rng([tokens, seed])

    def ids(size: int) -> np.ndarray:
        return rng.integers(0, vocab_size, size).astype(np.int32)

    chunk_ids = [ids(len(part)) for part in np.array_split(np.arange(tokens), chunks)]
    return Prompt(ids(prefix_tokens), chunk_ids, ids(question_tokens))
