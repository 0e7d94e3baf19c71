"""Token ids of texts that came lately: chunks and system texts come again, and encoding them is part of each TTFT."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from cacheblend_jax.model.encoding import encode

MAX_CHARACTERS = 16 * 2**20
ENTRY_CHARACTERS = 256  # what a text counts for besides its own: many short ones take memory, too


class KnownTexts:
    """What `encode` gives each text, remembered for those used last. Safe to use from several threads.

    Tenants share nothing: how long an answer takes would tell one what texts another has.

    Args:
        most_characters: of the texts that are remembered, together, and `ENTRY_CHARACTERS` more for each.
    """

    def __init__(self, tokenizer: Any, most_characters: int = MAX_CHARACTERS) -> None:
        self._tokenizer, self._most = tokenizer, most_characters
        self._lock = threading.Lock()  # guards what follows
        self._known: OrderedDict[tuple[str, bool, str], np.ndarray] = OrderedDict()
        self._characters = 0

    def encode(self, tenant: str, text: str, *, control_tokens: bool = False) -> np.ndarray:
        """Returns a text's ids, int32, which are not to be changed; arguments and errors as `encode`."""
        key = tenant, control_tokens, text
        with self._lock:
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return known
        ids = np.asarray(encode(self._tokenizer, text, control_tokens=control_tokens), np.int32)
        ids.setflags(write=False)
        with self._lock:
            if key not in self._known and _size(text) <= self._most:
                self._known[key] = ids
                self._characters += _size(text)
                while self._characters > self._most:
                    (*_, oldest), _ = self._known.popitem(last=False)
                    self._characters -= _size(oldest)
        return ids


def _size(text: str) -> int:
    return len(text) + ENTRY_CHARACTERS
