"""Requests that make no sense, and connections that break the protocol: each is refused, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import struct
import threading

import httpx
import pytest
from serving_cases import QUESTION, running
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from cacheblend_jax.serving import Bounds
from cacheblend_jax.serving.admission import HostCheck

SECRET = "unspeakable"
CHAT = "/v1/chat/completions"
CHUNKED = (
    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
)


@pytest.fixture(scope="module")
def server():
    bounds = Bounds(body_bytes=2**20, chunks=64, messages=32, prompt_tokens=300, requests=8, head_s=0.3, body_s=0.3)
    with running(bounds=bounds) as server:
        yield server


@pytest.fixture(autouse=True)
def goes_on(server, caplog):
    """After whatever a test has sent, the server answers, holds no slot, and has logged nothing that it was told."""
    caplog.set_level(logging.DEBUG)
    yield
    status, answer = server.post(CHAT, json.dumps(body()).encode())
    assert (status, json.loads(answer)["choices"][0]["finish_reason"]) == (200, "stop")
    assert server.holds_no_slot()
    assert SECRET not in caplog.text


def body(**fields) -> dict:
    return {"messages": [{"role": "user", "content": QUESTION}], **fields}


def head_of(length: int) -> bytes:
    lines = f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}"
    return "\r\n".join([*lines, "", ""]).encode()


def said(content, role="user", **fields) -> dict:
    return {"messages": [{"role": role, "content": content}], **fields}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"messages": ', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'{"temperature": -Infinity}', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "must be a JSON object, got an array"),
        (b"null", "must be a JSON object, got null"),
    ],
)
def test_what_is_no_json_object_is_refused(server, raw, reason):
    status, error = server.error(CHAT, raw)
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_json")
    assert reason in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": SECRET}, "messages"),
        ({"messages": [SECRET]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        (said(QUESTION, "tool"), "messages[0].role"),
        (said(QUESTION, 3), "messages[0].role"),
        (said(None), "messages[0].content"),
        (said({"text": SECRET}), "messages[0].content"),
        (said([SECRET]), "messages[0].content[0]"),
        (said([{"type": "image_url", "image_url": {"url": SECRET}}]), "messages[0].content[0].type"),
        (said([{"type": "text"}]), "messages[0].content[0].text"),
        (said("\ud800" + SECRET), "messages[0].content"),
        (said([{"type": "text", "text": SECRET}] * 10_000), "messages[0].content"),
        ({"messages": [{"role": "user", "content": SECRET}] * 33}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": SECRET}] * 40}] * 2}, "messages"),
        (body(documents=[SECRET] * 65), "documents"),
        (body(documents=[{"title": SECRET}]), "documents[0].text"),
        (body(documents=[7]), "documents[0]"),
        (body(max_tokens=0), "max_tokens"),
        (body(max_tokens=-1), "max_tokens"),
        (body(max_tokens=1.5), "max_tokens"),
        (body(max_tokens=True), "max_tokens"),
        (body(max_completion_tokens=10**30), "max_completion_tokens"),
        (body(temperature=-0.1), "temperature"),
        (body(temperature=1e999), None),  # Python writes Infinity, which is no JSON
        (body(temperature="hot"), "temperature"),
        (body(top_p=1.1), "top_p"),
        (body(seed="x"), "seed"),
        (body(seed=2**80), "seed"),
        (body(n=2), "n"),
        (body(n=0), "n"),
        (body(stop=[SECRET] * 17), "stop"),
        (body(stop=[1]), "stop"),
        (body(stream="yes"), "stream"),
        (body(stream_options=[]), "stream_options"),
        (body(logprobs=2), "logprobs"),
        (body(top_logprobs=2), "top_logprobs"),
        (body(logprobs=True, top_logprobs=21), "top_logprobs"),
        (body(tools=[{"type": "function"}]), "tools"),
        (body(response_format={"type": "json_object"}), "response_format"),
        (body(logit_bias={"5": 1}), "logit_bias"),
        (body(model=SECRET), "model"),
        (body(model=5), "model"),
        (body(cacheblend=SECRET), "cacheblend"),
        (body(cacheblend={"mode": SECRET}), "cacheblend.mode"),
        (body(cacheblend={"ratio": 2}), "cacheblend.ratio"),
        (body(cacheblend={"selector": SECRET}), "cacheblend.selector"),
        (body(cacheblend={"selector": "oracle"}), "cacheblend.selector"),
        (said("Oslo is now home to Cobalt. " * 100), "messages"),
    ],
    ids=repr,
)
def test_a_field_that_makes_no_sense_is_named(server, fields, param):
    status, error = server.error(CHAT, fields)
    assert status == (404 if error["code"] == "model_not_found" else 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert len(error["message"]) < 300


@pytest.mark.parametrize("prompt", [None, 5, ["a", "b"], [[1], [2]], [1, True], [10**9], [], ["\udfff"]])
def test_a_completions_prompt_that_makes_no_sense_is_refused(server, prompt):
    status, error = server.error("/v1/completions", {"prompt": prompt})
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_there_must_be_a_user(server):
    status, error = server.error(CHAT, said(QUESTION, "system"))
    assert (status, "'user'" in error["message"]) == (400, True)


def test_a_body_beyond_the_bound_is_refused_with_or_without_its_length(server):
    large = json.dumps(said(SECRET * 10**6)).encode()
    assert len(large) > 10 * 2**20
    status, error = server.error(CHAT, large)
    assert (status, error["code"]) == (413, "request_too_large")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    status, answer = server.exchange(head.encode(), chunk * 30, b"0\r\n\r\n")
    assert (status, json.loads(answer)["error"]["code"]) == (413, "request_too_large")


def test_a_body_that_is_not_said_to_be_json_is_refused(server):
    """So that no web page elsewhere can have a browser ask: without that type, it need not ask for leave."""
    status, error = server.error(CHAT, body(), "Content-Type: text/plain")
    assert (status, error["code"]) == (415, "invalid_content_type")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(host, 200) for host in ("localhost", "LOCALHOST.:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]")],
        *[(host, 403) for host in ("evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "::1")],
    ],
)
def test_a_page_whose_name_was_made_to_point_here_is_refused(host, status):
    async def asked(hosts) -> httpx.Response:
        transport = httpx.ASGITransport(HostCheck(PlainTextResponse("ok"), hosts))
        async with httpx.AsyncClient(transport=transport, base_url="http://any") as client:
            return await client.get("/", headers={"Host": host})

    answer = asyncio.run(asked(("localhost", "127.0.0.1", "[::1]")))
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "unknown_host"
    assert asyncio.run(asked(None)).status_code == 200


def test_unknown_paths_and_methods_are_refused_alike(server):
    for path, status in (("/v1/embeddings", 404), ("/nothing", 404), ("/v1/models", 405)):
        assert server.error(path, {})[0] == status
        assert server.error(path, {})[1]["code"] == "unknown_url"


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 10**6 + b"\r\n\r\n",
        b"\r\n" * 10**6,
        CHUNKED + b"1;" + b"a" * 10**6,
        CHUNKED + b"1\r\n{\r\n0\r\nX: " + b"a" * 10**6,
        CHUNKED + b"1\r\n{\r\n0\r\n" + b"X: a\r\n" * 10**5,
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=(
        "nonsense,negative,two lengths,long head,blank lines,chunk extension,long trailer,many trailers,"
        "no host,two hosts,path"
    ).split(","),
)
def test_what_is_no_http_is_refused(server, raw):
    status, _ = server.exchange(raw)
    assert status == 400


def test_a_request_for_another_protocol_is_answered_in_this_one(server):
    """A JVM's client asks so for HTTP/2; the body comes with the head, or after it, and more than one request does."""
    raw = json.dumps(body()).encode()
    asks = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    head = head_of(len(raw))[:-2] + asks
    for first, rest in ((head + raw, b""), (head, raw), (head[:50], head[50:] + raw)):
        with socket.create_connection(server.address, timeout=300) as connection:
            answers = connection.makefile("rb")
            for _ in range(2):
                connection.sendall(first)
                connection.sendall(rest)
                assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
                (length,) = [
                    int(line[16:]) for line in iter(answers.readline, b"\r\n") if line[:15] == b"content-length:"
                ]
                assert json.loads(answers.read(length))["choices"]


