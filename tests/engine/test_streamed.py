"""The streamed executor: I6 (equal to the resident one), what is on the device at a time, and lost chunks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar

import jax
import numpy as np
import pytest
from conftest import FAMILIES, HF, TWO_STAGES, family_model, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.engine.device_layers import PlacedLayers
from cacheblend_jax.engine.layer_stream import LayerStream
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.loading import LostChunkError, load_all, shares
from cacheblend_jax.model import LayerKV
from cacheblend_jax.runtime.host_buffers import HostBuffers
from cacheblend_jax.runtime.link import SimulatedLink

# Every family, every selector (those that read attention with sliding windows), and ratios from 0 to 1.
CASES = [("llama2", "random", 0.2), ("llama3", "hkvd", 0.4), ("mistral", "cross", 0.3), ("qwen2", "query", 0.3)]
CASES += [("qwen3", "oracle", 0.2), ("gemma3", "hkvd", 0.1), ("every_option", "epic", 0.2)]
CASES += [("llama2", "hkvd", 0.0), ("llama2", "hkvd", 1.0)]


def engines(model, blend=TWO_STAGES, store=None, **options):
    """A resident and a streamed engine over one store."""
    store = cb.ChunkStore() if store is None else store
    return [cb.Engine(model, store, blend, executor=executor, **options) for executor in ("resident", "streamed")]


def assert_same(out, wanted, tolerance=2e-6):
    assert (out.stats.executor, wanted.stats.executor) == ("streamed", "resident")
    np.testing.assert_array_equal(out.recomputed, wanted.recomputed)
    assert relative_error(out.logits, wanted.logits) < tolerance
    assert relative_error(out.cache.k, wanted.cache.k) < tolerance
    assert relative_error(out.cache.v, wanted.cache.v) < tolerance
    assert out.next_token == wanted.next_token
    assert out.stats.flops == wanted.stats.flops


def test_every_selector_and_family_has_a_case():
    families, selectors, _ = zip(*CASES, strict=True)
    assert set(families) == set(FAMILIES)
    assert set(selectors) == set(cb.SELECTORS)


@pytest.mark.parametrize(("family", "selector", "ratio"), CASES)
def test_i6_streamed_is_resident(family, selector, ratio):
    stages = 4 if family == "llama3" else 2  # four have more to compile
    resident, streamed = engines(family_model(family), cb.BlendConfig(ratio, selector, num_stages=stages))
    prompt, other = random_prompt(1), random_prompt(2, (25, 30, 33))
    for each in (prompt, other, prompt):  # the second leaves its KV in the buffers that the third uses
        resident.precompute(each)
        assert_same(streamed.prefill(each), resident.prefill(each))


@pytest.mark.once
@pytest.mark.parametrize("mode", ["prefix", "reuse", "blend"])
def test_i6_with_misses_and_an_exact_chunk(mode):
    resident, streamed = engines(family_model("mistral"), cb.BlendConfig(0.3, num_stages=2), context_tokens=None)
    prompt = random_prompt(3)
    resident.precompute(prompt.chunks[:1] + prompt.chunks[2:], prefix=prompt.prefix)
    wanted = resident.prefill(prompt, mode)
    resident.flush()
    resident.store.clear()
    resident.precompute(prompt.chunks[:1] + prompt.chunks[2:], prefix=prompt.prefix)
    out = streamed.prefill(prompt, mode)
    assert out.stats.exact == 9 + 30
    assert_same(out, wanted)


def test_i6_on_a_mesh():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    resident, streamed = engines(
        cb.load_model(HF / "qwen3", dtype="float32", mesh=mesh), cb.BlendConfig(selector="query", num_stages=1)
    )
    prompt = random_prompt(28)
    resident.precompute(prompt)
    for _ in range(2):
        assert_same(streamed.prefill(prompt), resident.prefill(prompt), 1e-5)


@pytest.mark.once
def test_a_streamed_cache_decodes_on():
    resident, streamed = engines(family_model("llama3"))
    prompt = random_prompt(4)
    resident.precompute(prompt)
    wanted = resident.generate(prompt, max_new_tokens=5, stop_token_ids=()).token_ids
    assert streamed.generate(prompt, max_new_tokens=5, stop_token_ids=()).token_ids == wanted


def test_auto_streams_what_comes_from_a_slow_tier():
    store, model, prompt = cb.ChunkStore(), family_model("llama3"), random_prompt(5)
    with cb.Engine(model, store, TWO_STAGES) as engine:
        engine.precompute(prompt)
        assert engine.prefill(prompt).stats.executor == "resident"
    with cb.Engine(model, cb.store.ThrottledStore(store, 1e12), TWO_STAGES) as engine:
        assert engine.prefill(prompt).stats.executor == "streamed"
        assert engine.prefill(prompt, "full").stats.executor == "resident"
    with cb.Engine(model, cb.store.ThrottledStore(store, 1e12), TWO_STAGES, executor="resident") as engine:
        assert engine.prefill(prompt).stats.executor == "resident"


@pytest.mark.once
def test_auto_streams_from_host_memory_where_the_link_is_hidden():
    store, model, prompt = cb.ChunkStore(), family_model("llama3"), random_prompt(5)
    link = SimulatedLink(1e12)
    with cb.Engine(model, store, TWO_STAGES) as at_hand, cb.Engine(model, store, TWO_STAGES, link=link) as engine:
        engine.precompute(prompt)
        assert_same(engine.prefill(prompt), at_hand.prefill(prompt))
        assert engine.prefill(prompt, "full").stats.executor == "resident"
        assert engine.estimator().host_streams
        assert not at_hand.estimator().host_streams
        engine.warmup(128, prefix_tokens=9, suffix_tokens=7)
        assert engine.prefill(prompt).stats.compile_s == 0


def test_stored_kv_alone_goes_over_the_link(monkeypatch):
    model, prompt, sent = family_model("llama3"), random_prompt(5), []
    for executor in ("streamed", "resident"):
        link = SimulatedLink(1e12)
        monkeypatch.setattr(link._throttle, "wait_for", sent.append)
        with cb.Engine(model, cb.ChunkStore(), TWO_STAGES, executor=executor, link=link) as engine:
            engine.precompute(prompt)
            cache = engine.prefill(prompt).padded_cache
            assert sum(sent) == cache.k.nbytes + cache.v.nbytes
            sent.clear()


def test_nothing_compiles_for_another_prompt_of_the_bucket_and_ratios_share_programs():
    # A model of its own, which shares no programs with other tests.
    (_, streamed), prompt = engines(cb.model.random_model(FAMILIES["llama3"], seed=7)), random_prompt(6)
    streamed.warmup(128, prefix_tokens=9, suffix_tokens=7)
    count = streamed.model.runner.count
    for each in (prompt, random_prompt(7, (20, 50, 30))):
        streamed.precompute(each)
        assert streamed.prefill(each).stats.compile_s == 0
    assert streamed.model.runner.count == count + 1  # precompute's


class DeviceWatch(cb.Trace):
    """Counts, at the end of each span, the device buffers that hold one layer of cached K or V."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.shape, self.most = shape, 0
        self.before = jax.live_arrays()  # other tests' arrays of that shape; kept, so that no new one gets their ids

    def add(self, *span) -> None:
        known = {id(x) for x in self.before}
        arrays = [x for x in jax.live_arrays() if x.shape == self.shape and id(x) not in known]
        # JAX sometimes makes a second array of a buffer, but only buffers take memory.
        self.most = max(self.most, len({pointer for x in arrays if (pointer := self._pointer(x)) is not None}))
        super().add(*span)

    @staticmethod
    def _pointer(array) -> int | None:
        try:
            return array.unsafe_buffer_pointer()
        except (RuntimeError, ValueError):  # deleted, maybe just now
            return None


