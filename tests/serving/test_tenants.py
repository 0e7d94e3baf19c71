"""Keys and tenants: who may ask, and that none learns of another's entries; chunks ahead, pinned and deleted."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from serving_cases import CHUNKS, QUESTION, get, running

import cacheblend_jax as cb
from cacheblend_jax.serving import Caller, Tenants
from cacheblend_jax.serving.chunks import bytes_per_token
from cacheblend_jax.serving.errors import ApiError

KEYS = {"key-a": "ada", "key-b": {"tenant": "bob", "quota_bytes": 10**9}, "key-o": {"tenant": "ops", "operator": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps(KEYS))
    with running(tenants=Tenants.from_file(path)) as server:
        yield server


def client_of(server, key: str | None):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60, verify=False)


@pytest.fixture
def ada(server):
    with client_of(server, "key-a") as client:
        yield client


@pytest.fixture
def bob(server):
    with client_of(server, "key-b") as client:
        yield client


def chat(client) -> dict:
    content = [{"type": "text", "text": text} for text in (*CHUNKS, QUESTION)]
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}).json()


def found(client) -> list[bool]:
    answer = client.post("/v1/chunks/lookup", json={"chunks": CHUNKS}).json()
    return [each["stored"] for each in answer["data"]]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", "Bearer")],
        [("Authorization", "key-a")],
        [("Authorization", "Basic key-a")],
        [("Authorization", "Bearer key-a"), ("Authorization", "Bearer key-b")],
        [("Authorization", b"Bearer \xff\xfe")],
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chunks", "/metrics", "/v1/chunks/anything"])
def test_without_a_right_key_nothing_is_told(server, headers, path):
    answer = get(server.url + path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_health_and_the_page_need_no_key(server):
    assert get(server.url + "/health").status_code == 200
    assert get(server.url + "/").status_code == 200


def test_only_an_operator_sees_what_counts_all_tenants(server, ada):
    answer = ada.get("/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_an_operator")
    with client_of(server, "key-o") as operator:
        assert operator.get("/metrics").status_code == 200


def test_a_tenant_learns_nothing_of_anothers_entries(ada, bob):
    keys = [each["id"] for each in ada.post("/v1/chunks", json={"chunks": CHUNKS}).json()["data"]]
    assert (found(ada), found(bob)) == ([True] * 2, [False] * 2)
    assert chat(ada)["cacheblend"]["hits"] == 2
    told = chat(bob)["cacheblend"]
    assert (told["hits"], told["misses"], told["reused_tokens"]) == (0, 2, 0)
    assert bob.get("/v1/chunks").json() | {"data": []} == {
        "object": "list", "data": [], "has_more": False, "total": 0, "total_bytes": 0, "quota_bytes": 10**9
    }  # fmt: skip
    unknown = bob.get("/v1/chunks/nothing").json()
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/pin"), ("DELETE", "/pin")):
        answer = bob.request(method, f"/v1/chunks/{keys[0]}{path}")
        assert (answer.status_code, answer.json()) == (404, unknown)
    assert set(keys) <= {each["id"] for each in ada.get("/v1/chunks").json()["data"]}


def test_chunks_are_computed_once_listed_pinned_and_deleted(server, bob):
    text = "Martin is usually called Granite."
    body = {"documents": [{"title": "", "text": text}], "pin": True}
    first, again = (bob.post("/v1/chunks", json=body).json()["data"][0] for _ in range(2))
    assert (first["created"], again["created"]) == (True, False)
    assert first | {"created": False} == again
    key = first["id"]
    described = bob.get(f"/v1/chunks/{key}").json()
    assert described["pinned"]
    assert described["tokens"] == first["tokens"]
    assert described["bytes"] == first["tokens"] * bytes_per_token(server.engine.model.config)
    assert bob.delete(f"/v1/chunks/{key}").status_code == 409
    assert not bob.delete(f"/v1/chunks/{key}/pin").json()["pinned"]
    assert bob.post(f"/v1/chunks/{key}/pin").json()["pinned"]
    bob.delete(f"/v1/chunks/{key}/pin")
    assert bob.delete(f"/v1/chunks/{key}").json()["deleted"]
    assert bob.get(f"/v1/chunks/{key}").status_code == 404


def test_a_pin_of_an_entry_that_is_gone_can_be_undone_by_its_tenant(server, ada, bob):
    body = {"chunks": ["Lima is home to Granite."], "pin": True}
    key = bob.post("/v1/chunks", json=body).json()["data"][0]["id"]
    server.engine.store.wrapped.remove(key)
    assert ada.delete(f"/v1/chunks/{key}/pin").status_code == 404
    assert key in server.engine.store.pinned
    assert bob.delete(f"/v1/chunks/{key}/pin").json() == {"id": key, "object": "cacheblend.chunk", "pinned": False}
    assert key not in server.engine.store.pinned
    assert bob.delete(f"/v1/chunks/{key}/pin").status_code == 404


def test_where_there_is_no_room_to_pin_all_endpoints_say_so_alike(server, bob, monkeypatch):
    monkeypatch.setattr(server.engine.store, "pinned_bytes", 1)
    stored = bob.post("/v1/chunks", json={"chunks": CHUNKS[:1]}).json()["data"][0]
    for answer in (
        bob.post("/v1/chunks", json={"chunks": CHUNKS[:1], "pin": True}),
        bob.post(f"/v1/chunks/{stored['id']}/pin"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "too_many_pinned")


def test_a_head_request_deletes_nothing(bob):
    key = bob.post("/v1/chunks", json={"chunks": CHUNKS[:1]}).json()["data"][0]["id"]
    for path in (f"/v1/chunks/{key}", "/v1/chunks"):
        assert bob.head(path).status_code == 200
    assert bob.get(f"/v1/chunks/{key}").status_code == 200


def test_the_list_comes_in_pages(ada):
    ada.post("/v1/chunks", json={"chunks": CHUNKS})
    whole = ada.get("/v1/chunks").json()["data"]
    first = ada.get("/v1/chunks", params={"limit": 1}).json()
    rest = ada.get("/v1/chunks", params={"after": first["data"][-1]["id"]}).json()
    assert first["has_more"]
    assert first["data"] + rest["data"] == whole
    for query in ({"limit": "0"}, {"limit": "x"}, {"limit": "1".zfill(9) + "9" * 20}, {"after": "nothing"}):
        assert ada.get("/v1/chunks", params=query).status_code == 400


@pytest.mark.parametrize(
    "body", [{}, {"chunks": []}, {"chunks": [""]}, {"chunks": "text"}, {"chunks": [1]}, {"pin": 1}]
)
def test_a_request_for_chunks_that_makes_no_sense_is_refused(ada, body):
    answer = ada.post("/v1/chunks", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '"x"', '{"": "a"}', '{"k e y": "a"}', '{"key": ""}', '{"key": 1}', '{"key": {}}',
        '{"key": {"tenant": "a", "quota": 1}}', '{"key": {"tenant": "a", "quota_bytes": 0}}',
        '{"key": {"tenant": "a", "operator": "yes"}}', '{"key": "a", "key": "b"}',
    ],
)  # fmt: skip
def test_a_file_of_keys_that_makes_no_sense_is_refused(tmp_path, text):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(cb.CacheBlendError, match=r"key"):
        Tenants.from_file(path)
    with pytest.raises(cb.CacheBlendError, match="cannot be read"):
        Tenants.from_file(Path(tmp_path / "missing"))


def test_several_keys_may_be_one_tenants():
    both = {"tenant": "ada", "quota_bytes": 5}
    tenants = Tenants({"one": Caller("ada"), "two": Caller("ada")}, {"ada": both["quota_bytes"]})
    assert tenants.caller(["Bearer one"]) == tenants.caller(["bearer two"])
    with pytest.raises(ApiError):
        tenants.caller(["Bearer three"])
