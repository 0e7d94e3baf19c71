"""Entries that the device reads where they lie in host memory: pages, their places, their order and their locks."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import FAMILIES, TWO_STAGES, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.blend.streamed import first_layer_read
from cacheblend_jax.engine import entry_locks, entry_pages
from cacheblend_jax.engine.device_layers import PlacedLayers
from cacheblend_jax.engine.entry_locks import EntryLocks
from cacheblend_jax.engine.entry_pages import Page, cut_into_pages, place_pages, places_of
from cacheblend_jax.engine.executors import Executors
from cacheblend_jax.engine.layer_stream import LayerStream
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.page_stream import PageStream
from cacheblend_jax.engine.planner import empty_request
from cacheblend_jax.model import KVCache, LayerKV
from cacheblend_jax.model.quantised_kv import stored_layer
from cacheblend_jax.runtime.link import PageLock, SimulatedLink
from cacheblend_jax.store import ChunkEntry
from cacheblend_jax.store.stored_chunk import HostChunk

CONFIG = replace(FAMILIES["llama3"], num_kv_heads=1, head_dim=2, dtype="float32")  # 8 bytes a row
NUM_KEYS = 64
ONE_STAGE = replace(TWO_STAGES, num_stages=1)  # little to compile


class Client:
    """Stands for a device's, which page-locks memory; knows what is locked."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}

    def dma_map(self, address, size):
        self.locked[address] = size

    def dma_unmap(self, address):
        del self.locked[address]


class LockingLink(SimulatedLink):
    """A link to a device that reads host memory by itself."""

    def __init__(self, bytes_per_s: float = 1e15) -> None:
        super().__init__(bytes_per_s)
        self.client = Client()

    def page_lock(self, buffer):
        return PageLock(self.client, buffer)


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of 4 KiB, in which a test's chunk has several; also where many are padded."""
    monkeypatch.setattr(entry_pages, "PAGE_BYTES", 4096)
    monkeypatch.setattr(entry_pages, "MOST_SENT", 100)


def entry_of(tokens: int, seed: int) -> ChunkEntry:
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((CONFIG.num_layers, tokens, 1, 2)).astype(np.float32) for _ in "kv")
    return ChunkEntry(k, v).hand_over()


def placed_chunks(*lengths: int, exact: tuple[int, ...] = (), first: int = 3) -> list[PlacedChunk]:
    """Chunks that follow each other with one key between them."""
    chunks, start = [], first
    for number, tokens in enumerate(lengths):
        ids = np.zeros(tokens, np.int32)
        stored = HostChunk(entry_of(tokens, number), lambda: None)
        chunks.append(PlacedChunk(f"{number}", "", ids[:0], ids, start, number in exact, stored=stored))
        start += tokens + 1
    return chunks


def page_bytes(monkeypatch, rows: int) -> int:
    monkeypatch.setattr(entry_pages, "PAGE_BYTES", rows * 8)
    monkeypatch.setattr(entry_pages, "MOST_SENT", 1e9)
    return rows


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["hkvd", "query"])
@pytest.mark.parametrize("kept_bytes", [0, 200_000])
def test_i6_from_pages_is_resident(small_pages, kept_bytes, selector):
    """Whatever modes follow each other: layers that one has left on the device are whole for the next."""
    store, link, blend = cb.ChunkStore(), LockingLink(), replace(ONE_STAGE, selector=selector)
    engine = cb.Engine(family_model("qwen2"), store, blend, link=link, kept_bytes=kept_bytes)
    resident = cb.Engine(family_model("qwen2"), store, blend, executor="resident")
    prompt = random_prompt(1)
    engine.precompute(prompt)
    for mode in ("blend", "blend", "reuse", "prefix", "blend"):
        out, wanted = engine.prefill(prompt, mode), resident.prefill(prompt, mode)
        assert (out.stats.executor, wanted.stats.executor) == ("streamed", "resident")
        np.testing.assert_array_equal(out.recomputed, wanted.recomputed)
        for ours, theirs in ((out.logits, wanted.logits), (out.cache.k, wanted.cache.k), (out.cache.v, wanted.cache.v)):
            assert relative_error(ours, theirs) < 2e-6
    assert link.client.locked  # it took pages


