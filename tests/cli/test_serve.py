"""The command `serve`: from its options to answers of the real scheduler, until it is told to end."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest

import cacheblend_jax as cb
from cacheblend_jax import serving
from cacheblend_jax.cli import serve
from cacheblend_jax.cli.main import main
from cacheblend_jax.store.keys import is_of_tenant

CHUNKS = ["Reyes took the nickname Cobalt. Ridge is new.", "Oslo is now home to Cobalt. Lima is home to Ridge."]
QUESTION = "In which city is the office of Reyes?"


def ask(client, **options):
    content = [{"type": "text", "text": text} for text in (*CHUNKS, QUESTION)]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model="records", messages=messages, temperature=0, extra_body={"cacheblend": {"mode": "reuse"}}, **options
    )


def conversation(address: str) -> dict:
    """What two tenants ask and get; the server is told to end while the last answer comes."""
    ada, bob = (openai.OpenAI(base_url=address, api_key=key) for key in ("key-a", "key-b"))
    with ada, bob:
        stored = ada.post("/chunks", body={"chunks": CHUNKS}, cast_to=object)["data"]
        of_ada, of_bob = ask(ada), ask(bob)
        stream = ask(ada, stream=True)
        first = next(stream)
        os.kill(os.getpid(), signal.SIGTERM)
        events = [event.choices[0] for event in (first, *stream)]
    return {
        "keys": [each["id"] for each in stored],
        "hits": (of_ada.cacheblend["hits"], of_bob.cacheblend["hits"]),
        "texts": {of_ada.choices[0].message.content, "".join(each.delta.content or "" for each in events)},
        "finish_reason": events[-1].finish_reason,
    }


@pytest.mark.once
def test_tenants_are_served_by_the_real_scheduler_until_sigterm(tmp_path, monkeypatch):
    keys, store, report = (tmp_path / name for name in ("keys.json", "kv", "report.json"))
    keys.write_text(json.dumps({"key-a": "ada", "key-b": "bob"}))
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(serve, "print_status", said.put)
    options = ["--port", "0", "--keys", str(keys), "--store", str(store), "--model-name", "records"]
    options += ["--slots", "2", "--slot-tokens", "128", "--max-new-tokens", "3", "--json", str(report)]
    with ThreadPoolExecutor(1) as clients:
        got = clients.submit(lambda: conversation(said.get(timeout=120).split()[-1]))
        got.add_done_callback(lambda done: done.exception() and os.kill(os.getpid(), signal.SIGTERM))
        assert main(["serve", *options]) == 0
    told = got.result()
    assert told["hits"] == (2, 0)
    assert len(told["texts"]) == 1
    assert told["finish_reason"] in ("stop", "length")
    assert json.loads(report.read_text()) == {"model": "records"}
    with cb.ChunkStore(store) as later:  # what bob's request missed is stored, as his
        assert set(told["keys"]) <= set(later.keys())
        assert sum(is_of_tenant(key, "bob") for key in later.keys()) >= 2  # noqa: SIM118, a store is no dict


@pytest.mark.parametrize(
    ("host", "is_checked"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1")],
        *[(host, False) for host in ("0.0.0.0", "10.0.0.1", "::")],
    ],
)
def test_only_a_server_that_anybody_here_may_ask_checks_whom_requests_are_sent_to(host, is_checked):
    hosts = serve._hosts(host, serving.Tenants())
    assert (hosts is not None) == is_checked
    assert not is_checked or {"localhost", "127.0.0.1", "[::1]"} <= set(hosts)
    assert serve._hosts(host, serving.Tenants.with_key("key")) is None


def test_only_a_server_that_has_served_is_left_where_it_does_not_end(monkeypatch):
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    for is_closed, kind in ((False, ValueError), (True, None), (True, KeyboardInterrupt)):
        serve._leave_unless_closed(SimpleNamespace(is_closed=is_closed), kind, None, None)
    assert left == []
    for kind in (None, KeyboardInterrupt):
        serve._leave_unless_closed(SimpleNamespace(is_closed=False), kind, None, None)
    assert left == [1, 1]


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cacheblend_jax.serving.app", None)
    monkeypatch.delitem(vars(serving), "make_app", raising=False)  # it would be imported to be deleted
    assert main(["serve"]) == 2
    assert "pip install 'cacheblend-jax[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--keys", "nowhere.json"], "keys file 'nowhere.json' cannot be read"),
        (["--api-key", "a b"], "printable ASCII"),
        (["--context", "documents"], "needs documents"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
        (["--port", "70000"], "cannot listen on 127.0.0.1 port 70000"),
    ],
)
def test_what_cannot_be_served_is_said_before_the_model_is_loaded(options, reason, capsys, monkeypatch):
    monkeypatch.setattr(serve, "load_with_bar", lambda *_: pytest.fail("loaded"))
    assert main(["serve", *options]) == 2
    assert reason in capsys.readouterr().err