@pytest.mark.parametrize("prefetch_layers", [1, 2, 4])
@pytest.mark.parametrize("selector", ["hkvd", pytest.param("query", marks=pytest.mark.once)])
def test_at_most_prefetch_layers_of_cached_kv_are_on_the_device(selector, prefetch_layers):
    blend, prompt = replace(TWO_STAGES, selector=selector), random_prompt(8)
    _, streamed = engines(family_model("llama3"), blend, prefetch_layers=prefetch_layers)
    streamed.precompute(prompt)
    streamed.prefill(prompt)
    watch = DeviceWatch((128, 2, 8))
    before = len(jax.live_arrays())
    out = streamed.prefill(prompt, trace=watch)
    assert 0 < watch.most <= 2 * prefetch_layers  # K and V
    assert watch.spans
    out.padded_cache.k.delete()
    out.padded_cache.v.delete()
    del out
    assert len(jax.live_arrays()) <= before + 2  # nothing is left behind but the tables


def test_the_blended_cache_is_written_in_place():
    (_, streamed), prompt = engines(cb.model.random_model(FAMILIES["llama3"], seed=7)), random_prompt(9)
    streamed.precompute(prompt)
    streamed.prefill(prompt)
    stack = "f32[6,128,2,8]"
    writers = [text for text in streamed.model.runner.texts() if text.split("->")[0].count(stack) == 2]
    assert writers
    for text in writers:
        assert text.splitlines()[0].count("may-alias") + text.splitlines()[0].count("must-alias") == 2