@pytest.mark.parametrize("selector", ["hkvd", "query"])
def test_warm_up_compiles_what_pages_need(small_pages, selector):
    model = cb.model.random_model(FAMILIES["qwen2"], seed=7)  # whose runner has no other test's programs
    engine = cb.Engine(model, blend=replace(ONE_STAGE, selector=selector), link=LockingLink(), context_tokens=None)
    prompts = random_prompt(4), random_prompt(5, (25, 38, 33))
    for prompt in prompts:
        engine.precompute(prompt)
    engine.warmup(112, modes=("blend",), prefix_tokens=9, suffix_tokens=7)
    count = engine.model.runner.count
    assert [engine.prefill(prompt).stats.executor for prompt in prompts] == ["streamed"] * 2
    assert engine.model.runner.count == count


def test_layers_of_pages_stay_from_the_second_request_on(small_pages):
    engine = cb.Engine(family_model("qwen2"), blend=TWO_STAGES, link=LockingLink(), kept_bytes=2**30)
    prompt, sent = random_prompt(1), []
    engine.precompute(prompt)
    for _ in range(3):
        trace = cb.Trace()
        engine.prefill(prompt, trace=trace)
        sent.append(len(trace.lane("transfer")))
    assert sent[0] > 0
    assert sent[1] > 0
    assert sent[2] == 0


def test_a_trace_shows_pages_and_layers(small_pages):
    engine = cb.Engine(family_model("qwen2"), blend=TWO_STAGES, link=LockingLink(), kept_bytes=0)
    prompt, trace = random_prompt(1), cb.Trace()
    engine.precompute(prompt)
    out = engine.prefill(prompt, trace=trace)
    assert [span.layer for span in trace.lane("compute")] == list(range(engine.model.config.num_layers))
    assert [span.layer for span in trace.lane("transfer")][:2] == [0, 1]  # the exact prefix, then the check layer
    assert not trace.lane("host")
    assert 0 < out.stats.load_s < out.stats.ttft_s


@pytest.mark.parametrize("how", ["quantised", "unlocked", "slow"])
def test_what_cannot_be_read_in_place_is_staged(small_pages, how, monkeypatch):
    link = LockingLink()
    store = cb.ChunkStore(kv_dtype="int8" if how == "quantised" else None)
    if how == "unlocked":
        locked = link.page_lock
        monkeypatch.setattr(link, "page_lock", lambda x: None if x.ndim == 4 else locked(x))
    if how == "slow":
        store = cb.store.ThrottledStore(store, 1e12)
    engine = cb.Engine(family_model("llama3"), store, ONE_STAGE, link=link)
    prompt, streams = random_prompt(1), []
    engine.precompute(prompt)
    delivery = engine._groups.first.delivery
    stream = delivery.stream
    monkeypatch.setattr(delivery, "stream", lambda *of, **to: streams.append(stream(*of, **to)) or streams[-1])
    assert engine.prefill(prompt).stats.misses == 0
    assert [type(each) for each in streams] == [LayerStream]


# --- pages and their places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "rows", "first_layer", "kept"),
    [
        ((10, 13, 5), 16, 0, ()),  # a page spans layers; a chunk's entry ends within one
        ((10, 13, 5), 7, 1, ()),  # a layer spans pages
        ((20, 1, 2), 40, 2, ()),  # entries smaller than a page
        ((9, 9), 16, 1, (1, 2)),  # layers that stay on the device
        ((16, 8), 16, 0, ()),  # a page is a layer
        ((30,), 1000, 0, ()),
    ],
)
def test_every_wanted_row_is_placed_before_its_layer_and_none_elsewhere(lengths, rows, first_layer, kept, monkeypatch):
    page_bytes(monkeypatch, rows)
    chunks = placed_chunks(*lengths, exact=(0,))
    pages = cut_into_pages(chunks, CONFIG, first_layer, kept)
    shape = CONFIG.num_layers, NUM_KEYS, 1, 2
    cache = KVCache(*(jax.numpy.full(shape, np.nan, np.float32),) * 2)
    place, at_layer = jax.jit(place_pages), 0
    for layer in range(CONFIG.num_layers):
        due = [page for page in pages if page.layer == layer]
        at_layer += len(due)
        for first in range(0, len(due), entry_pages.PAGES_TOGETHER):
            some = due[first : first + entry_pages.PAGES_TOGETHER]
            sent = [page.rows(rows) for page in some]
            sent += sent[:1] * (entry_pages.PAGES_TOGETHER - len(sent))
            cache = place(cache, tuple(sent), places_of(some, NUM_KEYS))
        if layer in kept:
            continue
        for chunk in chunks:
            if layer >= first_layer or chunk.exact:
                k, v = chunk.handle.read_layer(layer)
                np.testing.assert_array_equal(np.asarray(cache.k)[layer, chunk.start : chunk.stop], k)
                np.testing.assert_array_equal(np.asarray(cache.v)[layer, chunk.start : chunk.stop], v)
    assert at_layer == len(pages)
    between = np.ones(NUM_KEYS, bool)
    for chunk in chunks:
        between[chunk.start : chunk.stop] = False
    assert np.isnan(np.asarray(cache.k)[:, between]).all()
    assert np.isnan(np.asarray(cache.v)[:first_layer, chunks[-1].start : chunks[-1].stop]).all() or len(chunks) == 1


