"""Which of several servers a request is best sent to: the one that has its chunks in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from hashlib import sha256

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.serving.errors import ApiError
from cacheblend_jax.serving.fields import parsed_json
from cacheblend_jax.serving.options import ServingOptions
from cacheblend_jax.serving.requests import RequestReader


def chunk_weights(body: bytes) -> dict[str, int]:
    """Returns the chunks in a request's body: of each the SHA-256 of its text, and its length in characters.

    Bodies without chunks have none, nor have those that make no sense: whoever answers them says why.
    """
    reader = RequestReader(ServingOptions(), None, BlendConfig())
    try:
        texts = reader.chunk_texts(parsed_json(body))
    except (ApiError, CacheBlendError):
        return {}
    return {sha256(text.encode()).hexdigest(): len(text) for text in texts}


def ranked(weights: Mapping[str, int], servers: Collection[str]) -> list[str]:
    """Returns servers in the order in which a request with these chunks should try them.

    Rendezvous hashing (Thaler and Ravishankar, 1998) gives each chunk to one server, the one with the highest hash of
    both, whoever asks. First comes the server with most of the request's text, next the one that would be first without
    it, and so on. So a server that goes takes its own chunks alone with it, and one that comes moves only what it gets.

    Args:
        weights: see `chunk_weights`.
        servers: names that stay theirs, and differ.
    """
    preferred = {key: sorted(servers, key=lambda server: _score(key, server)) for key in weights}
    together = "".join(sorted(weights))  # breaks ties, each request's another way
    left, order = set(servers), []
    while left:
        held: Counter[str] = Counter()
        for key, best_last in preferred.items():
            held[best_last[-1]] += weights[key]
        first = max(left, key=lambda server: (held[server], _score(together, server)))
        order.append(first)
        left.remove(first)
        for best_last in preferred.values():
            best_last.remove(first)
    return order


def _score(key: str, server: str) -> bytes:
    return sha256(f"{key}\n{server}".encode()).digest()
