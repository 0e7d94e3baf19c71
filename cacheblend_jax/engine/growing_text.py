"""From token ids back to text, as they come: each token's text, at a cost that does not grow with the answer."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\ufffd"  # stands for the bytes of a character that is not complete yet
WINDOW, OVERLAP = 16, 6  # tokens: what is decoded at a time, and what of it is decoded again with what follows
LONGEST_CHARACTER = 4  # tokens: bytes in UTF-8
LIMIT = 64  # tokens of a window: bytes at its end, which are no character by then, no longer wait for their rest


class GrowingText:
    """The text of an answer's tokens. Special tokens have none; nor has any, without a tokenizer.

    What a token adds may depend on those before it (a space, the rest of a character), so each is decoded with a window
    of them. The window moves on where decoding its end alone gives the end of its text: not within a character, unless
    there is no end of one for `LIMIT` tokens.
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
        if not added and self._is_special(token_id):
            self._window.pop()
        elif len(self._window) >= WINDOW and decoded == complete:
            self._move_on(complete)
        if len(self._window) >= LIMIT:
            added += self._give_up()
        return added

    def _move_on(self, complete: str) -> None:
        for size in range(OVERLAP, OVERLAP + LONGEST_CHARACTER):
            end = self._window[-size:]
            text = self._decoded(end)
            if text and complete.endswith(text):
                self._window, self._shown = end, text
                return

    def _give_up(self) -> str:
        """Moves on within bytes that are no characters; returns what stands for those no longer waited for."""
        old = self._decoded(self._window[:-LONGEST_CHARACTER])
        added, later = old[len(self._shown) :], max(len(self._shown) - len(old), 0)  # of the last tokens, some is shown
        self._window = self._window[-OVERLAP:]
        before = self._decoded(self._window[:-LONGEST_CHARACTER])
        self._shown = self._decoded(self._window)[: len(before) + later]
        self._pieces.append(added)
        return added

    def _is_special(self, token_id: int) -> bool:
        assert self._tokenizer is not None
        return not self._decoded([token_id]) and bool(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def _decoded(self, token_ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
