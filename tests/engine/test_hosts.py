"""Several hosts: all run the same programs, whatever one of them alone knows, and none waits for ever for another."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
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

    def key_value_delete(self, prefix: str) -> None:
        with self.changed:
            self.values = {key: value for key, value in self.values.items() if not key.startswith(prefix)}


def on_each(work, count: int = 2, service: Service | None = None) -> list:
    """Returns what `work(hosts)` returns, or raises, on each of several hosts."""
    service = service or Service()

    def run(index: int):
        try:
            return work(Hosts(service, index, count, 30.0, "test"))
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
        return [hosts.agree([hosts.index, number], lambda reports: reports) for number in range(5)]

    for told in on_each(work, 3, service):
        assert told == [[[0, number], [1, number], [2, number]] for number in range(5)]
    assert len(service.values) == 3  # of the last round


def test_a_host_that_fails_ends_the_others_requests():
    def work(hosts: Hosts):
        agreement = Together(hosts, cb.ChunkStore())
        with agreement.request():
            if hosts.index == failing:
                raise cb.CacheBlendError("no memory left")
            agreement.meet()
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
            agreement.meet()
        return agreement.lack("a", cb.ChunkStore())

    assert on_each(work) == [True, True]


def test_a_host_that_has_ended_costs_the_others_a_timeout_and_then_nothing():
    service = Service()
    service.has_ended = True
    hosts = Hosts(service, 0, 2, 30.0, "test")
    for _ in range(2):
        with pytest.raises(HostsError, match=r"one of 2 did not answer within 30 s .* start them all anew"):
            hosts.agree(None, lambda reports: reports)
        service.blocking_key_value_get = None  # it is not asked again


def test_what_one_host_lacks_is_a_miss_on_all_and_the_slowest_tier_counts(tmp_path):
    def work(hosts: Hosts):
        with cb.ChunkStore(None if hosts.index == 0 else tmp_path) as store:
            agreement = Together(hosts, store)
            for seed in (0, 1, 2) if hosts.index == 0 else (0, 2):
                store.put(key_of(seed), make_entry(seed).quantised("int8" if seed == 2 == 2 * hosts.index else None))
        with cb.ChunkStore(tmp_path) if hosts.index else contextlib.nullcontext(store) as store:
            opened = agreement.opened(["a request"], chunks_of(store, (0, 1, 2)))
            agreement.meet()
            return [None if chunk.stored is None else chunk.tier for chunk in opened]

    assert on_each(work) == [["disk", None, None]] * 2


def test_entries_of_different_kinds_are_misses():
    def work(hosts: Hosts):
        store = cb.ChunkStore(kv_dtype="int8" if hosts.index else None)
        store.put(key_of(1), make_entry(1))
        (opened,) = Together(hosts, store).opened([], chunks_of(store, [1]))
        return opened.stored

    assert on_each(work) == [None, None]


def test_hosts_that_are_asked_different_things_say_so():
    def work(hosts: Hosts):
        return Together(hosts, cb.ChunkStore()).opened([hosts.index], [])

    for error in on_each(work):
        assert "the hosts do not ask for the same" in str(error)


def test_all_follow_the_first_hosts_choice():
    def work(hosts: Hosts):
        return Together(hosts, cb.ChunkStore()).choice(lambda: Choice(0.3 + hosts.index, frozenset({7, 2})))

    assert on_each(work) == [Choice(0.3, frozenset({2, 7}))] * 2


def test_a_read_that_fails_on_one_host_lets_the_programs_run_and_is_lost_on_all():
    def work(hosts: Hosts):
        store = cb.ChunkStore()
        store.put(key_of(1), make_entry(1))
        agreement = Together(hosts, store)
        opened = agreement.opened([], chunks_of(store, [1]))
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
def test_a_host_fills_in_the_heads_that_its_devices_hold_alone(kv_dtype):
    entry = make_entry(1).quantised(kv_dtype)
    store = cb.ChunkStore()
    store.put(key_of(1), entry)
    chunk = replace(placed(1, store.open(key_of(1))), heads=range(1, 2))
    k, v = jax.tree.map(lambda array: np.full((3, 15, *array.shape[2:]), 7, array.dtype), rows_of(entry))
    with ThreadPoolExecutor(1) as readers:
        load_all([chunk], k, v, readers)
    for rows, whole in zip(jax.tree.leaves((k, v)), jax.tree.leaves(rows_of(entry)), strict=True):
        assert (rows[:, :, 0] == 7).all()
        assert (rows[:, 6:12, 1] == whole[:, :, 1]).all()


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
        entries = {key: engine.store.get(key) for key in engine.store.keys()}  # noqa: SIM118 (a `Store`)
    read_layer, made = DiskChunk.read_layer, {}
    bad: list[DiskChunk] = []

    def damaged(self, layer, heads=None):
        if layer == 3 and self in bad:
            raise cb.DamagedEntryError("a wrong checksum")
        return read_layer(self, layer, heads)

    monkeypatch.setattr(DiskChunk, "read_layer", damaged)
    monkeypatch.setattr("cacheblend_jax.engine.engine.agreement_of", lambda _, store, __: made[id(store)])

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
            with cb.Engine(model, store, TWO_STAGES, executor=executor) as engine:
                outs = [engine.prefill(prompt) for _ in range(2)]
                return [(out.stats.hits, out.stats.misses, out.logits.tobytes()) for out in outs]

    first, second = on_each(work)
    assert first == second
    lost, again = first
    assert lost[:2] == (len(keys) - 1, 1)
    assert again[:2] == (len(keys), 0)  # each has stored it anew


WORKER = """
import json, os, signal, sys
import jax
port, index, directory, checkpoint, prompt = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index, heartbeat_timeout_seconds=20)
import cacheblend_jax as cb
from cacheblend_jax.engine.agreement import AgreedChunk
mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
model = cb.load_model(checkpoint, dtype="float32", mesh=mesh)
prompt = cb.Prompt(*json.loads(prompt))
read, heads = AgreedChunk.read_layer, set()
AgreedChunk.read_layer = lambda chunk, layer, own: heads.add((own.start, own.stop)) or read(chunk, layer, own)
with cb.ChunkStore(directory) as store:
    engine = cb.Engine(model, store, cb.BlendConfig(num_stages=1), executor="resident", hosts_timeout_s=60)
    engine.precompute(prompt)
    gen = engine.generate(prompt, max_new_tokens=3, tokens_at_once=2)
    print(json.dumps([gen.token_ids, gen.stats.prefill.hits, gen.stats.prefill.misses, *heads]), flush=True)
    if index == 1:  # killed in the middle of a request
        AgreedChunk.read_layer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        engine.prefill(prompt)
    except cb.CacheBlendError as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
    os._exit(0)
