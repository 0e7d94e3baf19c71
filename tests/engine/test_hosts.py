"""Several hosts: all run the same programs, whatever one of them alone knows, and none waits for ever for another."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import FLAGS, HF, TWO_STAGES, family_model, random_prompt
from store_cases import key_of, make_entry

import cacheblend_jax as cb
from cacheblend_jax.engine.agreement import AgreedChunk, Alone, Choice, Together
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.loading import LostChunkError, load_all
from cacheblend_jax.runtime.hosts import Hosts, HostsError
from cacheblend_jax.runtime.link import SimulatedLink
from cacheblend_jax.runtime.placing import own_range
from cacheblend_jax.store.disk_chunk import DiskChunk
from cacheblend_jax.store.quantise import QuantisedRows

ROOT = Path(__file__).parents[2]


class Service:
    """JAX's coordination service, for hosts that are threads. Nobody waits for a host that has ended."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()
        self.has_ended = False

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            assert key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        with self.changed:
            self.changed.wait_for(lambda: key in self.values or self.has_ended, timeout=timeout_ms / 1e3)
            if key not in self.values:
                raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_try_get(self, key: str) -> str:
        return self.blocking_key_value_get(key, 0)

    def key_value_delete(self, prefix: str) -> None:
        with self.changed:
            self.values = {key: value for key, value in self.values.items() if not key.startswith(prefix)}


def on_each(work, count: int = 2, service: Service | None = None) -> list:
    """Returns what `work(hosts)` returns, or raises, on each of several hosts."""
    service = service or Service()

    def run(index: int):
        try:
            return work(Hosts(service, index, count, 300.0, "test"))
        except cb.CacheBlendError as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def rows_of(entry: cb.ChunkEntry) -> tuple:
    if entry.scales is None:
        return entry.k, entry.v
    return QuantisedRows(entry.k, entry.scales.k), QuantisedRows(entry.v, entry.scales.v)


def placed(seed: int, stored=None) -> PlacedChunk:
    return PlacedChunk(key_of(seed), "", np.zeros(0, np.int32), np.zeros(6, np.int32), 6 * seed, stored=stored)


def chunks_of(store: cb.ChunkStore, seeds) -> list[PlacedChunk]:
    return [placed(seed, store.open(key_of(seed))) for seed in seeds]


def test_the_first_host_decides_and_little_stays_in_the_service():
    service = Service()

    def work(hosts: Hosts):
        return [hosts.agree("a call", [hosts.index, number], lambda reports: reports) for number in range(5)]

    for told in on_each(work, 3, service):
        assert told == [[[0, number], [1, number], [2, number]] for number in range(5)]
    assert len(service.values) == 3  # of the last round


def test_a_host_that_fails_ends_the_others_requests():
    def work(hosts: Hosts):
        agreement = Together(hosts, cb.ChunkStore())
        with agreement.request():
            if hosts.index == failing:
                raise cb.CacheBlendError("no memory left")
            agreement.meet("a call")
        return None

    for failing in (0, 1):
        for index, error in enumerate(on_each(work)):
            told = "" if index == failing else f"host {failing} of 2 failed: CacheBlendError: "
            assert str(error) == f"{told}no memory left"


def test_after_a_failure_the_hosts_go_on():
    def work(hosts: Hosts):
        agreement = Together(hosts, cb.ChunkStore())
        with contextlib.suppress(cb.CacheBlendError), agreement.request():
            if hosts.index == 1:
                raise cb.CacheBlendError("a prompt too long")
            agreement.meet("a call")
        return agreement.lack("a", cb.ChunkStore())

    assert on_each(work) == [True, True]


def test_a_host_that_has_ended_costs_the_others_a_timeout_and_then_nothing():
    service = Service()
    service.has_ended = True
    hosts = Hosts(service, 0, 2, 30.0, "test")
    for _ in range(2):
        with pytest.raises(HostsError, match=r"one of 2 did not answer within 30 s .* restart all of them"):
            hosts.agree("a call", None, lambda reports: reports)
        service.blocking_key_value_get = None  # it is not asked again


