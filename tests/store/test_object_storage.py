"""A store on object storage, by a local server that speaks S3: `pip install "moto[server]" s3fs`; skipped without."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from conftest import family_model, random_prompt
from store_cases import BIG, key_of, make_entry, same

import cacheblend_jax as cb

moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
pytestmark = pytest.mark.filterwarnings("default")  # those of the server and its client


@pytest.fixture(scope="module")
def endpoint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint, monkeypatch):
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=found["Key"])


def names(client, prefix="") -> list[str]:
    return [found["Key"] for found in client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])]


def test_what_was_stored_comes_back_bit_for_bit(s3):
    with cb.ChunkStore("s3://bucket/kv") as store:
        for seed in range(3):
            store.put(key_of(seed), make_entry(seed, BIG))
        store.flush()
        store.put(key_of(9), make_entry(9))
        store.flush()
        assert (store.stats.written, store.stats.write_errors) == (4, 0)
    with cb.ChunkStore("s3://bucket/kv") as store:
        assert len(store) == 4
        for seed in range(3):
            with store.open(key_of(seed)) as chunk:
                assert chunk.tier == "disk"
                assert chunk.read_layer(1)[0].tobytes() == make_entry(seed, BIG).k[1].tobytes()
            assert same(store.get(key_of(seed)), make_entry(seed, BIG))
        assert store.remove(key_of(9))
        store.clear()
    assert names(s3) == ["kv/cacheblend-store.json"]


def test_another_store_gives_the_same_answer(s3):
    model, prompt = family_model("llama3"), random_prompt(21)
    answers = []
    for _ in range(2):
        with cb.ChunkStore("s3://bucket/answers") as store, cb.Engine(model, store) as engine:
            engine.precompute(prompt)
            engine.flush()
        with cb.ChunkStore("s3://bucket/answers") as store, cb.Engine(model, store) as engine:
            out = engine.prefill(prompt)
            assert (out.stats.misses, out.stats.executor) == (0, "streamed")
            answers.append(out.logits.tobytes())
    assert answers[0] == answers[1]


def test_damage_is_a_miss_and_a_pack_without_its_records_does_not_count(s3):
    with cb.ChunkStore("s3://bucket/kv") as store:
        for seed in range(3):
            store.put(key_of(seed), make_entry(seed, BIG))
            store.flush()
    packs = sorted({name.split("/")[2] for name in names(s3, "kv/packs/")})
    sizes = {
        found["Key"]: found["Size"]
        for found in s3.list_objects_v2(Bucket="bucket", Prefix=f"kv/packs/{packs[0]}/state/d/")["Contents"]
    }
    data = max(sizes, key=lambda name: sizes[name])
    content = bytearray(s3.get_object(Bucket="bucket", Key=data)["Body"].read())
    content[len(content) // 2] ^= 4
    s3.put_object(Bucket="bucket", Key=data, Body=bytes(content))
    s3.delete_object(Bucket="bucket", Key=f"kv/packs/{packs[1]}/entries.json")  # a writer was killed, or is at it
    with cb.ChunkStore("s3://bucket/kv") as store:
        assert len(store) == 2
        found = [store.get(key_of(seed)) for seed in range(3)]
        assert sum(entry is None for entry in found) == 2
        assert store.stats.damaged == 1
        assert all(entry is None or same(entry, make_entry(seed, BIG)) for seed, entry in enumerate(found))
    left = {name.split("/")[2] for name in names(s3, "kv/packs/")}
    assert left == set(packs[1:])


def test_the_disks_capacity_holds_there_too(s3):
    size = 4 * make_entry(0, BIG).num_bytes
    with cb.ChunkStore("s3://bucket/small", disk_bytes=size, host_bytes=1) as store:
        for seed in range(8):
            store.put(key_of(seed), make_entry(seed, BIG))
            store.flush()
        assert store.stats.disk.evicted > 0
        assert 0 < store.stats.disk.bytes <= size
        assert np.sum([store.get(key_of(seed)) is not None for seed in range(8)]) == store.stats.disk.entries
