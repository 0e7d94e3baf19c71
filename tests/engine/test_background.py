"""Background work: no request waits behind others' chunks, exits lose nothing, failures are logged."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import FAMILIES, HF, TWO_STAGES, family_model, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.engine import groups
from cacheblend_jax.engine.precomputing import place_ahead
from cacheblend_jax.errors import NotReadyError
from cacheblend_jax.store.packing import ARRAY_OVERHEAD, PACK_OVERHEAD


@pytest.fixture
def slow_storing(monkeypatch):
    """An engine that stores missing chunks only once the test allows it."""
    go_on = threading.Event()
    engine = cb.Engine(family_model("llama3"), blend=TWO_STAGES)
    compute = engine._background._standalone
    monkeypatch.setattr(engine._background, "_standalone", lambda missing: (go_on.wait(300), compute(missing))[1])
    yield engine, go_on
    go_on.set()
    engine.close()


def test_a_chunk_behind_those_of_others_is_computed_and_not_waited_for(slow_storing):
    engine, go_on = slow_storing
    others, ours = random_prompt(20), random_prompt(21)
    engine.prefill(others)
    engine.prefill(ours)
    out = engine.prefill(ours)
    assert not go_on.is_set()  # it would have waited until then
    assert (out.stats.hits, out.stats.misses) == (0, 4)
    go_on.set()
    engine.flush()
    assert engine.prefill(ours).stats.misses == 0


def test_waiting_for_ones_own_chunks_counts_and_keeps_nobody_else_waiting(slow_storing, monkeypatch):
    engine, go_on = slow_storing
    prompt, other = random_prompt(22), random_prompt(23, (20,))
    engine.prefill(prompt)
    next_of, waits = engine._background.next_of, threading.Event()
    with pytest.raises(NotReadyError, match="being stored") as refused:
        engine.prefill(prompt, only_if_ready=True)
    monkeypatch.setattr(engine._background, "next_of", lambda keys: (waits.set(), next_of(keys))[1])
    found = []
    thread = threading.Thread(target=lambda: found.append(engine.prefill(prompt)))
    thread.start()
    assert waits.wait(300)
    engine.prefill(other, "full")
    assert not found
    go_on.set()
    thread.join()
    refused.value.work()
    engine.prefill(prompt, only_if_ready=True)
    (out,) = found
    assert (out.stats.hits, out.stats.misses) == (4, 0)
    assert out.stats.wait_s > 0
    assert out.stats.host_s + out.stats.wait_s < out.stats.ttft_s


def test_what_precompute_refuses_as_too_long_with_its_context_is_not_stored_either(monkeypatch):
    stored, most = [], family_model("llama3").config.max_positions
    with cb.Engine(family_model("llama3"), blend=TWO_STAGES, context=[5] * (most - 22)) as engine:
        monkeypatch.setattr(engine._background, "store_later", lambda chunk, **_: stored.append(chunk.num_tokens))
        prompt = cb.Prompt([1, 2], [[3] * 21, [4] * 20], [6])
        with pytest.raises(cb.PromptError, match="chunk 0 with its context"):
            engine.precompute(prompt)
        engine.prefill(prompt)
    assert stored == [2, 20]


def test_a_thread_that_cannot_be_started_keeps_nobody_waiting(monkeypatch):
    start, failed = threading.Thread.start, []

    def fail_once(thread):
        if not failed and thread.name.startswith("cacheblend-store"):
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    with cb.Engine(family_model("llama3"), blend=TWO_STAGES) as engine:
        engine.prefill(random_prompt(27))
        engine.flush()
        assert failed
        engine.prefill(random_prompt(28))
        engine.flush()
        assert engine.prefill(random_prompt(28)).stats.misses == 0


def test_kv_of_other_weights_is_not_stored_under_the_old_key(slow_storing):
    engine, go_on = slow_storing
    model = cb.model.random_model(FAMILIES["llama3"], seed=7)
    engine = cb.Engine(model, blend=TWO_STAGES)
    compute, engine._background._standalone = engine._background._standalone, None
    engine._background._standalone = lambda missing: (go_on.wait(300), compute(missing))[1]
    engine.prefill(random_prompt(29))
    kernel = model.params.layers["v_proj"]["kernel"]
    model.params.layers["v_proj"]["kernel"] = kernel * 2
    go_on.set()
    engine.flush()
    assert len(engine.store) == 0
    assert engine.prefill(random_prompt(29)).stats.misses == 4
    engine.close()


def test_a_chunk_that_is_there_and_cannot_be_read_is_stored_again(monkeypatch):
    store, prompt = cb.ChunkStore(), random_prompt(24)
    with cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        (key, *_) = engine.precompute(prompt)
        fresh = []
        put = store.put
        monkeypatch.setattr(store, "put", lambda key, entry: (fresh.append(key), put(key, entry))[1])
        chunk = store.open(key)
        monkeypatch.setattr(type(chunk), "read_layer", _fails_once(type(chunk).read_layer))
        chunk.close()
        out = engine.prefill(prompt)
        engine.flush()
    assert out.stats.damaged == 1
    assert len(fresh) == 1


def _fails_once(read_layer):
    reads = itertools.count()  # by several threads

    def read(self, layer, heads=None):
        if next(reads) == 0:
            raise OSError("input/output error")
        return read_layer(self, layer)

    return read


def test_a_failing_promotion_is_told_of_and_one_without_room_is_left(tmp_path, monkeypatch, caplog):
    prompt = random_prompt(25)
    with cb.ChunkStore(tmp_path) as store, cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        engine.precompute(prompt)
    with cb.ChunkStore(tmp_path) as store, cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        tried = []

        def promote(key, to_device):
            tried.append(key)
            raise MemoryError("no room")

        monkeypatch.setattr(store, "promote", promote)
        engine.prefill(prompt)
        engine.flush()
        assert len(tried) == 5
        assert "could not be promoted to a faster tier" in caplog.text
        monkeypatch.setattr(store, "host_bytes", 500)
        engine.prefill(prompt)
        engine.flush()
        assert len(tried) == 5


def test_what_is_too_large_for_memory_still_goes_to_the_device(tmp_path):
    options = {"host_bytes": 1, "device_bytes": 10**7}
    with cb.ChunkStore(tmp_path, **options) as store, cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        engine.precompute(random_prompt(30))
        engine.flush()
        engine.prefill(random_prompt(30))
        engine.flush()
        assert store.stats.device.entries == 5


def test_a_store_that_fails_to_open_a_chunk_leaves_no_other_open(monkeypatch):
    store, prompt = cb.ChunkStore(), random_prompt(26)
    with cb.Engine(family_model("llama3"), store, TWO_STAGES) as engine:
        keys = engine.precompute(prompt)
        find = store.open

        def open_or_fail(key):
            if key == keys[-1]:
                raise RuntimeError("no such tier")
            return find(key)

        monkeypatch.setattr(store, "open", open_or_fail)
        with pytest.raises(RuntimeError, match="no such tier"):
            engine.prefill(prompt)
    assert not +store._memory.host._pins


def test_a_prefix_longer_than_the_model_is_named_before_any_work():
    engine = cb.Engine(cb.model.random_model(FAMILIES["llama3"]), blend=TWO_STAGES)
    with pytest.raises(cb.PromptError, match="the prefix has 2049 tokens"):
        engine.precompute([[1, 2]], prefix=np.ones(2049, np.int32))
    assert len(engine.store) == 0


def test_a_process_that_just_ends_has_stored_its_misses(tmp_path):
    code = """