def test_each_of_three_hosts_hears_of_one_that_fails_while_they_run_a_program():
    service, has_run = Service(), threading.Event()

    def work(index: int) -> str:
        hosts = Hosts(service, index, 3, 300.0, "test")
        if index == 2:
            hosts.give_up(MemoryError("no memory"))
            return ""
        with pytest.raises(HostsError) as raised:
            hosts.in_time(lambda: has_run.wait(300))
        return str(raised.value)

    with ThreadPoolExecutor(3) as threads:
        said = list(threads.map(work, range(3)))
    has_run.set()
    heard = "the hosts no longer agree: host 2 of 3 failed: MemoryError: no memory; restart all of them"
    assert said[:2] == [heard] * 2


def test_what_one_host_lacks_is_a_miss_on_all_and_the_slowest_tier_counts(tmp_path):
    def work(hosts: Hosts):
        with cb.ChunkStore(None if hosts.index == 0 else tmp_path) as store:
            agreement = Together(hosts, store)
            for seed in (0, 1, 2) if hosts.index == 0 else (0, 2):
                store.put(key_of(seed), make_entry(seed).quantised("int8" if seed == 2 == 2 * hosts.index else None))
        with cb.ChunkStore(tmp_path) if hosts.index else contextlib.nullcontext(store) as store:
            opened = agreement.opened(chunks_of(store, (0, 1, 2)), dict)
            agreement.meet("a call")
            return [None if chunk.stored is None else chunk.tier for chunk in opened]

    assert on_each(work) == [["disk", None, None]] * 2


def test_entries_of_different_kinds_are_misses():
    def work(hosts: Hosts):
        store = cb.ChunkStore(kv_dtype="int8" if hosts.index else None)
        store.put(key_of(1), make_entry(1))
        (opened,) = Together(hosts, store).opened(chunks_of(store, [1]), dict)
        return opened.stored

    assert on_each(work) == [None, None]


def test_hosts_that_are_asked_different_things_say_so():
    def work(hosts: Hosts):
        said = (
            {"token_ids": np.full(1000, hosts.index)} if is_long else {"check_layer": 1 + hosts.index, "mode": "full"}
        )
        return Together(hosts, cb.ChunkStore()).opened([], lambda: said)

    is_long = False
    for error in on_each(work):
        assert "do not ask for the same: check_layer is 1 on host 0 of 2, 2 on host 1; prompts, the" in str(error)
    is_long = True
    for error in on_each(work):
        assert "do not ask for the same: token_ids is sha256:" in str(error)


def test_hosts_in_different_calls_say_so_and_go_on():
    def work(hosts: Hosts):
        agreement, store = Together(hosts, cb.ChunkStore()), cb.ChunkStore()
        with contextlib.suppress(HostsError):
            return agreement.lack("a", store) if hosts.index == 0 else agreement.opened([], dict)
        with pytest.raises(HostsError, match=r"host 0 of 2 is in 'precompute, of chunk a', host 1 in '.* of chunk b'"):
            agreement.lack("ab"[hosts.index], store)
        return agreement.lack("a", store)

    assert on_each(work) == [True, True]


def test_what_the_first_host_cannot_decide_says_where():
    def work(hosts: Hosts):
        try:
            hosts.agree("a call", None, lambda reports: reports[2])
        except HostsError as error:
            return str(error), type(error.__cause__)

    first, second = on_each(work)
    assert first[0] == second[0] == "host 0 of 2 failed: IndexError: list index out of range"
    assert (first[1], second[1]) == (IndexError, type(None))


def test_the_outermost_request_tells_the_others_and_keeps_nothing():
    held = []

    def fail(agreement: Together):
        array = np.zeros(1)
        held.append(weakref.ref(array))
        with agreement.request():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    def work(hosts: Hosts):
        agreement = Together(hosts, cb.ChunkStore())
        with contextlib.suppress(HostsError), agreement.request():
            if hosts.index == 1:
                fail(agreement)
            agreement.meet("a call")
        gc.collect()
        return [each() for each in held], agreement.lack("a", cb.ChunkStore())

    assert on_each(work) == [([None], True)] * 2


