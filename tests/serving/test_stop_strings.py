"""Stop strings end an answer at the same place, whatever its tokens are."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from cacheblend_jax.serving.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=12)


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    strings = StopStrings(stops)
    text = "".join(map(strings.add, pieces))
    return text + strings.rest(), strings.found


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), LETTERS, LETTERS)
@example(["bab", "a"], "bbab", "")
@example(["ba", "a"], "bb", "a")
def test_where_an_answer_ends_does_not_depend_on_its_tokens(stops, first, second):
    text = first + second
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    until = text[: ends[0]] if ends else text
    longest = max((len(stop) for stop in stops if ends and until.endswith(stop)), default=0)
    wanted = until[: len(until) - longest], bool(ends)
    for pieces in ([text], [first, second], list(text)):
        assert shown(stops, pieces) == wanted