class FaultyStore(cb.store.ThrottledStore):
    """Fails once, reading `layer` of the `number`-th chunk opened; drops a damaged entry, as a store does."""

    def __init__(self, store, number: int, layer: int, error: Exception) -> None:
        super().__init__(store, 1e12)
        self.number, self.layer, self.error, self.opened = number, layer, error, 0

    def open(self, key):
        chunk = super().open(key)
        if chunk is not None:
            self.opened += 1
            if self.opened == self.number:
                self._fail(key, chunk)
        return chunk

    def _fail(self, key, chunk) -> None:
        read_layer = chunk.read_layer

        def fail(layer, heads=None):
            if layer == self.layer:
                if isinstance(self.error, cb.DamagedEntryError):
                    self.wrapped.remove(key)
                raise self.error
            return read_layer(layer)

        chunk.read_layer = fail


DAMAGED, STALE = cb.DamagedEntryError("chunk: layer 4 is damaged"), OSError("stale file handle")


@pytest.mark.once
@pytest.mark.parametrize("executor", ["resident", "streamed"])
@pytest.mark.parametrize(("layer", "error"), [(0, DAMAGED), (4, STALE)])
def test_a_lost_chunk_becomes_a_miss_and_the_answer_is_right(executor, layer, error, caplog):
    model, store, prompt = family_model("qwen2"), cb.ChunkStore(), random_prompt(10)
    blend = cb.BlendConfig(0.3, num_stages=1)
    faulty = FaultyStore(store, number=3, layer=layer, error=error)  # the prefix is opened first
    with cb.Engine(model, faulty, blend, executor=executor) as engine:
        engine.precompute(prompt)
        wanted = engine.prefill(prompt, "full")
        out = engine.prefill(prompt)
        assert (out.stats.damaged, out.stats.hits, out.stats.misses) == (1, 3, 1)
        assert out.recomputed.all()  # the others of its tier are not trusted
        assert relative_error(out.logits, wanted.logits) < 2e-6
        assert "computed instead" in caplog.text
        engine.flush()
        again = engine.prefill(prompt)
    assert (again.stats.damaged, again.stats.hits) == (0, 4)


@pytest.mark.once
@pytest.mark.parametrize(
    ("shape", "dtype", "executor", "tier"),
    [
        ((6, 1, 2, 8), np.float32, "resident", "host"),  # one token would be broadcast to all
        ((6, 1, 2, 8), np.float32, "streamed", "device"),
        ((6, 40, 2, 8), np.float16, "resident", "device"),  # another dtype would be cast
        ((6, 40, 2, 8), np.float16, "streamed", "host"),
        ((3, 40, 2, 8), np.float32, "resident", "host"),
        ((3, 40, 2, 8), np.float32, "streamed", "device"),
        ((6, 40, 4, 4), np.float32, "resident", "device"),
        ((6, 40, 4, 4), np.float32, "streamed", "host"),
    ],
)
def test_an_entry_that_is_not_the_chunks_is_a_miss(executor, shape, dtype, tier):
    model, prompt = family_model("qwen2"), random_prompt(12)
    store = cb.ChunkStore(device_bytes=2**24 if tier == "device" else 0)
    with cb.Engine(model, store, cb.BlendConfig(0.3, num_stages=1), executor=executor) as engine:
        keys = engine.precompute(prompt)
        store.put(keys[1], cb.ChunkEntry(*(np.ones(shape, dtype) for _ in range(2))))
        if tier == "device":
            store.promote(keys[1], engine._groups.first.to_device)
        with store.open(keys[1]) as chunk:
            assert (chunk.tier, chunk.shape, chunk.dtype) == (tier, shape, dtype)
        out = engine.prefill(prompt)
        assert (out.stats.damaged, out.stats.hits, out.stats.misses) == (1, 3, 1)
        assert out.recomputed[:, 39:79].all()
        engine.flush()
        again = engine.prefill(prompt)
    assert (again.stats.damaged, again.stats.hits) == (0, 4)


