"""Requests go to the server that has their chunks: by rendezvous hashing, whoever asks."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_jax.serving import chunk_weights, ranked

NAMES = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)
WEIGHTS = st.dictionaries(st.text("0123456789", min_size=1, max_size=4), st.integers(1, 1000), max_size=5)
USER = {"role": "user", "content": [{"type": "text", "text": text} for text in ("First.", "The second.", "What?")]}


def lengths(body: object) -> list[int]:
    return list(chunk_weights(json.dumps(body).encode()).values())


@given(WEIGHTS, NAMES)
def test_without_its_first_server_a_request_goes_where_it_would_have_gone_next(weights, servers):
    order = ranked(weights, servers)
    assert sorted(order) == sorted(servers)
    assert ranked(weights, list(reversed(servers))) == order
    assert ranked(weights, order[1:]) == order[1:]


def test_chunks_are_spread_and_a_new_server_moves_only_its_own():
    homes = {str(number): ranked({str(number): 1}, ["a", "b", "c"])[0] for number in range(300)}
    counts = Counter(homes.values())
    assert min(counts.values()) > 70
    later = {key: ranked({key: 1}, ["a", "b", "c", "d"])[0] for key in homes}
    moved = {key for key in homes if later[key] != homes[key]}
    assert {later[key] for key in moved} == {"d"}
    assert 45 < len(moved) < 110


def test_most_of_the_text_decides():
    servers = ["a", "b", "c"]
    home = {server: next(str(n) for n in range(99) if ranked({str(n): 1}, servers)[0] == server) for server in servers}
    assert ranked({home["a"]: 10, home["b"]: 11, home["c"]: 5}, servers)[0] == "b"
    two_of_c = [str(n) for n in range(99) if ranked({str(n): 1}, servers)[0] == "c"][:2]
    assert ranked({home["a"]: 10, **dict.fromkeys(two_of_c, 6)}, servers)[0] == "c"


def test_equal_halves_do_not_always_go_to_the_same_server():
    servers = ["a", "b"]
    of_a, of_b = ([str(n) for n in range(80) if ranked({str(n): 1}, servers)[0] == server] for server in servers)
    assert {ranked({a: 1, b: 1}, servers)[0] for a, b in zip(of_a, of_b, strict=False)} == {"a", "b"}


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({"messages": [USER]}, [6, 11]),
        ({"messages": [USER], "documents": ["Doc.", {"title": "T", "text": "Text."}]}, [4, 7, 6, 11]),
        ({"messages": [{"role": "user", "content": "What?"}]}, []),
        ({"prompt": "What?", "documents": ["Doc."]}, [4]),
        ({"chunks": ["One.", "", "Three."], "documents": ["Doc."]}, [4, 4, 6]),
        ({"chunks": ["One.", "One."]}, [4]),
        ({"messages": [{"role": "system", "content": "No user."}]}, []),
        ({"messages": 3}, []),
        ({"chunks": [3]}, []),
        ([1], []),
    ],
)
def test_a_requests_chunks_are_what_the_server_takes_for_them(body, wanted):
    assert sorted(lengths(body)) == sorted(wanted)


def test_a_body_that_is_no_json_has_no_chunks():
    assert chunk_weights(b"") == chunk_weights(b"\xff{") == {}


def test_a_chunk_is_the_same_in_every_kind_of_request():
    bodies = (
        {"chunks": ["First.", "The second."]},
        {"messages": [USER]},
        {"prompt": "x", "documents": ["The second.", "First."]},
    )
    assert len({frozenset(chunk_weights(json.dumps(body).encode())) for body in bodies}) == 1