def test_a_head_that_does_not_come_ends_the_connection(server):
    with socket.create_connection(server.address, timeout=300) as connection:
        connection.sendall(b"POST /v1/chat")
        assert connection.recv(10) == b""


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_so(server):
    status, answer = server.exchange(head_of(100), b'{"messages"')
    assert (status, json.loads(answer)["error"]["code"]) == (408, "timeout")


def test_a_client_that_resets_its_connection_amid_its_body_costs_nothing(server):
    with socket.create_connection(server.address, timeout=300) as connection:
        connection.sendall(head_of(100) + b"{")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_half_closed_connection_holds_no_slot(server):
    status, _ = server.post(CHAT, json.dumps(body()).encode(), half_close=True)
    assert status in (0, 200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slot(server, stream):
    while not server.scheduler.answers.empty():
        server.scheduler.answers.get()
    server.scheduler.gate.clear()
    raw = json.dumps(body(stream=stream)).encode()
    with socket.create_connection(server.address, timeout=300) as connection:
        connection.sendall(head_of(len(raw)) + raw)
        answer = server.scheduler.answers.get(timeout=300)
    gone = answer.cancelled.wait(300)
    server.scheduler.gate.set()
    assert gone


def test_a_client_that_goes_amid_an_answer_frees_its_slot(server):
    server.scheduler.gate.set()
    raw = json.dumps(body(stream=True, max_tokens=4096)).encode()
    script, server.scheduler.script = server.scheduler.script, ("word ",) * 10**6
    try:
        while not server.scheduler.answers.empty():
            server.scheduler.answers.get()
        with socket.create_connection(server.address, timeout=300) as connection:
            connection.sendall(head_of(len(raw)) + raw)
            received = b""
            while b"word" not in received:
                received += connection.recv(10**5)
        assert server.scheduler.answers.get(timeout=300).cancelled.wait(300)
    finally:
        server.scheduler.script = script


@pytest.fixture
def lost(monkeypatch):
    """Set where a server has lost a connection."""
    lost, connection_lost = threading.Event(), H11Protocol.connection_lost
    monkeypatch.setattr(H11Protocol, "connection_lost", lambda *lot: (connection_lost(*lot), lost.set()))
    return lost


def test_a_body_that_goes_on_after_its_answer_ends_the_connection(server, lost):
    head = head_of(10**9).replace(b"application/json", b"text/plain")
    with socket.create_connection(server.address, timeout=300) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 415")
        for _ in range(1000):  # more often than a connection that is idle is closed
            if lost.wait(0.01):
                break
            connection.sendall(b"a")
    assert lost.is_set()


def test_a_client_that_does_not_read_loses_its_connection(lost):
    raw = json.dumps(body(stream=True, max_tokens=4096)).encode()
    with running(bounds=Bounds(write_s=0.2)) as server, socket.socket() as connection:
        server.scheduler.script = ("word " * 4000,) * 4096
        server.scheduler.tokens = server.scheduler.tokens[:1] * 4096
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        connection.sendall(head_of(len(raw)) + raw)
        assert server.scheduler.answers.get(timeout=300).cancelled.wait(300)
        assert lost.wait(300)


def test_no_more_requests_than_so_are_under_way(server):
    server.scheduler.gate.clear()
    raw = json.dumps(body()).encode()
    connections = [socket.create_connection(server.address, timeout=300) for _ in range(8)]
    try:
        while not server.scheduler.answers.empty():
            server.scheduler.answers.get()
        for connection in connections:
            connection.sendall(head_of(len(raw)) + raw)
        held = [server.scheduler.answers.get(timeout=300) for _ in connections]
        status, error = server.error(CHAT, body())
        assert (status, error["code"], error["type"]) == (429, "too_many_requests", "rate_limit_error")
        assert server.exchange(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[0] == 200
    finally:
        for connection in connections:
            connection.close()
        server.scheduler.gate.set()
    assert all(answer.cancelled.wait(300) for answer in held)
