"""What `ask` says of the store: what it held when the question came, and what it holds of the same texts otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cacheblend_jax.store import ChunkStore
from cacheblend_jax.store.record import EntryRecord

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.engine.chunk_lookup import ChunkLookup
    from cacheblend_jax.model import Model


@dataclass(frozen=True)
class StoreReport:
    """What the store had for a question.

    Attributes:
        chunks: as they were looked up, before anything was computed.
        computed: how many chunks were then computed alone, each text once.
        seconds: what that took.
    """

    chunks: Sequence[ChunkLookup]
    computed: int = 0
    seconds: float = 0.0

    @property
    def found(self) -> int:
        """How many chunks the store had."""
        return sum(chunk.is_stored for chunk in self.chunks)

    def line(self, directory: str | None) -> str:
        """Returns the report on one line.

        Args:
            directory: the store's; `None`: it is in memory.
        """
        where = "in memory" if directory is None else f"in {directory}"
        then = ""
        if self.computed:
            then = f"; {self.computed} precomputed in {self.seconds:.1f} s"
        elif directory is None and self.found < len(self.chunks):
            then = "; --store DIR keeps their KV for the next question"
        return f"[store: {self.found} of {len(self.chunks)} chunks found {where}{then}]"


def stored_otherwise(store: ChunkStore, model: Model, chunks: Sequence[ChunkLookup]) -> str | None:
    """Says how the store holds texts that it lacks for this model and context; `None` where it has none of them."""
    missing = {chunk.label.text_digest: chunk for chunk in chunks if not chunk.is_stored and chunk.label.text_digest}
    reasons: dict[str, str] = {}  # by text: the entry with the fewest differences says what to change
    for record in store.same_texts(missing) if missing else ():
        digest = record.label.text_digest
        reason = " and ".join(_differences(record, model, missing[digest]))
        reasons[digest] = min(reasons.get(digest, reason), reason, key=lambda each: each.count(" and "))
    if not reasons:
        return None
    counted = ", ".join(f"{count} with {reason}" for reason, count in Counter(reasons.values()).most_common())
    return f"the store holds {len(reasons)} of these texts, but for another use: {counted}"


def _differences(record: EntryRecord, model: Model, chunk: ChunkLookup) -> list[str]:
    """Returns what keeps an entry from serving for a chunk of the same text, each with the option that says so."""
    differences = []
    if record.label.model != model.name and record.fingerprint != model.fingerprint:
        differences.append(f"model {record.label.model or 'unknown'!r} (--model)")
    if record.dtype != model.config.dtype:
        differences.append(f"dtype {record.dtype} (--dtype)")
    if not differences and record.fingerprint != model.fingerprint:
        differences.append("other weights or another tokenizer under the model's name")
    if record.fingerprint == model.fingerprint and record.context_ids != chunk.context_ids:
        differences.append("another text before it (--system, --context)")
    return differences or ["a spelling that the tokenizer tells apart"]