def test_pages_are_views_and_the_last_one_ends_with_its_entry(monkeypatch):
    page_bytes(monkeypatch, 16)
    (chunk,) = placed_chunks(10)
    pages = cut_into_pages([chunk], CONFIG, 0)
    entry = chunk.handle.host_entry
    assert all(np.shares_memory(page.rows(16)[0], entry.k) for page in pages)
    assert [page.first for page in pages] == [0, 16, 32, 44]  # of 60 rows
    assert [page.placed_from for page in pages] == [0, 16, 32, 48]


def test_many_small_entries_are_not_worth_pages(monkeypatch):
    monkeypatch.setattr(entry_pages, "PAGE_BYTES", 8 * 60)
    assert cut_into_pages(placed_chunks(10, 10), CONFIG, 0) is not None
    assert cut_into_pages(placed_chunks(2, 2, 2, 2), CONFIG, 0) is None
    assert cut_into_pages(placed_chunks(2), CONFIG, 0) is not None  # one page that holds little


@pytest.mark.parametrize("wrong", ["layers", "dtype", "heads"])
def test_an_entry_that_is_not_the_models_is_left_to_who_reads_it(wrong, monkeypatch):
    page_bytes(monkeypatch, 16)
    (chunk,) = placed_chunks(10)
    entry = chunk.handle.host_entry
    if wrong == "heads":
        chunk = replace(chunk, heads=range(1))
    else:
        k, v = (x[1:] if wrong == "layers" else x.astype(np.float16) for x in (entry.k, entry.v))
        chunk = replace(chunk, stored=HostChunk(ChunkEntry(k, v), lambda: None))
    assert cut_into_pages([chunk], CONFIG, 0) is None


def test_stored_kv_is_read_from_the_check_layer_on_if_all_but_exact_tokens_are_active():
    planner = cb.Engine(family_model("llama3"), blend=TWO_STAGES)._planner
    plan = planner.plan("blend", 100, 20, 50)

    def read(active: int, exact: int, of=plan) -> int:
        padded = np.full(of.active, of.cache_length, np.int32)
        padded[:active] = np.arange(active)
        return first_layer_read(of, replace(empty_request(of), positions=padded, length=np.int32(100)), exact)

    assert plan.stages[0].border == 1
    assert (read(80, 20), read(80, 0), read(79, 20)) == (1, 0, 0)
    assert read(80, 20, planner.plan("prefix", 100, 20, 0)) == 0  # nothing is selected there
    asking = cb.Engine(family_model("llama3"), blend=replace(TWO_STAGES, selector="query"))._planner
    assert read(80, 20, asking.plan("blend", 100, 20, 50)) == 0  # a pass of the question reads all


# --- their order ------------------------------------------------------------------------------------------------------


