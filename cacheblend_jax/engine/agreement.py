"""What the hosts of a mesh agree on, so that each runs the same programs: the first one decides, the others follow.

On one host, the same calls decide at once.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np

from cacheblend_jax.engine.controller import Decision
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.loading import LostChunkError
from cacheblend_jax.errors import CacheBlendError, DamagedEntryError
from cacheblend_jax.model.kv_cache import SCALES
from cacheblend_jax.model.model import Model
from cacheblend_jax.runtime.hosts import Hosts, HostsError, connected_hosts
from cacheblend_jax.store import Store, StoredChunk, is_slow
from cacheblend_jax.store.quantise import QuantisedRows
from cacheblend_jax.store.stored_chunk import StoredRows
from cacheblend_jax.store.wrapped import WrappedChunk

Result = TypeVar("Result")
LONGEST_SAID = 200  # characters of what the hosts compare; for longer text and for arrays its hash stands


@dataclass(frozen=True)
class Choice:
    """What a request computes: the ratio, and the positions of stored chunks that are not worth loading.

    Attributes:
        ratio: where the controller or the blend's floor set one.
        decision: the controller's, if it was asked.
    """

    ratio: float | None
    computed_starts: frozenset[int]
    decision: Decision | None = None


class Alone:
    """One process makes all decisions by itself.

    Attributes:
        is_alone: whether there is but one host.
        writes: whether this host writes what is computed for the store.
    """

    is_alone = writes = True

    @contextmanager
    def request(self) -> Iterator[None]:
        """Wraps one request."""
        yield

    def alike(self, call: str, said: Callable[[], dict[str, object]]) -> None:
        """Checks that all hosts say the same in a call: values by their names.

        Raises:
            HostsError: they do not, or they are in different calls.
        """

    def opened(self, chunks: Sequence[PlacedChunk], asked: Callable[[], dict[str, object]]) -> Sequence[PlacedChunk]:
        """Returns the chunks with the handles that are used.

        Args:
            asked: returns what the request is, beside its chunks.
        """
        return chunks

    def choice(self, choose: Callable[[], Choice]) -> Choice:
        """Returns what the request computes."""
        return choose()

    def check_read(self, chunks: Sequence[PlacedChunk]) -> None:
        """Checks, once a prefill's programs have run, that all that they were given was read.

        Raises:
            LostChunkError: a chunk could not be read.
        """

    def lack(self, key: str, store: Store) -> bool:
        """Whether a chunk's KV has to be computed for the store."""
        return key not in store

    def meet(self, call: str) -> None:
        """Waits for all hosts to come here, in the same call."""

    def run(self, work: Callable[[], Result]) -> Result:
        """Returns what `work` returns, which waits for programs that all hosts run."""
        return work()


class Together:
    """Several processes, each with some of a mesh's devices and a store of its own or one that they share.

    All run the same programs in the same order; what one of them alone knows must not decide what runs. So they agree,
    three times in a prefill: on the chunks that all could open, on what the first host chose, and, when the programs
    have run, on what any of them could not read. A chunk that one host lacks is a miss on all.

    Args:
        hosts: the processes.
        store: this one's.
        heads: the KV heads that its devices hold, which it reads of stored chunks; `None`: all.

    Attributes:
        writes: of hosts that share a directory, the first one writes there.
    """

    is_alone = False

    def __init__(self, hosts: Hosts, store: Store, heads: range | None = None) -> None:
        from cacheblend_jax.store.marker import directory_id  # takes what a store in memory need not import

        self._hosts, self._heads = hosts, heads
        own = None if store.directory is None else directory_id(store.directory)
        ids = self._hosts.agree("Engine", own, lambda reports: reports)
        self.writes = own is None or ids.index(own) == self._hosts.index
        self._within = threading.local()  # how many requests, one inside another, this thread is in

    @contextmanager
    def request(self) -> Iterator[None]:
        """Tells the other hosts where the body fails, which they would wait for.

        Raises:
            HostsError: a program failed that all of them run.
        """
        depth = getattr(self._within, "depth", 0)
        self._within.depth = depth + 1
        try:
            yield
        except BaseException as error:
            if depth or isinstance(error, HostsError):  # the outermost request tells them, or all know
                raise
            self._hosts.give_up(error)
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise HostsError(
                    f"a program that all hosts run has failed, as where one of them has ended: {error}"
                ) from error
            raise
        finally:
            self._within.depth = depth

    def alike(self, call: str, said: Callable[[], dict[str, object]]) -> None:
        """See `Alone`."""
        self._hosts.agree(call, _brief(said()), _check_alike)

    def opened(self, chunks: Sequence[PlacedChunk], asked: Callable[[], dict[str, object]]) -> Sequence[PlacedChunk]:
        """See `Alone`. The chunks that all hosts could open, as KV of one kind; the others count as missing.

        Raises:
            HostsError: the hosts do not ask for the same.
        """
        said = _brief(asked() | {"chunks": [chunk.key for chunk in chunks]})
        kinds = [None if chunk.stored is None else _kind(chunk.stored) for chunk in chunks]
        agreed = self._hosts.agree("prefill", [said, kinds], _agreed_kinds)
        return [
            replace(chunk, stored=None if kind is None else AgreedChunk(chunk.handle, kind[0]), heads=self._heads)
            for chunk, kind in zip(chunks, agreed, strict=True)
        ]

    def choice(self, choose: Callable[[], Choice]) -> Choice:
        """See `Alone`: the first host's."""

        def chosen(_: list[Any]) -> list[Any]:
            choice = choose()
            decision = None if choice.decision is None else asdict(choice.decision)
            return [choice.ratio, sorted(choice.computed_starts), decision]

        ratio, starts, decision = self._hosts.agree("a prefill's choice", None, chosen)
        if decision is not None:
            decision = Decision(**decision | {"computed_starts": tuple(decision["computed_starts"])})
        return Choice(ratio, frozenset(starts), decision)

    def check_read(self, chunks: Sequence[PlacedChunk]) -> None:
        """See `Alone`: on any host."""
        failures = [chunk.handle.failure if isinstance(chunk.handle, AgreedChunk) else None for chunk in chunks]
        own = [number for number, failure in enumerate(failures) if failure is not None]
        lost = self._hosts.agree("a prefill's reads", own, lambda reports: sorted(set().union(*reports)))
        if lost:
            elsewhere = DamagedEntryError("another host could not read it")
            raise LostChunkError(chunks[lost[0]], failures[lost[0]] or elsewhere)

    def lack(self, key: str, store: Store) -> bool:
        """See `Alone`: whether any host that would write it has none."""
        return self._hosts.agree(f"precompute, of chunk {key[:12]}", self.writes and key not in store, any)

    def meet(self, call: str) -> None:
        """See `Alone`."""
        self._hosts.agree(call, None, lambda _: None)

    def run(self, work: Callable[[], Result]) -> Result:
        """See `Alone`.

        Raises:
            HostsError: it takes longer than hosts wait for each other: one of them does not run these programs.
        """
        return self._hosts.in_time(work)