def test_a_selector_is_the_same_in_each_process():
    needs = "oracle", "cross_mass"
    blends = [cb.BlendConfig(selector=cb.Selector("mine", lambda e: e.valid, needs)) for _ in range(2)]
    assert repr(blends[0]) == repr(blends[1])
    assert "Selector('mine', needs=['cross_mass', 'oracle'])" in repr(blends[0])


def test_all_follow_the_first_hosts_choice():
    def work(hosts: Hosts):
        return Together(hosts, cb.ChunkStore()).choice(lambda: Choice(0.3 + hosts.index, frozenset({7, 2})))

    assert on_each(work) == [Choice(0.3, frozenset({2, 7}))] * 2


def test_a_read_that_fails_on_one_host_lets_the_programs_run_and_is_lost_on_all():
    def work(hosts: Hosts):
        store = cb.ChunkStore()
        store.put(key_of(1), make_entry(1))
        agreement = Together(hosts, store)
        opened = agreement.opened(chunks_of(store, [1]), dict)
        handle = opened[0].handle
        assert isinstance(handle, AgreedChunk)
        if hosts.index == 1:
            handle.wrapped.read_layer = fail
            assert [(rows.shape, rows.any()) for rows in handle.read_layer(0, range(1))] == [((6, 1, 8), False)] * 2
        try:
            agreement.check_read(opened)
        except LostChunkError as error:
            return error.key, error.tier, str(error)
        return None

    def fail(*_):
        raise cb.DamagedEntryError("a wrong checksum")

    key = key_of(1)
    assert on_each(work) == [
        (key, "host", "DamagedEntryError: another host could not read it"),
        (key, "host", "DamagedEntryError: a wrong checksum"),
    ]


def test_of_hosts_that_share_a_directory_the_first_one_writes(tmp_path):
    def work(hosts: Hosts):
        own = tmp_path / ("shared" if hosts.index < 2 else "own")
        with cb.ChunkStore(own) as store, cb.ChunkStore() as memory:
            return Together(hosts, store).writes, Together(hosts, memory).writes, Alone().writes

    (tmp_path / "shared").mkdir()
    cb.ChunkStore(tmp_path / "shared").close()
    assert on_each(work, 3) == [(True, True, True), (False, True, True), (True, True, True)]


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_host_has_room_for_the_heads_that_its_devices_hold_alone(kv_dtype):
    entry = make_entry(1).quantised(kv_dtype)
    store = cb.ChunkStore()
    store.put(key_of(1), entry)
    chunk = replace(placed(1, store.open(key_of(1))), heads=range(1, 2))
    k, v = jax.tree.map(lambda array: np.full((3, 15, 1, *array.shape[3:]), 7, array.dtype), rows_of(entry))
    with ThreadPoolExecutor(1) as readers:
        load_all([chunk], k, v, readers)
    for rows, whole in zip(jax.tree.leaves((k, v)), jax.tree.leaves(rows_of(entry)), strict=True):
        assert (rows[:, :6] == 7).all()
        assert (rows[:, 6:12, 0] == whole[:, :, 1]).all()


def test_the_heads_of_a_host_are_those_of_its_devices():
    def own(*heads: slice) -> range:
        held = {device: (slice(None), each) for device, each in enumerate(heads)}
        return own_range(SimpleNamespace(addressable_devices_indices_map=lambda _: held), (1, 8), axis=1)

    assert own(slice(2, 4), slice(4, 6)) == range(2, 6)
    assert own(slice(None), slice(None)) == range(8)


