"""The controller: its estimates, its choices, and its profiles, wrong ones included."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from conftest import FAMILIES, family_model, random_prompt, relative_error
from hypothesis import given
from hypothesis import strategies as st

import cacheblend_jax as cb
from cacheblend_jax.blend.config import AUTO_RATIOS
from cacheblend_jax.engine.controller import decide, explain
from cacheblend_jax.engine.delays import ComputeModel, Estimator, layer_sizes, pipeline_s
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.planner import Planner, choose_executor
from cacheblend_jax.engine.profile import default_path, device_kind, profile_for, store_name
from cacheblend_jax.model.kv_cache import layer_bytes
from cacheblend_jax.runtime.link import SimulatedLink
from cacheblend_jax.store import ChunkEntry

CONFIG = FAMILIES["llama3"]
ROW_S = 1e-4  # per row that goes on: the only cost of computing in these tests
COMPUTE = ComputeModel(0.0, 0.0, 0.0, ROW_S, 0.0)
CHUNK_BYTES = 512 * CONFIG.num_layers * 100
LENGTH = 1024 + 32


@dataclasses.dataclass
class Handle:
    """A stored chunk with a size and a tier, but no KV."""

    num_tokens: int
    num_bytes: int
    tier: str
    num_layers: int = CONFIG.num_layers
    device_entry: None = None
    host_entry: ChunkEntry | None = None
    kv_dtype: str | None = None
    has_k_offset: bool = False
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_layers, self.num_tokens, CONFIG.num_kv_heads, CONFIG.head_dim

    def read_layer(self, layer, heads=None):
        raise AssertionError("nothing is read here")

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def stored(start, tokens, num_bytes, tier="disk"):
    ids = np.zeros(tokens, np.int32)
    return PlacedChunk("", "", ids[:0], ids, start, stored=Handle(tokens, num_bytes, tier))


def at_tier(chunk, tier):
    return dataclasses.replace(chunk, stored=dataclasses.replace(chunk.stored, tier=tier))


CHUNKS = [stored(i * 512, 512, CHUNK_BYTES) for i in range(2)]


def estimator(bytes_per_s=1e6, latency_s=0.0, compute=COMPUTE, **tiers):
    tiers = {"disk": cb.engine.Tier("disk", bytes_per_s, latency_s)} | tiers
    return Estimator("test", compute, tiers, cb.engine.Tier("transfer", 1e15), host_layers=3, device_layers=2)


def planner(floor=0.15):
    ratios = (floor, *(ratio for ratio in AUTO_RATIOS if ratio > floor))
    return Planner(CONFIG, cb.BlendConfig("auto", auto_ratios=ratios))


def recompute_s(ratio):
    plan = planner().at(ratio).plan("blend", LENGTH, 0, 1024)
    return sum(COMPUTE.layer_seconds(plan))


def load_at(seconds):
    """An estimator whose tier loads both chunks in `seconds`."""
    return estimator(2 * CHUNK_BYTES / seconds)


def test_a_layers_time_follows_the_rows_it_computes():
    plan = planner().at(0.15).plan("blend", LENGTH, 0, 1024)
    rows = [(projected, attending) for _, _, projected, attending, _ in layer_sizes(plan)]
    assert rows[0] == (plan.active, plan.active)
    assert rows[1] == (plan.active, plan.stages[1].rows)  # the check layer: all are projected, few go on
    assert rows[-1] == (plan.stages[-1].rows, 1)
    assert len(rows) == CONFIG.num_layers
    model = ComputeModel(1.0, 0.0, 2.0, 3.0, 0.0)
    assert model.layer_seconds(plan)[1] == 1 + 2 * plan.active + 3 * plan.stages[1].rows
    full = planner().plan("full", LENGTH, 0, 0)
    assert layer_sizes(full)[0] == (1, full.cache_length, full.active, full.active, full.active * full.cache_length / 2)


@pytest.mark.parametrize("ratio", AUTO_RATIOS[1:-2])  # above these, computing one chunk and loading the other wins
def test_the_ratio_is_the_highest_that_loading_hides(ratio):
    decision = decide(load_at(recompute_s(ratio) * 1.001), planner(), LENGTH, CHUNKS)
    assert (decision.ratio, decision.bound, decision.computed_chunks) == (ratio, "load", 0)
    assert decision.recompute_s <= decision.load_s
    slightly_faster = decide(load_at(recompute_s(ratio) * 0.999), planner(), LENGTH, CHUNKS)
    assert slightly_faster.ratio < ratio


def test_what_is_not_streamed_hides_nothing():
    resident = dataclasses.replace(load_at(recompute_s(0.5)), executor="resident")
    decision = decide(resident, planner(), LENGTH, CHUNKS)
    assert (decision.ratio, decision.bound) == (0.15, "floor")
    assert decision.predicted_ttft_s == pytest.approx(decision.load_s + decision.recompute_s, rel=1e-3)


def test_a_pass_of_the_question_is_counted_and_hides_the_loading_in_the_blends_place():
    query = Planner(CONFIG, cb.BlendConfig("auto", "query"))
    plan = query.at(0.15).plan("blend", LENGTH, 0, 1024)
    without = planner().at(0.15).plan("blend", LENGTH, 0, 1024)
    asked = COMPUTE.question_seconds(plan)
    assert COMPUTE.question_seconds(without) == []
    assert len(asked) == CONFIG.num_layers
    model = ComputeModel(1.0, 0.0, 2.0, 3.0, 5.0)
    assert model.question_seconds(plan)[0] == 1 + (2 + 3) * plan.forced + 5 * plan.forced * plan.cache_length
    compute, resident = sum(COMPUTE.layer_seconds(plan)), dataclasses.replace(load_at(1e-9), executor="resident")
    assert resident.ttft_s(plan, CHUNKS, 1) - resident.ttft_s(without, CHUNKS, 1) == pytest.approx(sum(asked))
    slow = load_at(compute * 3)
    assert slow.ttft_s(plan, CHUNKS, 1) == pytest.approx(compute * 4 + asked[-1], rel=1e-3)  # load, then blend
    assert slow.ttft_s(without, CHUNKS, 1) < compute * 3.5
    decision = decide(load_at(recompute_s(0.5)), query, LENGTH, CHUNKS)
    assert (decision.ratio, decision.bound) == (0.15, "floor")


def test_the_ratio_never_falls_below_the_floor():
    decision = decide(load_at(recompute_s(0.15) / 10), planner(), LENGTH, CHUNKS)
    assert (decision.ratio, decision.bound) == (0.15, "floor")
    assert decision.recompute_s > decision.load_s
    assert decide(load_at(1e-6), planner(0.4), LENGTH, CHUNKS).ratio == 0.4


def test_chunks_that_load_slower_than_they_compute_are_computed():
    slow = load_at(recompute_s(1.0) * 10)
    decision = decide(slow, planner(), LENGTH, CHUNKS)
    assert decision.computed_chunks == 2
    assert decision.computed_starts == (0, 512)
    assert decision.predicted_ttft_s < slow.load_s(CHUNKS, CONFIG.num_layers) * CONFIG.num_layers / 5
    # one of them comes from memory: only the other is computed
    mixed = [CHUNKS[0], at_tier(CHUNKS[1], "host")]
    fast = dataclasses.replace(slow, tiers=slow.tiers | {"host": cb.engine.Tier("host", 1e15)})
    decision = decide(fast, planner(), LENGTH, mixed)
    assert (decision.computed_starts, decision.loaded_chunks) == ((0,), 1)


def test_what_is_not_compiled_is_not_worth_it():
    slow = load_at(1e6)
    mixed = [CHUNKS[0], at_tier(CHUNKS[1], "host")]
    fast = dataclasses.replace(slow, tiers=slow.tiers | {"host": cb.engine.Tier("host", 1e15)})
    nothing = decide(fast, planner(), LENGTH, mixed, is_prepared=lambda plan, chunks: False)
    assert nothing.computed_chunks == 0
    full = decide(fast, planner(), LENGTH, mixed, is_prepared=lambda plan, _: plan.nothing_cached)
    assert full.computed_chunks == 2
    in_memory = decide(fast, planner(), LENGTH, mixed, is_prepared=lambda _, chunks: chunks == mixed[1:])
    assert in_memory.computed_starts == (0,)  # what is left comes from memory


def test_the_way_to_the_device_is_as_long_as_quantised_bytes_are():
    slow_link = linked(recompute_s(0.5))
    values = decide(slow_link, planner(), LENGTH, IN_MEMORY)
    codes = decide(slow_link, planner(), LENGTH, IN_MEMORY, kv_dtype=lambda _: "int8")
    length = planner().at(values.ratio).plan("blend", LENGTH, 0, LENGTH - 1).cache_length
    share = layer_bytes(CONFIG, length, "int8") / layer_bytes(CONFIG, length)
    assert codes.load_s == pytest.approx(share * values.load_s)
    assert share == (CONFIG.head_dim + 2) / (4 * CONFIG.head_dim)


def test_what_is_on_the_device_needs_no_loading():
    slow, chunks = load_at(10.0), [at_tier(chunk, "device") for chunk in CHUNKS]
    assert slow.load_s(chunks, CONFIG.num_layers) == 0
    assert slow.executor_of(chunks) == "resident"
    decision = decide(slow, planner(), LENGTH, chunks)
    assert (decision.loaded_chunks, decision.load_s, decision.bound) == (len(chunks), 0.0, "floor")


IN_MEMORY = [at_tier(chunk, "host") for chunk in CHUNKS]


def linked(seconds):
    """An estimator of a device whose link takes `seconds` for all layers; host memory itself takes no time."""
    plan = planner().at(0.15).plan("blend", LENGTH, 0, 1024)
    padded = CONFIG.num_layers * plan.cache_length * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    tiers = {"host": cb.engine.Tier("host", 1e15)}
    transfer = cb.engine.Tier("transfer", padded / seconds)
    return dataclasses.replace(estimator(), tiers=tiers, transfer=transfer, host_streams=True)


def test_a_link_that_is_hidden_is_loading_too():
    seconds = recompute_s(0.5) * 1.001
    decision = decide(linked(seconds), planner(), LENGTH, IN_MEMORY)
    assert (decision.ratio, decision.bound) == (0.5, "load")
    assert decision.load_s == pytest.approx(seconds)
    waits = dataclasses.replace(linked(seconds), host_streams=False)
    decision = decide(waits, planner(), LENGTH, IN_MEMORY)
    assert (decision.ratio, decision.bound) == (0.15, "floor")
    assert decision.load_s == pytest.approx(seconds)  # before the computing, which hides nothing


@pytest.mark.parametrize(
    ("setting", "tiers", "host_streams", "wanted"),
    [
        ("auto", ["host"], False, "resident"),
        ("auto", ["host"], True, "streamed"),
        ("auto", ["host", "device"], True, "resident"),  # layers on the device would have to come to the host first
        ("auto", ["device"], True, "resident"),
        ("auto", ["host", "disk"], False, "streamed"),
        ("auto", [], True, "resident"),
        ("streamed", ["host"], False, "streamed"),
        ("resident", ["host"], True, "resident"),
    ],
)
def test_the_executor_follows_from_the_tiers_and_the_link(setting, tiers, host_streams, wanted):
    assert choose_executor(setting, tiers, host_streams=host_streams) == wanted


def test_what_the_device_reads_in_place_waits_for_the_link_alone():
    entry = ChunkEntry(*(np.zeros((1, 1, 1, 1), np.float32) for _ in "kv"))
    handles = [dataclasses.replace(chunk.stored, tier="host", host_entry=entry) for chunk in CHUNKS]
    chunks = [dataclasses.replace(chunk, stored=handle) for chunk, handle in zip(CHUNKS, handles, strict=True)]
    slow_copies = cb.engine.Tier("host", 1e3)
    copied = dataclasses.replace(estimator(host=slow_copies), host_streams=True)
    read = dataclasses.replace(copied, page_rows=1024)
    one_copied = [chunks[0], CHUNKS[1]]  # from disk: both are put together in host memory
    assert copied.load_s(chunks, CONFIG.num_layers) > 0
    assert read.load_s(chunks, CONFIG.num_layers) == 0
    assert read.load_s(one_copied, CONFIG.num_layers) == copied.load_s(one_copied, CONFIG.num_layers)
    coded = [dataclasses.replace(chunks[0], stored=dataclasses.replace(handles[0], kv_dtype="int8"))]
    assert read.load_s(coded, CONFIG.num_layers) > 0
    assert dataclasses.replace(read, executor="resident").load_s(chunks, CONFIG.num_layers) > 0
    layer = layer_bytes(CONFIG, LENGTH)
    assert read.delivery_s(chunks, CONFIG.num_layers, layer) == pytest.approx(layer / 1e15)


def test_what_a_pass_of_the_question_reads_in_place_is_sent_once():
    entry, link = ChunkEntry(*(np.zeros((1, 1, 1, 1), np.float32) for _ in "kv")), cb.engine.Tier("transfer", 1e9)
    copied = dataclasses.replace(estimator(host=cb.engine.Tier("host", 1e15)), transfer=link, host_streams=True)
    read = dataclasses.replace(copied, page_rows=1024)
    handles = [dataclasses.replace(chunk.stored, tier="host", host_entry=entry) for chunk in CHUNKS]
    chunks = [dataclasses.replace(chunk, stored=handle) for chunk, handle in zip(CHUNKS, handles, strict=True)]
    plan, layer = Planner(CONFIG, cb.BlendConfig(0.15, "query")).plan("blend", LENGTH, 0, 100), 10**9
    sent_once, sent_twice = read.ttft_s(plan, chunks, layer), copied.ttft_s(plan, chunks, layer)
    compute, question = sum(COMPUTE.layer_seconds(plan)), COMPUTE.question_seconds(plan)
    assert sent_once == pytest.approx(CONFIG.num_layers + question[-1] + compute + COMPUTE.request_s, rel=0.01)
    assert sent_twice - sent_once == pytest.approx(CONFIG.num_layers - compute, rel=0.2)


def test_layers_that_the_device_has_need_no_loading():
    seconds, asked = recompute_s(0.5) * 1.001, []

    def num_kept(plan, chunks):
        asked.append((plan.cache_length, len(chunks)))
        return CONFIG.num_layers if len(chunks) == 2 else 0

    decision = decide(linked(seconds), planner(), LENGTH, IN_MEMORY, num_kept=num_kept)
    assert (decision.ratio, decision.load_s, decision.computed_chunks) == (0.15, 0.0, 0)
    assert decision.predicted_ttft_s == pytest.approx(decision.recompute_s)
    assert {count for _, count in asked} == {1, 2}  # of no chunks there are no layers
    half = decide(linked(seconds), planner(), LENGTH, IN_MEMORY, num_kept=lambda *_: CONFIG.num_layers // 2)
    assert half.load_s == pytest.approx(seconds / 2)


def test_a_pipeline_begins_with_the_layers_that_are_there():
    assert pipeline_s(1.0, 0.0, [1.0] * 10, 4, 2, kept=10) == pytest.approx(10.0)
    assert pipeline_s(2.0, 0.5, [1.0] * 10, 8, 4, kept=4) == pytest.approx(6 * 2.0 + 0.5 + 1.0)  # read from the start
    assert pipeline_s(1.0, 0.0, [1.0] * 10, 4, 2, kept=4) == pytest.approx(10.0)


def test_the_cap_is_recomputing_everything_that_is_loaded():
    # Many layers: waiting for the first one's KV costs little, so that loading is still worth it.
    deep = Planner(dataclasses.replace(CONFIG, num_layers=64, windows=()), cb.BlendConfig("auto"))
    whole = [stored(0, 1024, 2 * CHUNK_BYTES)]
    at_one = deep.at(1.0).plan("blend", LENGTH, 0, 1024)
    all_of_it = sum(COMPUTE.layer_seconds(at_one))
    decision = decide(load_at(all_of_it * 1.01), deep, LENGTH, whole)
    assert (decision.ratio, decision.bound, decision.computed_chunks) == (1.0, "cap", 0)


def test_nothing_stored_is_all_recomputed():
    decision = decide(estimator(), planner(), LENGTH, [])
    assert (decision.loaded_chunks, decision.load_s, decision.bound) == (0, 0.0, "floor")


@given(
    st.floats(0, 5),
    st.floats(0, 5),
    st.lists(st.floats(0.01, 5), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_a_pipeline_takes_as_long_as_its_slowest_lane_and_at_most_the_sum(load, transfer, compute, device, more):
    seconds = pipeline_s(load, transfer, compute, device + more, device)
    lanes = (load * len(compute), transfer * len(compute), sum(compute))
    assert seconds >= max(max(lanes), load + transfer + compute[-1]) - 1e-9
    assert seconds <= sum(lanes) + 1e-9


def test_a_pipeline_hides_loading_but_for_the_first_layer():
    assert pipeline_s(1.0, 0.0, [1.0] * 10, 4, 2) == pytest.approx(11.0)
    assert pipeline_s(0.1, 0.0, [1.0] * 10, 4, 2) == pytest.approx(10.1)
    assert pipeline_s(2.0, 0.0, [1.0] * 10, 4, 2) == pytest.approx(21.0)
    assert pipeline_s(1.0, 0.0, [1.0] * 10, 1, 1) == pytest.approx(20.0)  # no room to run ahead


def test_the_cheapest_tier_that_hides():
    tiers = [
        cb.engine.Tier("ram", 1e10, 0, 10.0),
        cb.engine.Tier("ssd", 1e9, 0, 0.1),
        cb.engine.Tier("disk", 1e8, 0, 0.02),
    ]
    assert cb.engine.cheapest_tier(tiers, 1e6, 0.1) == (tiers[2], True)
    assert cb.engine.cheapest_tier(tiers, 1e6, 0.005) == (tiers[1], True)
    assert cb.engine.cheapest_tier(tiers, 1e6, 1e-6) == (tiers[0], False)
    latency = [tiers[0], dataclasses.replace(tiers[1], latency_s=0.1)]
    assert cb.engine.cheapest_tier(latency, 1e6, 0.1, reads=8) == (tiers[0], True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cb.engine.Tier("ssd", 0), "tier 'ssd': bytes_per_s must be positive and finite, got 0"),
        (lambda: cb.engine.Tier("ssd", -1.0), "bytes_per_s must be positive"),
        (lambda: cb.engine.Tier("ssd", 1.0, -1.0), "latency_s must be at least 0"),
        (lambda: cb.engine.Tier("ssd", 1.0, 0.0, -1.0), "price_per_gb_month must be at least 0"),
        (lambda: cb.engine.cheapest_tier([], 1, 1), "the list of tiers is empty"),
        (lambda: cb.engine.cheapest_tier([cb.engine.Tier("ssd", 1.0)], 1, 1), "tier 'ssd' has no price"),
        (lambda: cb.BlendConfig("auto", auto_ratios=()), "auto_ratios must be ratios in"),
        (lambda: cb.BlendConfig("auto", auto_ratios=(0.5, 1.5)), "auto_ratios must be ratios in"),
        (lambda: cb.BlendConfig("auto", auto_ratios=(0.0, 0.5)), "auto_ratios must be ratios in"),
        (lambda: cb.BlendConfig("auto", auto_ratios=(0.5, 0.3)), "auto_ratios must be ascending"),
        (lambda: cb.BlendConfig("much"), r"recompute_ratio must be in \[0, 1\], got 'much'; 'auto' lets"),
        (
            lambda: cb.Engine(family_model("llama3"), blend="fast"),
            "blend must be a BlendConfig or 'auto', got 'fast'",
        ),
        (lambda: cb.Engine(family_model("llama3"), blend=1.0), "blend must be a BlendConfig or 'auto', got 1.0"),
        (lambda: cb.Engine(family_model("llama3"), blend={}), "blend must be a BlendConfig or 'auto', got {}"),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
    with pytest.raises(cb.CacheBlendError, match=message):
        make()


def profile(model, directory=None, changes=()):
    own = {"model": model.fingerprint, "device": device_kind(model), "store": store_name(directory)}
    tiers = {"host": cb.engine.Tier("host", 1e9), "disk": cb.engine.Tier("disk", 1e5)}
    own |= {"compute": COMPUTE, "tiers": tiers, "transfer": cb.engine.Tier("transfer", 1e15), "fit": {}}
    return cb.engine.Profile(**own | dict(changes))


def balanced_bytes_per_s(ratio, prefix, chunks, suffix):
    """Returns the throughput at which loading takes a tenth longer than recomputing at that ratio (in one stage)."""
    planner = Planner(CONFIG, cb.BlendConfig(ratio, num_stages=1))
    plan = planner.plan("blend", prefix + chunks + suffix, prefix, chunks)
    token_bytes = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4
    return token_bytes * (prefix + chunks) / (1.1 * sum(COMPUTE.layer_seconds(plan)))


def test_an_automatic_engine_follows_its_profile_and_says_so():
    model, prompt = family_model("llama3"), random_prompt(1, (310,))
    store = cb.store.ThrottledStore(cb.ChunkStore(), 1e12)
    balanced = balanced_bytes_per_s(0.3, 9, 310, 7)
    for bytes_per_s, ratio, computed in ((1e15, 0.15, 0), (balanced, 0.3, 0), (1e2, 0.15, 2)):
        tiers = {"disk": cb.engine.Tier("disk", bytes_per_s)}
        own = profile(model, store.directory, {"tiers": tiers})
        auto = cb.BlendConfig("auto", num_stages=1, auto_ratios=(0.15, 0.3, 0.5))
        with cb.Engine(model, store, auto, profile=own) as engine:
            engine.precompute(prompt)
            out = engine.prefill(prompt)
            decision = out.stats.decision
            assert (decision.ratio, decision.computed_chunks) == (ratio, computed)
            assert (out.stats.hits, out.stats.misses) == (1, 0)
            if computed:
                full = engine.prefill(prompt, "full")
                assert relative_error(out.logits, full.logits) < 1e-5
                assert out.recomputed.all()
                assert full.stats.decision is None
            else:
                assert out.stats.recompute_ratio == pytest.approx(decision.ratio, abs=0.01)
            text = explain(decision, out.stats.ttft_s)
            assert f"recompute ratio {decision.ratio:g}" in text
            assert "the profile given" in text
            assert len(store) == 2  # what was computed for cost was in the store already


def test_warm_up_compiles_every_ratio():
    model, prompt = family_model("llama3"), random_prompt(2, (116,), 5)
    auto, store, counts = cb.BlendConfig("auto", num_stages=1, auto_ratios=(0.15, 0.5)), cb.ChunkStore(), set()
    for bytes_per_s, ratio, computed in (
        (1e15, 0.15, 0),
        (balanced_bytes_per_s(0.5, 5, 116, 7), 0.5, 0),
        (1e2, 0.15, 2),  # so slow that nothing is worth loading
    ):
        own = profile(model, changes={"tiers": {"host": cb.engine.Tier("host", bytes_per_s)}})
        with cb.Engine(model, store, auto, executor="streamed", profile=own) as engine:
            engine.warmup(128, prefix_tokens=5, suffix_tokens=7)
            engine.precompute(prompt)
            counts.add(engine.model.runner.count)
            decision = engine.prefill(prompt).stats.decision
            assert (decision.ratio, decision.computed_chunks) == (ratio, computed)
            counts.add(engine.model.runner.count)
    assert len(counts) == 1  # the first warm-up compiled what all of them need


def test_a_link_has_a_speed_for_each_kind_of_memory(tmp_path):
    model, path = family_model("llama3"), tmp_path / "profile.json"
    slow = cb.engine.Tier("pageable", 1e9)
    both = profile(model, changes={"pageable": slow})
    both.save(path)
    assert cb.engine.Profile.read(path) == both
    assert both.transfer_from(page_locked=True) is both.transfer
    assert both.transfer_from(page_locked=False) is slow
    assert profile(model).transfer_from(page_locked=False).name == "transfer"
    content = json.loads(path.read_text())
    del content["pageable"]  # as files had it before
    path.write_text(json.dumps(content))
    assert cb.engine.Profile.read(path) == profile(model)
    with cb.Engine(model, profile=both) as engine:  # a CPU locks no pages
        assert engine.estimator().transfer == slow
    with cb.Engine(model, profile=both, link=SimulatedLink(123.0)) as engine:
        assert engine.estimator().transfer.bytes_per_s == 123.0


def test_a_profile_is_kept_as_it_was(tmp_path):
    model = family_model("llama3")
    path = tmp_path / "deep" / "profile.json"
    profile(model).save(path)
    assert cb.engine.Profile.read(path) == profile(model)
    assert profile_for(model, None, path)[1] == f"profile {path}"


@pytest.mark.parametrize(("what", "value"), [("model", "0" * 64), ("device", "TPU v9 x 4"), ("store", "/elsewhere")])
def test_a_foreign_profile_is_named_and_ignored(what, value, tmp_path, caplog):
    model, path = family_model("llama3"), tmp_path / "profile.json"
    foreign = profile(model, changes={what: value})
    foreign.save(path)
    used, name = profile_for(model, None, path)
    assert name == "a quick built-in estimate"
    assert used.compute != COMPUTE
    assert f"{path} is of another {what} ({value!r}" in caplog.text
    assert "is ignored" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the profile"),
        ("[]", "is not a profile"),
        ('{"version": 0}', "is of another version"),
        ('{"version": 1}', "is not a profile"),
    ],
)
def test_a_profile_that_is_none_is_named(content, message, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(cb.CacheBlendError, match=message):
        cb.engine.Profile.read(path)


def test_a_profile_with_a_throughput_of_zero_is_named(tmp_path):
    model, path = family_model("llama3"), tmp_path / "profile.json"
    profile(model).save(path)
    content = json.loads(path.read_text())
    content["tiers"]["disk"]["bytes_per_s"] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(cb.CacheBlendError, match="bytes_per_s must be positive"):
        cb.engine.Profile.read(path)


def test_without_a_profile_a_quick_estimate_is_used_and_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, prompt = family_model("llama3"), random_prompt(3)
    with cb.Engine(model, blend=cb.BlendConfig("auto", num_stages=1, auto_ratios=(0.15, 0.3))) as engine:
        engine.precompute(prompt)
        for _ in range(2):
            decision = engine.prefill(prompt).stats.decision
    assert caplog.text.count("a quick estimate is used") == 1
    assert decision.estimated_by == "a quick built-in estimate"
    assert decision.predicted_ttft_s > 0
    profile(model).save(default_path(model, None))
    assert profile_for(model, None, None)[0].compute == COMPUTE


def test_a_stores_name_is_its_place_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_name("~/kv") == str(tmp_path / "kv")
    monkeypatch.chdir(tmp_path)
    assert store_name("kv") == str(tmp_path / "kv")
    assert store_name("gs://bucket/kv") == "gs://bucket/kv"
    assert store_name(None) == ""
