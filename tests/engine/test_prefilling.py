"""What counts as a request's time."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

from cacheblend_jax.engine import prefilling


def test_a_stopped_timer_leaves_out_what_raises_too(monkeypatch):
    now = 100.0
    monkeypatch.setattr(prefilling, "time", SimpleNamespace(perf_counter=lambda: now))
    timer = prefilling.Timer()
    now += 1.0
    with timer.stopped():
        now += 10.0
    with suppress(KeyError), timer.stopped():
        now += 20.0
        raise KeyError
    now += 2.0
    assert timer.elapsed_s() == 3.0