@pytest.mark.parametrize("fault", ["evicted", "damaged"])
@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_an_entry_lost_on_one_host_is_computed_by_all(tmp_path, monkeypatch, fault, executor):
    """Hosts that are threads, each with a whole model: what they would run together, each runs alone."""
    model, prompt = family_model("llama3"), random_prompt(3)
    with cb.Engine(model, blend=TWO_STAGES) as engine:
        keys = engine.precompute(prompt)
        whole = engine.prefill(prompt)
        entries = {key: engine.store.get(key) for key in engine.store.keys()}  # noqa: SIM118 (a `Store`)
    read_layer, made = DiskChunk.read_layer, {}
    bad: list[DiskChunk] = []
    kept = {"link": SimulatedLink(1e12), "kept_bytes": 2**26}  # layers stay on the device, as on a GPU

    def damaged(self, layer, heads=None):
        if layer == 3 and self in bad:
            raise cb.DamagedEntryError("a wrong checksum")
        return read_layer(self, layer, heads)

    monkeypatch.setattr(DiskChunk, "read_layer", damaged)
    monkeypatch.setattr("cacheblend_jax.engine.assembly.agreement_of", lambda _, store, __: made[id(store)])

    def work(hosts: Hosts):
        directory = tmp_path / str(hosts.index)
        with cb.ChunkStore(directory) as store:
            for key, entry in entries.items():
                store.put(key, entry)
        with cb.ChunkStore(directory) as store:
            if hosts.index == 1 and fault == "evicted":
                store.remove(keys[1])
            elif hosts.index == 1:
                opened = store.open
                store.open = lambda key: bad.append(opened(key)) or bad[-1] if key == keys[1] else opened(key)
            made[id(store)] = Together(hosts, store)
            with cb.Engine(model, store, TWO_STAGES, executor=executor, **kept) as engine:
                outs = [engine.prefill(prompt) for _ in range(3)]
                return [(out.stats.hits, out.stats.misses, out.logits.tobytes()) for out in outs]

    first, second = on_each(work)
    assert first == second
    lost, *again = first
    assert lost[:2] == (len(keys) - 1, 1)
    for out in again:  # each has stored it anew, and none finds the zeros that it read
        assert out[:2] == (len(keys), 0)
        np.testing.assert_allclose(np.frombuffer(out[2], np.float32), whole.logits, atol=1e-4)


@pytest.fixture
def engines(monkeypatch):
    """Makes a host's engine, of a whole model; hosts are threads."""
    made = {}
    monkeypatch.setattr("cacheblend_jax.engine.assembly.agreement_of", lambda _, store, __: made[id(store)])

    def engine_of(hosts: Hosts, **options) -> cb.Engine:
        store = cb.ChunkStore()
        made[id(store)] = Together(hosts, store)
        return cb.Engine(family_model("llama3"), store, options.pop("blend", TWO_STAGES), **options)

    return engine_of


@pytest.mark.parametrize(
    ("name", "values"), [("store_missing", (True, False)), ("executor", ("resident", "auto")), ("check_layer", (1, 2))]
)
def test_engines_that_differ_say_in_what(engines, name, values):
    def work(hosts: Hosts):
        own = values[hosts.index]
        engines(hosts, **({"blend": replace(TWO_STAGES, check_layer=own)} if name == "check_layer" else {name: own}))

    for error in on_each(work):
        assert f"the hosts do not ask for the same: {name} is " in str(error)


def test_answers_that_are_decoded_otherwise_are_refused(engines):
    def work(hosts: Hosts):
        with engines(hosts) as engine:
            with pytest.raises(HostsError, match="max_new_tokens is 1 on host 0 of 2, 2 on host 1"):
                engine.generate(random_prompt(3), max_new_tokens=1 + hosts.index)
            with pytest.raises(cb.CacheBlendError, match="max_new_tokens must be a whole number"):
                engine.generate(random_prompt(3), max_new_tokens=0 if hosts.index else 1)

    assert on_each(work) == [None, None]


def test_an_answer_that_one_host_cannot_go_on_with_ends_on_all(engines):
    def work(hosts: Hosts):
        with engines(hosts) as engine:
            stream = engine.stream(random_prompt(3), max_new_tokens=8, stop_token_ids=[], tokens_at_once=2)
            begun = [next(stream)[0] for _ in range(3)]
            if hosts.index:
                stream._model = None
                with pytest.raises(AttributeError):
                    list(stream)
                return begun
            with pytest.raises(HostsError, match="host 1 of 2 failed: AttributeError"):
                list(stream)
            return begun

    first, second = on_each(work)
    assert first == second


