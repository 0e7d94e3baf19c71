"""Requests to simulate: when each comes, and which stored chunks it wants. Drawn from a seed, the same every time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cacheblend_jax.errors import CacheBlendError, is_whole_number

DOCUMENT_CHUNKS = 16  # neighbours in popularity, of which a request takes several


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order in which they come.

    Attributes:
        arrivals: seconds.
        chunks: of each request, the numbers of its chunks; the lower, the more popular.
    """

    arrivals: Float[np.ndarray, " requests"]
    chunks: Int[np.ndarray, "requests chunks"]

    @property
    def num_requests(self) -> int:
        """How many requests there are."""
        return self.arrivals.size


def zipf_trace(
    num_requests: int,
    *,
    num_chunks: int = 10**6,
    exponent: float = 0.9,
    chunks_per_request: int = 5,
    same_document: float = 0.5,
    requests_per_s: float = 1.0,
    seed: int = 0,
) -> Trace:
    """Draws requests that come as a Poisson process, for chunks whose popularity is Zipf's.

    Args:
        exponent: the chunk of rank n is wanted in proportion to n ** -exponent.
        same_document: the probability of each chunk but a request's first to be of the first one's document: one of 16
            chunks of neighbouring ranks. Otherwise it is drawn as the first is.

    Raises:
        CacheBlendError: a number that makes no sense; it is named.
    """
    for name, value in (("requests", num_requests), ("chunks", num_chunks), ("chunks a request", chunks_per_request)):
        if not is_whole_number(value, least=1):
            raise CacheBlendError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0 <= same_document <= 1:
        raise CacheBlendError(f"same_document must be a probability, got {same_document!r}")
    if not 0 < requests_per_s < np.inf:
        raise CacheBlendError(f"requests_per_s must be positive and finite, got {requests_per_s!r}")
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / requests_per_s, num_requests))
    chunks = zipf_keys(random, num_requests * chunks_per_request, num_chunks, exponent)
    chunks = chunks.reshape(num_requests, chunks_per_request)
    of_first = chunks[:, :1] // DOCUMENT_CHUNKS * DOCUMENT_CHUNKS + random.integers(0, DOCUMENT_CHUNKS, chunks.shape)
    together = random.random(chunks.shape) < same_document
    together[:, 0] = False
    return Trace(arrivals, np.where(together, np.minimum(of_first, num_chunks - 1), chunks))


def zipf_keys(random: np.random.Generator, count: int, num_keys: int, exponent: float) -> Int[np.ndarray, " count"]:
    """Draws `count` of the numbers 0 … `num_keys` − 1, number n in proportion to (n + 1) ** -exponent."""
    shares = np.cumsum(np.arange(1, num_keys + 1, dtype=np.float64) ** -exponent)
    return np.searchsorted(shares, random.random(count) * shares[-1]).astype(np.int64)


def with_scans(
    random: np.random.Generator, keys: Int[np.ndarray, " uses"], *, share: float = 0.3, length: int = 10_000
) -> Int[np.ndarray, " more"]:
    """Returns uses with scans among them: runs of `length` new keys, each used once, `share` of all uses in the end."""
    scans = round(share / (1 - share) * keys.size / length)
    places = np.sort(random.integers(0, keys.size, scans))
    new = int(keys.max()) + 1 + np.arange(scans * length).reshape(scans, length)
    parts = np.split(keys, places)
    mixed = [parts[0]]
    for scan, part in zip(new, parts[1:], strict=True):
        mixed += [scan, part]
    return np.concatenate(mixed)
