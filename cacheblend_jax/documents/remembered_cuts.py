"""Where texts were cut, in the user's cache directory: the next process need not tokenise them to split them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cacheblend_jax.documents.measuring import Span
from cacheblend_jax.errors import one_line
from cacheblend_jax.model.encoding import tokenizer_digest
from cacheblend_jax.runtime.user_cache import read_record, remove_all_but_newest, write_record

logger = logging.getLogger(__name__)
KIND = "splits"
FORMAT = 1  # raised whenever a text is cut elsewhere than before
MOST_CUTS = 200_000  # in one record, of which a chunk takes two: some 1.5 MB of JSON, for 200 MB of text
MOST_RECORDS = 8  # of tokenizers and chunk lengths


class RememberedCuts:
    """The cuts of texts by one tokenizer into chunks of one length; what is new is written when the context ends.

    One record holds all texts, those used last at its end (as far as something new was written since); where it grows
    too long, its beginning goes. Processes that write at the same time lose each other's news, which costs a split. A
    record that is damaged, or was made by another version of the tokenizer's package, is as good as none.
    """

    def __init__(self, tokenizer: Any, chunk_tokens: int, separator: str) -> None:
        versions = [_version("tokenizers"), _version("transformers")]
        made_by = [FORMAT, tokenizer_digest(tokenizer), *versions, chunk_tokens, separator]
        self._name = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:32]
        self._cuts: dict[str, list[int]] = {}
        self._is_changed = False

    def __enter__(self) -> RememberedCuts:
        record = read_record(KIND, self._name) or {}
        cuts = record.get("cuts")
        if isinstance(cuts, dict) and record.get("sha256") == _digest(cuts):
            self._cuts = cuts
        return self

    def __exit__(self, *unused: object) -> None:
        if not self._is_changed:
            return
        self._forget_least_recent()
        try:
            write_record(KIND, self._name, {"cuts": self._cuts, "sha256": _digest(self._cuts)})
            remove_all_but_newest(KIND, MOST_RECORDS)
        except OSError as error:
            logger.debug("how texts were split can't be remembered: %s", one_line(error))

    def cuts(self, text: str, cut: Callable[[], Sequence[Span]]) -> list[Span]:
        """Returns where the chunks of a text begin and end: as remembered, or as `cut` says, which is remembered."""
        key = hashlib.sha256(text.encode()).hexdigest()
        known = self._cuts.pop(key, None)
        if known is None:
            known = [place for span in cut() for place in span]
            self._is_changed = True
        self._cuts[key] = known
        return list(zip(known[0::2], known[1::2], strict=True))

    def _forget_least_recent(self) -> None:
        excess = sum(map(len, self._cuts.values())) - MOST_CUTS
        for key in list(self._cuts):
            if excess <= 0:
                break
            excess -= len(self._cuts.pop(key))


def _digest(cuts: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(cuts).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