import sys
import cacheblend_jax as cb
engine = cb.Engine(cb.load_model(sys.argv[1]), cb.ChunkStore(sys.argv[2]))
engine.prefill(cb.Prompt("Answer.", ["The sky is blue.", "Grass is green."], "What is blue?"))
"""
    subprocess.run([sys.executable, "-c", code, HF / "llama3", tmp_path], check=True)
    with cb.ChunkStore(tmp_path) as store:
        assert len(store) == 3  # the prefix too


def test_what_waits_is_bounded_and_without_duplicates_and_drops_are_counted(slow_storing, monkeypatch, caplog):
    engine, go_on = slow_storing
    monkeypatch.setattr("cacheblend_jax.engine.background.MAX_PENDING", 3)
    background, promoted = engine._background, []
    monkeypatch.setattr(engine.store, "promote", lambda key, to_device: promoted.append(key))
    engine.prefill(random_prompt(31))  # with its prefix, five are missing
    for key in "aabbcdd":
        background.promote_later(key, 1)
    assert (engine.background_stats.dropped, engine.background_stats.not_promoted) == (2, 2)
    assert caplog.text.count("chunks are not stored: 3 wait to be computed") == 1
    go_on.set()
    engine.flush()
    assert promoted == ["a", "b", "c"]
    background.promote_later("d", 1)
    engine.flush()
    assert promoted[3:] == ["d"]
    engine.close()
    background.promote_later("e", 1)
    engine.prefill(random_prompt(32, (20,)))
    assert (engine.background_stats.dropped, engine.background_stats.not_promoted) == (4, 3)


def test_what_two_lanes_miss_at_the_same_time_is_stored_once(slow_storing, monkeypatch):
    engine, go_on = slow_storing
    background, submitted = engine._background, []
    (chunk,) = place_ahead([[1, 2, 3]], "", engine._prefiller, engine._context, engine.model)
    submit, other = background._thread.submit, threading.Thread(target=background.store_later, args=(chunk,))

    def submit_slowly(work):
        submitted.append(work)
        if len(submitted) == 1:
            other.start()
            other.join(0.1)  # waits until the first has submitted it
        return submit(work)

    monkeypatch.setattr(background._thread, "submit", submit_slowly)
    background.store_later(chunk)
    other.join()
    assert len(submitted) == 1
    go_on.set()
    engine.flush()
    assert engine.store.keys() == [chunk.key]


def test_a_closed_engine_leaves_no_threads(tmp_path):
    before, prompt = set(threading.enumerate()), random_prompt(33)

    def ours():
        return {thread.name for thread in set(threading.enumerate()) - before if "cacheblend" in thread.name}

    with cb.ChunkStore(tmp_path, host_bytes=1) as store:
        engine = cb.Engine(family_model("llama3"), store, cb.BlendConfig(num_stages=1))
        engine.precompute(prompt)
        engine.flush()
        out = engine.prefill(prompt)
        assert out.stats.executor == "streamed"
        assert ours()
        engine.close()
        assert {name for name in ours() if not name.startswith("cacheblend-write")} == set()
        again = engine.prefill(prompt)  # it still answers
        assert again.logits.tobytes() == out.logits.tobytes()
        engine.close()
    assert ours() == set()


def test_precompute_says_what_is_not_stored(caplog):
    prompt = random_prompt(34, (30, 30, 30, 30))
    size = 6 * 30 * 2 * 8 * 4 * 2
    with cb.Engine(family_model("llama3"), cb.ChunkStore(host_bytes=2 * size)) as engine:
        keys = engine.precompute(prompt.chunks)
        assert (len(keys), len(keys.unstored)) == (2, 2)
        assert all(key in engine.store for key in keys)
        assert "2 of 4 chunks are not stored: the store has no room" in caplog.text
        caplog.clear()
        keys = engine.precompute(prompt.chunks[:2])
        assert (len(keys), keys.unstored) == (2, [])
        assert not caplog.text


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_precompute_finds_does_not_go_for_what_it_stores(tmp_path, monkeypatch, lanes, on_disk):
    monkeypatch.setattr(groups, "num_lanes", lambda model: lanes)
    found, other, missing = random_prompt(35, (30, 30, 30)).chunks
    size = 6 * 30 * 2 * 8 * 4 * 2
    pack = size + PACK_OVERHEAD + 2 * ARRAY_OVERHEAD
    room = {"host_bytes": 1, "disk_bytes": 2 * pack} if on_disk else {"host_bytes": 2 * size}
    store = cb.ChunkStore(tmp_path if on_disk else None, **room)
    with store, cb.Engine(family_model("llama3"), store) as engine:
        for chunk in (found, other):
            engine.precompute([chunk])
            engine.flush()  # a pack for each
        engine.precompute([found, missing])
        engine.flush()
        assert [each.is_stored for each in engine.look_up([found, other, missing])] == [True, False, True]
