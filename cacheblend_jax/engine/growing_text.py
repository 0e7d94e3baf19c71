"""From token ids back to text, as they come: each token's text, at a cost that does not grow with the answer."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\ufffd"  # stands for the bytes of a character that is not complete yet
WINDOW, OVERLAP = 16, 6  # tokens: what is decoded at a time, and what of it is decoded again with what follows


class GrowingText:
    """The text of an answer's tokens. Special tokens have none; nor has any, without a tokenizer.

    What a token adds may depend on those before it (a space, the rest of a character), so each is decoded with a window
    of them. The window moves on where decoding its end alone gives the end of its text: not within a character.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = ""  # of the window
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    def add(self, token_id: int) -> str:
        """Returns what a token adds; a character that spans tokens comes with the one that completes it."""
        if self._tokenizer is None:
            return ""
        self._window.append(token_id)
        decoded = self._decoded(self._window)
        # Where characters are spelled in bytes, half of one makes those before it unreadable, too: the text shrinks.
        complete = max(decoded.rstrip(INCOMPLETE), self._shown, key=len)
        added, self._shown = complete[len(self._shown) :], complete
        self._pieces.append(added)
        if len(self._window) >= WINDOW and decoded == complete:
            self._move_on(complete)
        return added

    def _move_on(self, complete: str) -> None:
        end = self._window[-OVERLAP:]
        text = self._decoded(end)
        if text and INCOMPLETE not in text and complete.endswith(text):
            self._window, self._shown = end, text

    def _decoded(self, token_ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
