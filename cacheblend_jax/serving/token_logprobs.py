"""Log-probabilities of an answer's tokens, in the forms that OpenAI's two endpoints give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cacheblend_jax.engine.growing_text import INCOMPLETE
from cacheblend_jax.model.logprobs import TokenLogprobs

LEAST = -9999.0  # JSON has no infinity
WORD_START = "▁"  # SentencePiece's: decoded alone, a token loses the space that it begins with


@dataclass(frozen=True)
class ShownToken:
    """A token of an answer whose log-probabilities are sent."""

    token_id: int
    logprobs: TokenLogprobs


def chat_logprobs(tokens: Sequence[ShownToken], alternatives: int, tokenizer: Any) -> dict[str, Any]:
    """Returns `logprobs` of a choice of `/v1/chat/completions`, with so many of the likeliest tokens for each."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token_id)
        spelled = None if INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": spelled}

    content = [
        {
            **entry(token.token_id, token.logprobs.logprob),
            "top_logprobs": [entry(*each) for each in token.logprobs.likeliest[:alternatives]],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[ShownToken], alternatives: int, tokenizer: Any, offset: int
) -> dict[str, list[Any]]:
    """Returns `logprobs` of a choice of `/v1/completions`, whose tokens begin at character `offset` of the answer."""
    texts = [token_text(tokenizer, token.token_id) for token in tokens]
    offsets = [offset + sum(map(len, texts[:number])) for number in range(len(texts))]
    likeliest = [
        {token_text(tokenizer, each): max(logprob, LEAST) for each, logprob in token.logprobs.likeliest[:alternatives]}
        for token in tokens
    ]
    own = [max(token.logprobs.logprob, LEAST) for token in tokens]
    return {"tokens": texts, "token_logprobs": own, "top_logprobs": likeliest, "text_offset": offsets}


def token_text(tokenizer: Any, token_id: int) -> str:
    """Returns a token's text, by itself; of a part of a character, what stands for one that cannot be read."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    piece = tokenizer.convert_ids_to_tokens(token_id)
    starts_word = isinstance(piece, str) and piece.startswith(WORD_START) and not text.startswith(" ")
    return f" {text}" if starts_word else text
