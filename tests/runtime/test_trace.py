"""Traces: the Chrome format, the picture, and overlap seen in a streamed prefill."""

from __future__ import annotations

import json

import pytest
from conftest import TWO_STAGES, family_model, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.runtime.trace import Span


def hand_made() -> cb.Trace:
    trace = cb.Trace(clock=iter([1.0, 3.0]).__next__)
    with trace.span("disk", "layer 0 at 0", 0):
        pass
    trace.spans.append(Span("disk", "layer 0 at 8", 0, 2.0, 4.0, thread=-1))
    trace.add("compute", "layer 0", 0, 3.5, 6.0)
    return trace


def test_the_chrome_format_has_a_process_for_each_lane_and_a_row_for_each_thread():
    events = hand_made().to_chrome()["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["cat"], event["ts"], event["dur"], event["tid"]) for event in spans] == [
        ("disk", 0.0, 2e6, 0),
        ("disk", 1e6, 2e6, 1),
        ("compute", 2.5e6, 2.5e6, 0),
    ]
    lanes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert [lanes[event["pid"]] for event in spans] == ["disk", "disk", "compute"]
    assert cb.Trace().to_chrome()["displayTimeUnit"] == "ms"


def test_a_tier_of_any_name_has_its_lane():
    trace = hand_made()
    trace.add("nvme", "layer 1 at 0", 1, 4.0, 5.0)
    chrome = trace.to_chrome()["traceEvents"]
    assert [event["cat"] for event in chrome if event["ph"] == "X"] == ["disk", "disk", "nvme", "compute"]


def test_overlap_counts_time_once():
    trace = hand_made()
    assert trace.overlap_s("disk", "compute") == pytest.approx(0.5)
    assert trace.overlap_s("disk", "disk") == pytest.approx(3.0)
    assert trace.overlap_s("disk", "host") == 0


def test_a_streamed_prefill_shows_every_layer_in_its_lanes(tmp_path):
    store, prompt = cb.ChunkStore(), random_prompt(1)
    with cb.Engine(family_model("llama3"), cb.store.ThrottledStore(store, 1e12), TWO_STAGES) as engine:
        engine.precompute(prompt)
        engine.prefill(prompt)
        trace = cb.Trace()
        engine.prefill(prompt, trace=trace)
    for lane, spans_a_layer in (("disk", 5), ("host", 5), ("transfer", 1), ("compute", 1)):
        layers = [span.layer for span in trace.lane(lane)]
        assert sorted(layers) == sorted([*range(6)] * spans_a_layer)
    ends = {span.layer: span.ended for span in trace.lane("transfer")}
    reads = {layer: max(s.ended for s in trace.lane("host") if s.layer == layer) for layer in range(6)}
    for span in trace.lane("compute"):
        assert reads[span.layer] <= ends[span.layer] <= span.ended
    assert [span.layer for span in trace.lane("compute")] == [*range(6)]
    path = tmp_path / "trace.json"
    trace.save(path)
    assert len([event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]) == 72
    trace.save_picture(path.with_suffix(".png"), "a title")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_title_of_its_own_or_the_one_given():
    assert [hand_made()._figure(title).axes[0].get_title() for title in ("", "mine")] == [
        "A prefill of 5000.0 ms (numbers: its layers)",
        "mine",
    ]


def test_a_trace_that_cannot_be_written_is_named(tmp_path):
    for save in (hand_made().save, hand_made().save_picture):
        with pytest.raises(cb.CacheBlendError, match="cannot write"):
            save(tmp_path / "nowhere" / "trace.png")