class Device:
    """Notes what is sent and placed, and how far steps have come."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def put(self, sent):
        if isinstance(sent, tuple):
            self.events.append(("sent", len(sent[0])))
        return jax.device_put(sent)

    def run(self, function, cache, *of, donate=()):
        self.events.append((function.__name__, 0))
        return cache.layer(0) if function is stored_layer else cache


def empty_cache() -> KVCache:
    return KVCache(*(jax.numpy.zeros((CONFIG.num_layers, NUM_KEYS, 1, 2)),) * 2)


def stream_of(pages: list[Page], device: Device, first: int, ahead: int, room: int, **how) -> PageStream:
    layers = [jax.numpy.int32(layer) for layer in range(CONFIG.num_layers)]
    how = {"kept": PlacedLayers()} | how | {"ahead": ahead, "room": room}
    return PageStream(pages, first, layers, 10, NUM_KEYS, device.put, device.run, **how)


def test_pages_are_sent_before_the_steps_that_they_run_beside(monkeypatch):
    page_bytes(monkeypatch, 10)
    chunks, device = placed_chunks(10, 10, 10, exact=(0,)), Device()
    pages, cache = cut_into_pages(chunks, CONFIG, 1), empty_cache()
    with stream_of(pages, device, 1, 2, 4) as stream:
        for layer in range(CONFIG.num_layers):
            assert stream.next() is None
            stream.placed(cache)
            device.events.append(("step", layer))
            stream.used_until(jax.numpy.zeros(()))
    # At layer 0 the exact chunk's alone; then those that the check layer waits for; from there on two layers ahead.
    assert device.events[:4] == [("sent", 1), ("sent", 3), ("place_pages", 0), ("step", 0)]
    sent_before = []
    for layer in range(6):
        before = device.events[: device.events.index(("step", layer))]
        sent_before.append([count for what, count in before if what == "sent"])
    assert [len(sent) for sent in sent_before] == [2, 4, 5, 6, 6, 6]
    assert sum(sent_before[-1]) == len(pages) == 16


def test_no_more_is_sent_than_there_is_room_for(monkeypatch):
    page_bytes(monkeypatch, 10)
    waited, device = [], Device()
    pages, cache = cut_into_pages(placed_chunks(10), CONFIG, 0), empty_cache()
    results = [jax.numpy.full((), layer) for layer in range(6)]
    with stream_of(pages, device, 0, 2, 3) as stream:
        assert stream.bytes_ahead(0) == 3 * 2 * 10 * 8
        monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or x)
        for layer in range(6):
            stream.next()
            stream.placed(cache)
            # A page for the layer two ahead takes the place of one whose step is done: the layer before this one's.
            assert [int(x) for x in waited] == list(range(min(layer, 3)))
            assert len(stream._there) <= 3
            stream.used_until(results[layer])


def test_what_a_pass_of_the_question_has_had_placed_is_in_the_cache_for_the_blend(monkeypatch):
    page_bytes(monkeypatch, 10)
    kept, device, cache = PlacedLayers(room=3), Device(), empty_cache()
    there = placed_chunks(10)[0].handle.host_entry
    stayed = kept.layers[0] = LayerKV(jax.numpy.asarray(there.k[0]), jax.numpy.asarray(there.v[0]))
    pages = cut_into_pages(placed_chunks(10), CONFIG, 0, kept.layers)
    with stream_of(pages, device, 0, 2, 4, kept=kept) as stream:
        for turn in range(2 * CONFIG.num_layers):
            found = stream.next()
            assert found is (stayed if turn in (0, CONFIG.num_layers) else None)
            if found is None:
                assert stream.placed(cache) is cache
            stream.used_until(jax.numpy.zeros(()))
            if turn == CONFIG.num_layers - 1:
                once = list(device.events)
        assert not stream._there  # the blend's steps have made room
    assert device.events == once
    assert [what for what, _ in once].count("place_pages") == CONFIG.num_layers - 1


def test_layers_that_stay_have_no_pages_and_those_with_room_are_copied(monkeypatch):
    page_bytes(monkeypatch, 10)
    kept, device = PlacedLayers(room=3), Device()
    there = placed_chunks(10)[0].handle.host_entry
    kept.layers[1] = LayerKV(jax.numpy.asarray(there.k[1]), jax.numpy.asarray(there.v[1]))
    pages, cache = (
        cut_into_pages(placed_chunks(10), CONFIG, 0, kept.layers),
        empty_cache(),
    )
    assert [page.layer for page in pages] == [0, 2, 3, 4, 5]
    with stream_of(pages, device, 0, 1, 6, kept=kept) as stream:
        for layer in range(6):
            found = stream.next()
            assert (found is kept.layers[1]) if layer == 1 else (found is None)
            if found is None:
                stream.placed(cache)
            stream.used_until(jax.numpy.zeros(()))
    assert [what for what, _ in device.events].count("stored_layer") == 2
    assert sorted(kept.layers) == [0, 1, 2]


# --- their locks ------------------------------------------------------------------------------------------------------


def unlocked(link: LockingLink, left: int) -> bool:
    """Whether no more than so many arrays are locked, before long: a thread of its own unlocks."""
    gc.collect()
    given_up_at = time.monotonic() + 30
    while len(link.client.locked) > left and time.monotonic() < given_up_at:
        time.sleep(1e-3)
    return len(link.client.locked) == left


def test_entries_are_locked_once_and_as_long_as_they_live():
    locks, link, other = EntryLocks(), LockingLink(), LockingLink()
    entries = [entry_of(10, 0), entry_of(12, 1)]
    assert locks.lock(entries, link.page_lock)
    assert locks.lock(entries, other.page_lock)  # of another engine
    assert not other.client.locked
    assert sorted(link.client.locked.values()) == sorted(x.nbytes for entry in entries for x in (entry.k, entry.v))
    assert locks.num_bytes == sum(entry.num_bytes for entry in entries)
    del entries[0]
    assert unlocked(link, left=2)
    assert locks.num_bytes == entries[0].num_bytes


def test_entries_that_have_the_same_arrays_share_their_locks():
    locks, link, entry = EntryLocks(), LockingLink(), entry_of(10, 0)
    twin = replace(entry)  # as a second store keeps it
    assert locks.lock([entry, twin], link.page_lock)
    assert len(link.client.locked) == 2
    del entry
    gc.collect()
    assert locks.lock([twin], link.page_lock)
    assert len(link.client.locked) == 2
    del twin
    assert unlocked(link, left=0)


def test_what_cannot_be_locked_is_not_tried_again():
    entry, other, tried, link, locks = entry_of(10, 0), entry_of(12, 1), [], LockingLink(), EntryLocks()

    def page_lock(buffer):
        tried.append(buffer)
        return None if buffer is entry.v else link.page_lock(buffer)

    for _ in range(2):
        assert not locks.lock([other, entry], page_lock)
    assert len(tried) == 4
    assert sorted(link.client.locked.values()) == [other.k.nbytes] * 2  # the first half of one is of no use
    assert locks.lock([other], page_lock)


def test_no_more_than_half_of_the_hosts_memory_is_locked(monkeypatch):
    entries, link, locks = [entry_of(10, number) for number in range(3)], LockingLink(), EntryLocks()
    monkeypatch.setattr(entry_locks, "_memory_bytes", lambda: 4 * entries[0].num_bytes)
    assert locks.lock(entries[:2], link.page_lock)
    assert not locks.lock(entries, link.page_lock)
    assert len(link.client.locked) == 4
    del entries[0]
    assert unlocked(link, left=2)
    assert locks.lock(entries, link.page_lock)  # there is room again


def test_what_drops_an_entry_does_not_wait_until_it_is_unlocked():
    locks, link, entries = EntryLocks(), LockingLink(), [entry_of(10, 0)]
    went_on = threading.Event()
    unlock = link.client.dma_unmap
    link.client.dma_unmap = lambda address: (went_on.wait(30), unlock(address))
    assert locks.lock(entries, link.page_lock)
    del entries[0]
    gc.collect()
    assert len(link.client.locked) == 2
    went_on.set()
    assert unlocked(link, left=0)


# --- what ends a prefill early ----------------------------------------------------------------------------------------


def test_a_transfer_that_lacks_memory_begins_anew(small_pages, monkeypatch):
    link, failed = LockingLink(), []
    engine = cb.Engine(family_model("llama3"), blend=TWO_STAGES, link=link, kept_bytes=0)
    prompt = random_prompt(1)
    engine.precompute(prompt)
    wanted, put = engine.prefill(prompt), link.put

    def lacking(tree, *of, **to):
        if isinstance(tree, tuple) and len(failed) < 2:  # pages
            failed.append(len(failed))
            if len(failed) == 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return put(tree, *of, **to)

    monkeypatch.setattr(link, "put", lacking)
    monkeypatch.setattr(Executors, "_give_way", lambda self: True)
    out = engine.prefill(prompt)
    assert len(failed) == 2
    np.testing.assert_array_equal(out.logits, wanted.logits)


def test_close_waits_for_what_is_on_its_way_also_if_it_was_cut_short(monkeypatch):
    page_bytes(monkeypatch, 10)
    waited, device = [], Device()
    stream = stream_of(cut_into_pages(placed_chunks(10), CONFIG, 0), device, 0, 2, 4)
    sent = iter([True, True, False])
    put = device.put
    stream._put = lambda tree: put(tree) if isinstance(tree, np.ndarray) or next(sent) else 1 / 0
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or x)
    with pytest.raises(ZeroDivisionError), stream:
        stream.next()
    there, behind = waited
    assert behind.shape == (1,)  # transfers are in order
    assert isinstance(there, dict)