class Unreadable(cb.store.ThrottledStore):
    """Opens every entry and fails to read any."""

    def open(self, key):
        chunk = super().open(key)
        if chunk is not None:
            chunk.read_layer = self.fail
        return chunk

    def fail(self, layer, heads=None):
        raise OSError("the mount is gone")


@pytest.mark.once
def test_a_store_none_of_whose_chunks_can_be_read_costs_one_restart_and_no_compilation(monkeypatch, caplog):
    prompt, runs = random_prompt(11), []
    model = cb.model.random_model(FAMILIES["llama3"], seed=7)  # of its own: its programs are no other test's
    with cb.Engine(model, Unreadable(cb.ChunkStore(), 1e12), cb.BlendConfig(num_stages=1)) as engine:
        run = engine._groups.first.run
        monkeypatch.setattr(engine._groups.first, "run", lambda plan, *rest: (runs.append(plan), run(plan, *rest))[1])
        engine.precompute(prompt)
        engine.warmup(128, prefix_tokens=9, suffix_tokens=7)
        count = model.runner.count
        out = engine.prefill(prompt)
        assert (out.stats.damaged, out.stats.hits, out.stats.compile_s) == (1, 4, 0)  # the prefix is no chunk
        assert out.recomputed.all()
        engine.flush()
        full = engine.prefill(prompt, "full")
    assert [plan.nothing_cached for plan in runs] == [False, True, True]
    assert model.runner.count == count
    assert relative_error(out.logits, full.logits) < 1e-5
    assert caplog.text.count("computed instead") == 1


@pytest.mark.once
def test_a_tier_that_is_left_alone_makes_no_request_compile(tmp_path):
    prompt = random_prompt(14)
    model = cb.model.random_model(FAMILIES["llama3"], seed=7)
    with cb.ChunkStore(tmp_path) as store, cb.Engine(model, store) as engine:
        engine.precompute(prompt)
    with cb.ChunkStore(tmp_path) as store, cb.Engine(model, store, cb.BlendConfig(num_stages=1)) as engine:
        engine.warmup(128, prefix_tokens=9, suffix_tokens=7)
        store.get(engine.precompute(prompt)[0])  # in memory: it could be reused, with programs of its own
        for _ in range(3):
            store._disk.disk.health.failed("the mount is gone")
        count = model.runner.count
        out = engine.prefill(prompt)
        assert (out.stats.hits, out.stats.misses, model.runner.count) == (1, 3, count)
        assert out.recomputed.all()
        engine.flush()
        assert engine.prefill(prompt).stats.misses == 0  # from memory
        assert store.stats.skipped == 4


class Rows:
    """A chunk whose layer l holds the value l."""

    tier, device_entry, host_entry, kv_dtype, has_k_offset = "host", None, None, None, False
    num_layers, num_bytes = 7, 0

    def __init__(self, tokens: int, fail_at: int | None = None) -> None:
        self.num_tokens, self.fail_at = tokens, fail_at
        self.shape, self.dtype = (7, tokens, 1, 2), np.dtype(np.float32)

    def read_layer(self, layer, heads=None):
        if layer == self.fail_at:
            raise cb.DamagedEntryError("damaged")
        return np.full((self.num_tokens, 1, 2), layer, np.float32), np.full((self.num_tokens, 1, 2), -layer, np.float32)

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def placed(chunk, start):
    ids = np.zeros(chunk.num_tokens, np.int32)
    return PlacedChunk("key", "", ids[:0], ids, start, stored=chunk)


def in_memory(tokens, megabytes, tier="host"):
    chunk = Rows(tokens)
    chunk.tier, chunk.num_bytes = tier, chunk.num_layers * megabytes * 2**20
    return chunk


def test_what_is_in_memory_is_cut_into_equal_shares_and_every_row_is_in_one():
    chunks = [placed(in_memory(tokens, tokens), start) for tokens, start in ((3, 0), (10, 3), (4, 13))]
    parts = shares(chunks, 4)
    assert [sum(piece.stop - piece.first for piece in part) for part in parts] == [5, 5, 5, 2]
    rows = [piece.chunk.start + row for part in parts for piece in part for row in range(piece.first, piece.stop)]
    assert rows == list(range(17))


