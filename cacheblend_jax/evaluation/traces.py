"""Requests to simulate: when each comes, and which stored chunks it wants. Drawn from a seed, the same every time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

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
        chunks_per_request: different ones: what a request has already is drawn again.
        same_document: the probability of each chunk but a request's first to be of the first one's document: one of 16
            chunks of neighbouring ranks. Otherwise it is drawn as the first is.

    Raises:
        CacheBlendError: a number that makes no sense; it is named.
    """
    for name, value in (("requests", num_requests), ("chunks", num_chunks), ("chunks a request", chunks_per_request)):
        if not is_whole_number(value, least=1):
            raise CacheBlendError(f"{name} must be a whole number of at least 1, got {value!r}")
    document_chunks = min(DOCUMENT_CHUNKS, num_chunks)
    if chunks_per_request > document_chunks:
        raise CacheBlendError(
            f"chunks a request must be at most {document_chunks}, which a document has, got {chunks_per_request}"
        )
    if not 0 <= same_document <= 1:
        raise CacheBlendError(f"same_document must be a probability, got {same_document!r}")
    if not 0 < requests_per_s < np.inf:
        raise CacheBlendError(f"requests_per_s must be positive and finite, got {requests_per_s!r}")
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / requests_per_s, num_requests))
    shares = _zipf_shares(num_chunks, exponent)
    chunks = np.full((num_requests, chunks_per_request), -1, np.int64)
    chunks[:, 0] = _drawn(random, shares, num_requests)
    missing = np.argwhere(chunks < 0)
    while missing.size:
        rows, places = missing.T
        drawn = _drawn(random, shares, rows.size)
        start = np.minimum(chunks[rows, 0] // DOCUMENT_CHUNKS * DOCUMENT_CHUNKS, num_chunks - document_chunks)
        of_first = start + random.integers(0, document_chunks, rows.size)
        chunks[rows, places] = np.where(random.random(rows.size) < same_document, of_first, drawn)
        missing = np.argwhere(_is_repeated(chunks))
    return Trace(arrivals, chunks)


def _is_repeated(chunks: Int[np.ndarray, "requests chunks"]) -> Bool[np.ndarray, "requests chunks"]:
    """Returns which chunks their request has at an earlier place."""
    equal = chunks[:, :, None] == chunks[:, None, :]
    return np.tril(equal, -1).any(axis=2)


def zipf_keys(random: np.random.Generator, count: int, num_keys: int, exponent: float) -> Int[np.ndarray, " count"]:
    """Draws `count` of the numbers 0 … `num_keys` − 1, number n in proportion to (n + 1) ** -exponent."""
    return _drawn(random, _zipf_shares(num_keys, exponent), count)


def _zipf_shares(num_keys: int, exponent: float) -> Float[np.ndarray, " keys"]:
    """Returns how often any of the first keys is wanted, up to a factor."""
    return np.cumsum(np.arange(1, num_keys + 1, dtype=np.float64) ** -exponent)


def _drawn(random: np.random.Generator, shares: Float[np.ndarray, " keys"], count: int) -> Int[np.ndarray, " count"]:
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