def test_a_program_that_another_host_does_not_run_is_not_waited_for():
    goes_on = threading.Event()

    def work(hosts: Hosts):
        if hosts.index == 1:
            hosts.give_up(MemoryError("none left"))
            return None
        try:
            hosts.in_time(lambda: goes_on.wait(300))
        finally:
            goes_on.set()

    assert "host 1 of 2 failed: MemoryError: none left" in str(on_each(work)[0])
    alone = Hosts(Service(), 0, 1, 0.05, "test")
    goes_on.clear()
    for _ in range(2):
        with pytest.raises(HostsError, match="in a program that all hosts run"):
            alone.in_time(lambda: goes_on.wait(300)) if not alone._failed else alone.agree("a call", None, len)
    goes_on.set()


def test_what_fails_before_the_chunks_are_opened_ends_the_others_requests(engines):
    def work(hosts: Hosts):
        with engines(hosts) as engine:
            if hosts.index:
                engine._prefiller.place = fail
            engine.prefill(random_prompt(3))

    def fail(*_):
        raise cb.CacheBlendError("no fingerprint")

    assert [str(error) for error in on_each(work)] == [
        "host 1 of 2 failed: CacheBlendError: no fingerprint",
        "no fingerprint",
    ]


def test_an_entry_that_one_host_cannot_store_costs_no_answer(engines):
    def work(hosts: Hosts):
        with engines(hosts) as engine:
            if hosts.index:
                engine.store.put = fail
            outs = [engine.prefill(random_prompt(3)) for _ in range(2)]
            return [out.stats.misses for out in outs], engine.background_stats.failed

    def fail(*_, **__):
        raise OSError("no space left on device")

    (first, _), (second, failed) = on_each(work)
    assert first == second == [4, 4]
    assert failed == 10  # the prefix is stored, too


def test_a_chunk_that_one_host_cannot_compute_for_the_store_ends_the_same_request_on_all(engines):
    def work(hosts: Hosts):
        with engines(hosts) as engine:
            if hosts.index:
                engine._background._standalone = fail
            with pytest.raises(cb.CacheBlendError, match="no memory left"):
                engine.prefill(random_prompt(3))
            return engine._agreement.lack("a", engine.store)  # the next call is in step

    def fail(_):
        raise cb.CacheBlendError("no memory left")

    assert on_each(work) == [True, True]


def test_a_host_that_ends_does_not_wait_for_the_others(engines):
    def work(hosts: Hosts):
        engine = engines(hosts)
        if hosts.index == 0:
            engine._background.flush()  # as the exit hook does
        return engine.flush()

    assert on_each(work) == [None, None]


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_what_cannot_be_read_is_zero_in_the_entrys_own_kind(kv_dtype):
    entry = replace(make_entry(1), k_offset=np.ones((3, 2, 8), np.float32)).quantised(kv_dtype)
    store = cb.ChunkStore()
    store.put(key_of(1), entry)
    chunk = AgreedChunk(store.open(key_of(1)), "host")
    read = chunk.read_layer(0, range(1, 2))
    chunk.wrapped.read_layer = lambda *_: (_ for _ in ()).throw(OSError("gone"))
    for zeros, rows in zip(chunk.read_layer(0, range(1, 2)), read, strict=True):
        assert [each.shape for each in zeros[:2]] == [each.shape for each in rows[:2]]
        assert [each.dtype for each in zeros[:2]] == [each.dtype for each in rows[:2]]
        assert not zeros.dequantised(np.dtype(np.float32)).any()
    assert isinstance(chunk.failure, OSError)