def test_little_is_not_cut_and_a_slow_tiers_chunk_is_read_at_once():
    small, slow = placed(in_memory(9, 1), 0), placed(in_memory(9, 50, "disk"), 9)
    parts = shares([slow, small, small], 8)
    assert [[(piece.first, piece.stop) for piece in part] for part in parts] == [[(0, 9)], [(0, 9)], [(0, 9)]]
    assert parts[0][0].chunk is slow
    few = shares([placed(in_memory(9, 1), 0), placed(in_memory(2, 0), 9)], 8)
    assert [[(piece.first, piece.stop) for piece in part] for part in few] == [[(0, 9), (0, 2)]]


@pytest.mark.parametrize("threads", [1, 3])
def test_shares_copy_what_one_thread_would(readers, threads):
    k = np.zeros((7, 16, 1, 2), np.float32)
    v = k.copy()
    load_all([placed(in_memory(4, 40), 2), placed(in_memory(7, 40), 8)], k, v, readers, threads=threads)
    np.testing.assert_array_equal(k[:, 2:6], np.broadcast_to(np.arange(7)[:, None, None, None], (7, 4, 1, 2)))
    np.testing.assert_array_equal(v[:, 8:15], -np.broadcast_to(np.arange(7)[:, None, None, None], (7, 7, 1, 2)))
    assert not k[:, [0, 1, 6, 7, 15]].any()


@pytest.fixture
def readers():
    with ThreadPoolExecutor(4) as readers:
        yield readers


def stream_of(chunk, layers, readers, host_layers=3, device_layers=2):
    buffers = HostBuffers(np.dtype(np.float32)).arrays((host_layers, 16, 1, 2))
    return LayerStream([placed(chunk, 2)], layers, buffers, device_layers, jax.device_put, readers)


def test_a_buffer_is_not_filled_again_before_its_step_is_done(readers):
    layers = [*range(7), *range(7)]
    with stream_of(Rows(4), layers, readers) as stream:
        for layer in layers:
            kv = stream.next()
            result = jax.jit(lambda kv: jax.tree.map(lambda x: x * 1, kv))(kv)
            stream.used_until(result.v)
            np.testing.assert_array_equal(np.asarray(result.k)[2:6], np.full((4, 1, 2), layer))
            np.testing.assert_array_equal(np.asarray(result.v)[2:6], np.full((4, 1, 2), -layer))
            np.testing.assert_array_equal(np.asarray(result.k)[6:], 0)


def test_a_layer_that_its_buffer_still_holds_is_not_read_again(readers):
    rows, read = Rows(4), []
    read_layer = rows.read_layer
    rows.read_layer = lambda layer, heads=None: read.append(layer) or read_layer(layer)
    with stream_of(rows, [*range(5), *range(5)], readers, host_layers=5) as stream:
        for layer in [*range(5), *range(5)]:
            kv = stream.next()
            result = jax.jit(lambda kv: jax.tree.map(lambda x: x * 1, kv))(kv)
            stream.used_until(result.v)
            np.testing.assert_array_equal(np.asarray(result.k)[2:6], np.full((4, 1, 2), layer))
    assert sorted(read) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("room", [2, 4])
def test_layers_that_stay_are_neither_read_nor_sent_and_the_others_once(readers, room):
    rows, read, sent = Rows(4), [], []
    read_layer = rows.read_layer
    rows.read_layer = lambda layer, heads=None: read.append(layer) or read_layer(layer)

    def put(pair):
        sent.append(int(pair[0][2, 0, 0]))
        return jax.device_put([x.copy() for x in pair])

    there = {layer: LayerKV(*(jax.numpy.full((16, 1, 2), s * layer, np.float32) for s in (1, -1))) for layer in (0, 1)}
    kept, layers = PlacedLayers(room, 0, there), [*range(5), *range(5)]
    buffers = HostBuffers(np.dtype(np.float32)).arrays((5, 16, 1, 2))
    with LayerStream([placed(rows, 2)], layers, buffers, 2, put, readers, kept=kept) as stream:
        for layer in layers:
            kv = stream.next()
            assert (float(kv.k[2, 0, 0]), float(kv.v[5, 0, 1])) == (layer, -layer)
            stream.used_until(kv.v * 1)
    assert sorted(read) == [2, 3, 4]
    assert sorted(sent) == ([2, 2, 3, 3, 4, 4] if room == 2 else [2, 3, 4, 4])
    assert sorted(kept.layers) == list(range(room))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept.layers))