"""


@pytest.mark.once
def test_two_processes_answer_as_one_and_one_that_is_killed_ends_the_other(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    ids = np.random.default_rng(0).integers(5, 90, 40).tolist()
    prompt = [ids[:5], [ids[5:19], ids[19:32]], ids[32:]]
    flags = [flag for flag in FLAGS if "device_count" not in flag]
    flags.append("--xla_force_host_platform_device_count=2")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(index), tmp_path / "kv", HF / "qwen2", json.dumps(prompt)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    answers = [worker.communicate(timeout=300) for worker in workers]
    said = [[json.loads(line) for line in out.splitlines() if line[:2] in ("[[", '["')] for out, _ in answers]
    assert all(said), [errors[-3000:] for _, errors in answers]
    model, blend = cb.load_model(HF / "qwen2", dtype="float32"), cb.BlendConfig(num_stages=1)
    with cb.ChunkStore(tmp_path / "kv") as store, cb.Engine(model, store, blend, executor="resident") as engine:
        gen = engine.generate(cb.Prompt(*prompt), max_new_tokens=3)
        assert gen.stats.prefill.hits == 2  # what they stored serves one process, and is intact
        assert store.stats.damaged == 0
    assert [each[0] for each in said] == [[gen.token_ids, 2, 0, own] for own in ([0, 1], [1, 2])], answers
    ((error, message),) = said[0][1:]
    assert (error, "one of them has ended" in message) == ("HostsError", True)
    assert [worker.returncode for worker in workers] == [0, -9]


def test_a_timeout_must_be_positive():
    with pytest.raises(cb.CacheBlendError, match="hosts_timeout_s must be a positive number, got 0"):
        cb.Engine(family_model("llama3"), hosts_timeout_s=0)