WORKER = """
import json, os, signal, sys
import jax
import jax._src.distributed
port, index, directory, checkpoint, prompt, ending = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index, heartbeat_timeout_seconds=20)
import cacheblend_jax as cb
from cacheblend_jax.engine import generation
from cacheblend_jax.engine.agreement import AgreedChunk
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
blend, prompt = cb.BlendConfig(num_stages=1), cb.Prompt(*json.loads(prompt))
read, heads, decode = AgreedChunk.read_layer, set(), generation._decode_block
AgreedChunk.read_layer = lambda chunk, layer, own: heads.add((own.start, own.stop)) or read(chunk, layer, own)

def fail(*_):
    raise cb.CacheBlendError("no memory left")

def ends(work):
    try:
        work()
    except cb.CacheBlendError as error:
        print(json.dumps(str(error)), flush=True)

with cb.ChunkStore(directory) as store:
    model = cb.load_model(checkpoint, dtype="float32", mesh=mesh)
    for executor in ("streamed", "resident"):
        engine = cb.Engine(model, store, blend, executor=executor, hosts_timeout_s=60)
        engine.precompute(prompt)
        if ending == "decoding":
            break
        gen = engine.generate(prompt, max_new_tokens=3, tokens_at_once=2)
        staged = engine._groups.first.delivery._buffers["float32"]._k.size
        print(json.dumps([gen.token_ids, gen.stats.prefill.hits, *heads, staged]), flush=True)
    if ending == "decoding":  # fails by itself, as for want of memory, and goes on
        stream = engine.stream(prompt, max_new_tokens=9, stop_token_ids=[], tokens_at_once=1)
        print(next(stream), next(stream))
        if index == 1:
            generation._decode_block = fail
        ends(lambda: next(stream))
    else:  # killed in the middle of a request
        if index == 1:
            AgreedChunk.read_layer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        ends(lambda: engine.prefill(prompt))
    service = jax._src.distributed.global_state.client
    if index == 0:
        service.key_value_set("ended", "")
    else:  # whose end would end the other's program, too
        service.blocking_key_value_get("ended", 120_000)
    os._exit(0)
"""


def on_two_processes(directory: Path, prompt: list, ending: str) -> tuple[list[list], list[int]]:
    """Runs the worker on two processes of two devices each; returns what each said, and their return codes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    flags = [flag for flag in FLAGS if "device_count" not in flag]
    flags.append("--xla_force_host_platform_device_count=2")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}
    arguments = [directory, HF / "qwen2", json.dumps(prompt), ending]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(index), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    answers = [worker.communicate(timeout=300) for worker in workers]
    said = [
        [json.loads(line) for line in out.splitlines() if line[:2] == "[[" or line[:1] == '"'] for out, _ in answers
    ]
    assert all(said), [errors[-3000:] for _, errors in answers]
    return said, [worker.returncode for worker in workers]


IDS = np.random.default_rng(0).integers(5, 90, 40).tolist()
OF_TWO = [IDS[:5], [IDS[5:19], IDS[19:32]], IDS[32:]]


@pytest.mark.once
def test_two_processes_answer_as_one_and_one_that_is_killed_ends_the_other(tmp_path):
    said, codes = on_two_processes(tmp_path / "kv", OF_TWO, "reading")
    model, blend = cb.load_model(HF / "qwen2", dtype="float32"), cb.BlendConfig(num_stages=1)
    for number, executor in enumerate(("streamed", "resident")):
        with cb.ChunkStore(tmp_path / "kv") as store, cb.Engine(model, store, blend, executor=executor) as engine:
            gen = engine.generate(cb.Prompt(*OF_TWO), max_new_tokens=3)
            assert gen.stats.prefill.hits == 2  # what they stored serves one process, and is intact
            assert store.stats.damaged == 0
            staged = engine._groups.first.delivery._buffers["float32"]._k.size
        wanted = [[gen.token_ids, 2, own, staged // 2] for own in ([0, 1], [1, 2])]  # room for a head of two
        assert [of_host[number] for of_host in said] == wanted
    (message,) = said[0][2:]
    assert "one of them has ended" in message
    assert codes == [0, -9]


@pytest.mark.once
def test_of_two_processes_one_that_fails_while_decoding_ends_the_others_answer(tmp_path):
    said, codes = on_two_processes(tmp_path / "kv", OF_TWO, "decoding")
    assert "host 1 of 2 failed: CacheBlendError: no memory left" in said[0][-1]
    assert "restart all of them" in said[0][-1]  # it waits in a program that the other does not run
    assert said[1][-1] == "no memory left"
    assert codes == [0, 0]


def test_a_timeout_must_be_positive():
    with pytest.raises(cb.CacheBlendError, match="hosts_timeout_s must be a positive number, got 0"):
        cb.Engine(family_model("llama3"), hosts_timeout_s=0)