@pytest.mark.once
def test_a_pass_of_the_question_reads_no_layer_twice():
    store, prompt = cb.ChunkStore(), random_prompt(29)
    throttled = cb.store.ThrottledStore(store, 1e12)
    engine = cb.Engine(family_model("llama3"), throttled, replace(TWO_STAGES, selector="query"))
    engine.precompute(prompt)
    engine.prefill(prompt)
    waits = []
    throttled.wait_for = waits.append
    assert engine.prefill(prompt).stats.executor == "streamed"
    assert len(waits) == engine.model.config.num_layers * 5  # of the prefix and four chunks


def test_no_layer_arrives_beyond_the_bound_until_one_is_released(readers):
    put, arrived = [], threading.Event()

    def device_put(kv):
        put.append(kv)
        if len(put) == 3:
            arrived.set()
        return jax.device_put(kv)

    buffers = HostBuffers(np.dtype(np.float32)).arrays((3, 16, 1, 2))
    stream = LayerStream([placed(Rows(4), 0)], range(5), buffers, 2, device_put, readers)
    with stream:
        stream.next(), stream.next()
        assert len(put) == 2  # the third waits, since neither layer was released
        stream.used_until(jax.numpy.zeros(()))
        assert arrived.wait(300)


class Order:
    """Notes when layers are sent and handed over; steps end when they are told to."""

    def __init__(self, chunk, readers, device_layers, sent_ahead) -> None:
        self.sent: list[int] = []
        self.all_sent = threading.Semaphore(0)
        buffers = HostBuffers(np.dtype(np.float32)).arrays((8, 16, 1, 2))
        how = {"sent_ahead": sent_ahead}
        self.stream = LayerStream([placed(chunk, 2)], range(7), buffers, device_layers, self.put, readers, **how)

    def put(self, kv):
        self.sent.append(int(kv[0][2, 0, 0]))
        self.all_sent.release()
        return jax.device_put([x.copy() for x in kv])

    def wait_for(self, count) -> list[int]:
        for _ in range(count):
            assert self.all_sent.acquire(timeout=300)
        return self.sent


def test_later_layers_are_sent_before_a_step_is_dispatched(readers):
    order = Order(Rows(4), readers, device_layers=4, sent_ahead=2)
    with order.stream as stream:
        stream.next()
        assert order.wait_for(3)[:3] == [0, 1, 2]
        stream.next()  # needs layer 3, for which there is room
        assert order.wait_for(1) == [0, 1, 2, 3]
        for layer in range(2, 7):
            stream.used_until(jax.numpy.zeros(()))  # of the layer before: makes room for the next
            assert int(stream.next().k[2, 0, 0]) == layer
            assert order.sent[-1] == min(layer + 2, 6)
        stream.used_until(jax.numpy.zeros(()))


def test_a_slow_tiers_next_layer_is_not_waited_for(readers):
    chunk, arrived = Rows(4), threading.Event()
    chunk.tier, read = "disk", chunk.read_layer

    def read_layer(layer, heads=None):
        if layer == 1:
            assert arrived.wait(300)
        return read(layer)

    chunk.read_layer = read_layer
    order = Order(chunk, readers, device_layers=4, sent_ahead=2)
    with order.stream as stream:
        assert int(stream.next().k[2, 0, 0]) == 0
        assert order.sent == [0]
        arrived.set()
        stream.used_until(jax.numpy.zeros(()))
        for _ in range(6):
            stream.next()
            stream.used_until(jax.numpy.zeros(()))


@pytest.mark.once
def test_steps_take_no_number_from_the_host(monkeypatch):
    """It would reach the device behind the layers on their way."""
    _, streamed = engines(family_model("qwen2"), cb.BlendConfig(0.3, "query", num_stages=2))
    prompt = random_prompt(3)
    streamed.precompute(prompt)
    streamed.prefill(prompt)
    model, arrays = streamed.model, []
    run = type(model.runner).__call__

    def spy(runner, function, *given, **options):
        arrays.extend(jax.tree.leaves(given))
        return run(runner, function, *given, **options)

    monkeypatch.setattr(type(model.runner), "__call__", spy)
    streamed.prefill(prompt)
    assert arrays
    assert all(isinstance(leaf, jax.Array) for leaf in arrays)