class AgreedChunk(WrappedChunk):
    """A handle that all hosts opened. What it cannot read it gives as zeros, and says so when all programs have run.

    A host that stopped there would leave the others waiting for it in a program that they run together.

    Attributes:
        failure: why it could not be read.
    """

    def __init__(self, chunk: StoredChunk, tier: str) -> None:
        super().__init__(chunk)
        # Some hosts may have it there, and others not.
        self.tier, self.device_entry, self.host_entry = tier, None, None
        self.failure: Exception | None = None

    def read_layer(self, layer: int, heads: range | None = None) -> tuple[StoredRows, StoredRows]:
        """See `StoredChunk`."""
        try:
            read = super().read_layer(layer, heads)
        except (DamagedEntryError, OSError, IndexError) as error:
            self.failure = error
            return self._zeros(heads), self._zeros(heads)
        return read

    def _zeros(self, heads: range | None) -> StoredRows:
        _, tokens, kv_heads, head_dim = self.shape
        shape = tokens, kv_heads if heads is None else len(heads), head_dim
        if self.kv_dtype is None:
            return np.zeros(shape, self.dtype)
        return QuantisedRows(np.zeros(shape, self.kv_dtype), np.zeros(shape[:-1], SCALES))


def agreement_of(model: Model, store: Store, timeout_s: float) -> Alone | Together:
    """Returns how the processes agree whose devices a model is on.

    Raises:
        CacheBlendError: the timeout is not positive, or another host does not answer.
    """
    if not timeout_s > 0:
        raise CacheBlendError(f"hosts_timeout_s must be a positive number, got {timeout_s!r}")
    if not model.spans_hosts:
        return Alone()
    return Together(connected_hosts(timeout_s), store, model.own_kv_heads)


def _brief(said: dict[str, object]) -> dict[str, str]:
    """Returns what stands for each value: itself where it is short, else a hash."""
    texts = {name: value.tobytes() if isinstance(value, np.ndarray) else repr(value) for name, value in said.items()}
    return {
        name: text if isinstance(text, str) and len(text) <= LONGEST_SAID else _hashed(text)
        for name, text in texts.items()
    }


def _hashed(text: str | bytes) -> str:
    return "sha256:" + hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def _check_alike(reports: Sequence[dict[str, str]]) -> None:
    """Raises an error that names what two hosts say differently, if they do."""
    for index, said in enumerate(reports):
        for name, value in reports[0].items():
            if said[name] != value:
                raise CacheBlendError(
                    f"the hosts do not ask for the same: {name} is {value} on host 0 of {len(reports)}, {said[name]} "
                    f"on host {index}; prompts, the engine's arguments and the model must be alike on all"
                )


def _kind(chunk: StoredChunk) -> list[Any]:
    return ["host" if chunk.tier == "device" else chunk.tier, chunk.kv_dtype, chunk.has_k_offset]


def _agreed_kinds(reports: list[list[Any]]) -> list[list[Any] | None]:
    """Returns the kind of each chunk that all hosts opened as KV of one kind, from the slowest tier of any."""
    said, kinds = zip(*reports, strict=True)
    _check_alike(said)
    return [_agreed_kind(of_hosts) for of_hosts in zip(*kinds, strict=True)]


def _agreed_kind(of_hosts: Sequence[list[Any] | None]) -> list[Any] | None:
    there = [kind for kind in of_hosts if kind is not None]
    if len(there) < len(of_hosts) or any(kind[1:] != there[0][1:] for kind in there):
        return None
    slow = [kind for kind in there if is_slow(kind[0])]
    return (slow or there)[0]
