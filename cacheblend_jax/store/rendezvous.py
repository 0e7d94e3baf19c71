"""Which of several servers chunks belong to, so that a request goes where its chunks are in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from hashlib import sha256
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
Server = TypeVar("Server", bound=Hashable)


def ranked(weights: Mapping[str, int], servers: Collection[str]) -> list[str]:
    """Returns servers in the order in which a request with these chunks should try them.

    Rendezvous hashing (Thaler and Ravishankar, 1998) gives each chunk to one server, the one with the highest hash of
    both, whoever asks. First comes the server with most of the request's text, next the one that would be first without
    it, and so on. So a server that goes takes its own chunks alone with it, and one that comes moves only what it gets.

    Args:
        weights: of each chunk, how much of the request it is: see `serving.chunk_weights`.
        servers: names that stay theirs, and differ.
    """
    preferred = {key: iter(sorted(servers, key=lambda server: _score(key, server), reverse=True)) for key in weights}
    together = "".join(sorted(weights))  # breaks ties, each request's another way
    order = list(in_order(weights, preferred, lambda server: _score(together, server)))
    left = set(servers).difference(order)  # where there are no chunks, all of them
    return [*order, *sorted(left, key=lambda server: _score(together, server), reverse=True)]


def in_order(
    weights: Mapping[Key, int], preferred: Mapping[Key, Iterator[Server]], score: Callable[[Server], Any]
) -> Iterator[Server]:
    """Yields servers in the order of `ranked`, however each chunk's are found; ends where those of all chunks do.

    Args:
        preferred: each chunk's servers, its first one first; they are taken as far as is needed.
        score: of servers that hold as much text, the one with the highest comes first.
    """
    first = {key: next(servers, None) for key, servers in preferred.items()}
    taken: set[Server] = set()
    while True:
        held: Counter[Server] = Counter()
        for key, server in first.items():
            if server is not None:
                held[server] += weights[key]
        if not held:
            return
        best = max(held, key=lambda server: (held[server], score(server)))
        yield best
        taken.add(best)
        for key, server in first.items():
            while server is not None and server in taken:
                server = next(preferred[key], None)
            first[key] = server


def _score(key: str, server: str) -> bytes:
    return sha256(f"{key}\n{server}".encode()).digest()