def test_a_loss_reaches_the_loop_after_the_layers_before_it_and_nothing_is_left_running(readers):
    with stream_of(Rows(4, fail_at=3), range(6), readers) as stream:
        for layer in range(3):
            kv = stream.next()
            assert isinstance(kv, LayerKV)
            assert float(kv.k[2, 0, 0]) == layer
            stream.used_until(kv.k * 1)
        with pytest.raises(LostChunkError, match="damaged") as error:
            stream.next()
    assert error.value.key == "key"
    assert not any("lane" in thread.name for thread in threading.enumerate())


def refuse_lanes(monkeypatch, number: int) -> threading.Event:
    """Lets the `number`-th lane and all later ones not start until the result is set."""
    start, started, ok = threading.Thread.start, [], threading.Event()

    def start_or_refuse(thread):
        if "lane" in thread.name and not ok.is_set():
            started.append(thread)
            if len(started) >= number:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
    return ok


@pytest.mark.parametrize("number", [1, 2])
def test_a_lane_that_cannot_start_leaves_no_other_waiting(readers, monkeypatch, number):
    ok, before = refuse_lanes(monkeypatch, number), set(threading.enumerate())
    with pytest.raises(cb.CacheBlendError, match="can't start new thread; let the process have more threads"):
        stream_of(Rows(4), range(5), readers)
    assert not any("lane" in thread.name for thread in set(threading.enumerate()) - before)
    ok.set()
    with stream_of(Rows(4), range(5), readers) as stream:
        for layer in range(5):
            kv = stream.next()
            assert float(kv.k[2, 0, 0]) == layer
            stream.used_until(kv.k * 1)


def test_without_reading_threads_the_requests_own_reads():
    class Refusing(ThreadPoolExecutor):
        kept: ClassVar[list] = []

        def submit(self, task):
            self.kept.append(task)  # as the standard library's pool does
            raise RuntimeError("can't start new thread")

    pool, k = Refusing(), np.zeros((7, 16, 1, 2), np.float32)
    chunk = Rows(4)
    chunk.tier = "disk"
    load_all([placed(chunk, 2)], k, k.copy(), pool)
    np.testing.assert_array_equal(k[:, 2, 0, 0], range(7))
    k[:] = 0  # in use for another request
    assert len(pool.kept) == 7
    for task in pool.kept:
        task()
    assert not k.any()


class ManualTime:
    """A clock that only sleeping advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_throttled_tier_takes_latency_and_bytes_over_bandwidth():
    time, store = ManualTime(), cb.ChunkStore()
    entry = cb.ChunkEntry(*(np.zeros((2, 10, 1, 5), np.float32) for _ in range(2)))
    throttled = cb.store.ThrottledStore(store, 400.0, 0.5, clock=time.clock, sleep=time.sleep)
    assert throttled.put("key", entry)
    assert "key" in throttled
    assert len(throttled) == 1
    assert throttled.open("other") is None
    with throttled.open("key") as chunk:
        assert (chunk.tier, chunk.num_tokens, chunk.num_layers, chunk.num_bytes) == ("disk", 10, 2, 800)
        assert time.now == 100.0
        chunk.read_layer(1)
        assert time.now == pytest.approx(100.0 + 0.5 + 1.0)
    throttled.get("key")
    assert time.now == pytest.approx(101.5 + 0.5 + 2.0)


def test_readers_of_a_throttled_tier_share_its_bandwidth():
    slept: list[float] = []
    throttled = cb.store.ThrottledStore(cb.ChunkStore(), 100.0, 0.25, clock=lambda: 0.0, sleep=slept.append)
    for _ in range(3):  # all at the same instant: latencies overlap, bytes do not
        throttled.wait_for(100)
    assert slept == pytest.approx([1.25, 2.25, 3.25])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cb.store.ThrottledStore(cb.ChunkStore(), 0), "bytes_per_s must be positive and finite, got 0"),
        (lambda: cb.store.ThrottledStore(cb.ChunkStore(), -1.0), "bytes_per_s must be positive"),
        (lambda: cb.store.ThrottledStore(cb.ChunkStore(), 1.0, -1.0), "latency_s must be at least 0"),
        (lambda: cb.Engine(family_model("llama3"), executor="fast"), "unknown executor 'fast'; expected one of auto"),
        (lambda: cb.Engine(family_model("llama3"), prefetch_layers=0), "prefetch_layers must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
    with pytest.raises(cb.CacheBlendError, match=message):
        make()
