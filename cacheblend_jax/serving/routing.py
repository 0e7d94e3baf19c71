"""What a request is routed by: its chunks. Which server they belong to: `store.rendezvous`."""

from __future__ import annotations

from hashlib import sha256

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.serving.errors import ApiError
from cacheblend_jax.serving.fields import parsed_json
from cacheblend_jax.serving.options import ServingOptions
from cacheblend_jax.serving.requests import RequestReader
from cacheblend_jax.store.rendezvous import ranked

__all__ = ["chunk_weights", "ranked"]


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
