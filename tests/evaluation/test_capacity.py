"""The capacity planner: held to what was measured, to what the controller decides, and to XLA's account of memory."""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, unchecked
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

import cacheblend_jax as cb
from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.layer_step import PromptSequence
from cacheblend_jax.blend.resident import prefill
from cacheblend_jax.engine.controller import decide
from cacheblend_jax.engine.delays import ComputeModel, Tier
from cacheblend_jax.engine.executors import Executors
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.planner import Planner, empty_request
from cacheblend_jax.engine.profile import Profile
from cacheblend_jax.evaluation.capacity import plan_capacity, timed_prefill
from cacheblend_jax.evaluation.capacity_memory import program_memory
from cacheblend_jax.evaluation.deployment import TIERS, Deployment, Workload, chunk_bytes, stored_chunks
from cacheblend_jax.evaluation.devices import DEVICES, device_named
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.evaluation.whole_prefills import kernels
from cacheblend_jax.model.kv_cache import abstract_cache
from cacheblend_jax.model.rope import Angles
from cacheblend_jax.model.sharding import partition_of, result_shardings
from cacheblend_jax.model.transformer import abstract_params, axis_names
from cacheblend_jax.runtime.programs import _peak_memory_bytes, shapes_of
from cacheblend_jax.store import ChunkEntry
from pallas_kernels.partition import splitting

LLAMA3_8B = dataclasses.replace(SHAPES["llama-3-8b"], max_positions=16384)  # longer prompts take longer to plan
H100 = Deployment(LLAMA3_8B, DEVICES["H100"])
FEW = 20  # stored chunks, 1.3 GB


@pytest.fixture(autouse=True)
def _quickly():
    with unchecked():
        yield


def with_tier(bytes_per_s: float, **more) -> Deployment:
    return dataclasses.replace(H100, tier=Tier("disk", bytes_per_s), **more)


def with_few(tier: str, **more) -> Deployment:
    """With room for `FEW` stored chunks in whatever tier they are."""
    return dataclasses.replace(H100, tier=TIERS[tier], host_bytes=2 * 10**9, device_tier_bytes=2 * 10**9, **more)


def test_rates_of_the_data_sheet_come_to_what_an_h100_took():
    """docs/results.md: 8,192 tokens in chunks of 512 and a question of 64, all KV on the device."""
    blend = BlendConfig(0.15, selector="hkvd")
    modes = plan_capacity(Workload(8256, reuse=1.0, stored_chunks=FEW), with_few("device", blend=blend)).modes
    for mode, measured_s in (("full", 0.1957), ("blend", 0.0427), ("reuse", 0.0093)):
        assert modes[mode].ttft_s == pytest.approx(measured_s, rel=0.1), mode


class Handle:
    """A stored chunk of a size and a tier, as an engine's layout has it, but no KV."""

    device_entry, kv_dtype = None, None

    def __init__(self, num_bytes: int, tier: str):
        self.num_bytes, self.tier = num_bytes, tier
        self.host_entry = ChunkEntry(*(np.zeros((1, 1, 1, 1), np.float32) for _ in "kv")) if tier == "host" else None


@pytest.mark.parametrize("tier", ["host", "nvme", "network"])
def test_a_blend_is_planned_as_the_controller_would_decide_it(tier):
    workload, deployment = Workload(8256, reuse=1.0, stored_chunks=FEW), with_few(tier)
    estimator, chunks = deployment.estimator(), []
    for number in range(workload.num_chunks):
        ids, handle = np.zeros(512, np.int32), Handle(chunk_bytes(LLAMA3_8B, 512, None), tier)
        chunks.append(PlacedChunk("", "", ids[:0], ids, number * 512, stored=handle))
    decision = decide(estimator, deployment.planner, workload.context, chunks)
    planned = plan_capacity(workload, deployment).modes["blend"]
    assert planned.ttft_s == pytest.approx(decision.predicted_ttft_s)
    assert planned.ratio == decision.ratio
    assert planned.loaded_bytes == decision.loaded_chunks * chunk_bytes(LLAMA3_8B, 512, None)


@pytest.mark.parametrize("kv_dtype", [None, "int8", "float8_e4m3fn"])
def test_a_chunk_takes_the_bytes_that_a_stored_entry_has(kv_dtype):
    config = FAMILIES["llama3"]
    kv = np.ones((config.num_layers, 30, config.num_kv_heads, config.head_dim), np.float32)
    assert ChunkEntry(kv, kv).quantised(kv_dtype).num_bytes == chunk_bytes(config, 30, kv_dtype)


@pytest.mark.parametrize(
    ("deployment", "answer_s", "binds"),
    [
        (with_few("device"), 0.0, "compute"),
        (with_tier(1e9), 0.0, "prefills in turn"),
        (with_tier(1e12, device=dataclasses.replace(DEVICES["H100"], memory_bytes=28e9)), 9.0, "memory"),
    ],
)
def test_the_resource_that_is_short_binds_and_sets_the_number_of_replicas(deployment, answer_s, binds):
    deployment = dataclasses.replace(deployment, blend=BlendConfig(0.15, selector="hkvd"))
    workload = Workload(8256, requests_per_s=100.0, answer_s=answer_s, stored_chunks=FEW)
    plan = plan_capacity(workload, deployment).modes["blend"]
    assert plan.binds == binds
    assert (plan.replicas - 1) * plan.requests_per_s < 100 <= plan.replicas * plan.requests_per_s


@pytest.mark.parametrize("tier", ["device", "host", "nvme", "network"])
@pytest.mark.parametrize("selector", ["hkvd", "query"])
def test_no_replica_does_more_than_prefills_in_turn(tier, selector):
    deployment = with_few(tier, blend=BlendConfig(0.15, selector=selector))
    for mode in plan_capacity(Workload(8256, answer_s=0.0, stored_chunks=FEW), deployment).modes.values():
        assert mode.requests_per_s * mode.ttft_s <= 1 + 1e-9


def test_kv_comes_over_the_link_twice_where_the_question_is_asked_first():
    plans = [
        plan_capacity(Workload(8256), with_tier(1e12, blend=BlendConfig(0.15, selector=selector))).modes["blend"]
        for selector in ("hkvd", "query")
    ]
    once, twice = (plan.most_requests_per_s["link"] for plan in plans)
    assert once == pytest.approx(2 * twice)


def test_one_gpu_reads_host_memory_over_its_link_alone():
    workload = Workload(8256, reuse=1.0, stored_chunks=FEW)

    def planned(selector="hkvd", **more):
        deployment = with_few("host", blend=BlendConfig(0.15, selector=selector), **more)
        return plan_capacity(workload, deployment).modes["blend"]

    assert planned().ttft_s == pytest.approx(0.0496, rel=0.2)  # docs/results.md, on a card that was slower that day
    assert planned("query").most_requests_per_s["link"] == planned().most_requests_per_s["link"]
    small = dataclasses.replace(LLAMA3_8B, num_kv_heads=1)  # much smaller chunks than pages
    for others in ({"num_devices": 2}, {"kv_dtype": "int8"}, {"device": DEVICES["v6e"]}, {"config": small}):
        assert "reading from host" in planned(**others).most_requests_per_s
    assert "reading from host" not in planned().most_requests_per_s
    from_disk = plan_capacity(workload, with_few("nvme", blend=BlendConfig(0.15, selector="hkvd"))).modes["blend"]
    assert planned().memory.program.staging == 4 * from_disk.memory.program.staging  # pages of 16 layers


def test_devices_that_repeat_each_others_work_are_no_faster():
    """Gemma 2 9B has 16 heads, 8 of K and V, and an MLP of 14336: nothing of it divides by 3."""
    gemma = dataclasses.replace(SHAPES["gemma-2-9b"], max_positions=8192)
    one, two, three = (
        plan_capacity(Workload(4096), dataclasses.replace(H100, config=gemma, num_devices=number))
        for number in (1, 2, 3)
    )
    assert three.modes["full"].ttft_s == pytest.approx(one.modes["full"].ttft_s)
    assert two.modes["full"].ttft_s < 0.6 * one.modes["full"].ttft_s
    assert [plan.product_ways for plan in (one, two, three)] == pytest.approx([1, 2, 1], rel=0.01)


def test_a_tier_without_room_for_what_is_stored_is_passed_over():
    workload, tiers = Workload(8256, stored_chunks=1000), [TIERS["device"], TIERS["host"], TIERS["nvme"]]
    assert H100.with_cheapest(tiers, workload).tier.name == "nvme"
    assert dataclasses.replace(H100, host_bytes=10**11).with_cheapest(tiers, workload).tier.name == "host"
    assert dataclasses.replace(H100, device_tier_bytes=10**11).with_cheapest(tiers, workload).tier.name == "device"
    with pytest.raises(cb.CacheBlendError, match=r"^1,000 stored chunks take 67.1 GB, and tier 'host' has 0.0; "):
        H100.with_cheapest([TIERS["host"]], workload)
    with pytest.raises(cb.CacheBlendError, match=r"^1,000 stored chunks take 67.1 GB, and tier 'device' has 4.0; "):
        plan_capacity(workload, dataclasses.replace(H100, tier=TIERS["device"], device_tier_bytes=4 * 10**9))


def test_each_replica_has_a_copy_in_its_own_tiers_and_all_share_the_others():
    workload = Workload(8256, requests_per_s=100.0)
    local, shared = (
        plan_capacity(workload, dataclasses.replace(H100, tier=TIERS[name])) for name in ("nvme", "network")
    )
    assert local.copies == local.modes["blend"].replicas > 1
    assert local.storage_cost == pytest.approx(local.copies * local.stored_bytes / 1e9 * 0.1)
    assert shared.storage_cost == pytest.approx(shared.stored_bytes / 1e9 * 0.08)


@pytest.mark.parametrize(
    ("device", "executor", "in_place"),
    [
        ("NVIDIA H100 80GB HBM3 x 1", "streamed", True),
        ("TPU v6 lite x 1", "streamed", False),
        ("cpu x 1", "resident", False),
    ],
)
def test_a_profile_plans_the_executor_that_its_device_has(device, executor, in_place):
    compute = ComputeModel(1e-3, 0.0, 0.0, 0.0, 0.0)
    profile = Profile("", device, "", compute, {"host": Tier("host", 1e10)}, Tier("transfer", 1e10), {})
    deployment = dataclasses.replace(H100, profile=profile, tier=TIERS["host"])
    assert deployment.estimator().executor_of(stored_chunks(Workload(1088), deployment, 2)) == executor
    assert deployment.reads_in_place(Workload(1088)) == in_place


def test_jax_leaves_a_quarter_of_a_gpu_and_memory_is_as_devices_report_it():
    assert DEVICES["H100"].usable_bytes == pytest.approx(0.75 * 79.65 * 2**30, rel=1e-3)
    assert DEVICES["v5e"].usable_bytes == int(0.95 * 16 * 2**30)


def test_what_does_not_fit_is_said_and_has_no_replicas():
    too_large = dataclasses.replace(SHAPES["llama-3-70b"], max_positions=16384)
    plan = plan_capacity(Workload(8256), dataclasses.replace(H100, config=too_large))
    assert {(mode.binds, mode.requests_per_s, mode.replicas) for mode in plan.modes.values()} == {("memory", 0.0, 0)}
    assert plan.device_cost is plan.storage_cost is None


def test_where_blending_pays_is_where_it_is_faster():
    workload = Workload(8256, reuse=1.0)
    deployment = dataclasses.replace(H100, blend=BlendConfig(0.15, selector="hkvd"))
    plan, estimator = plan_capacity(workload, deployment), deployment.estimator()
    full = timed_prefill(estimator, deployment.planner, "full", workload.context, []).ttft_s
    assert plan.worth.stored > 1
    for count, is_faster in ((plan.worth.stored, True), (plan.worth.stored - 1, False)):
        chunks = stored_chunks(workload, deployment, count)
        blend = timed_prefill(estimator, deployment.planner, "blend", workload.context, chunks).ttft_s
        assert (blend < full) == is_faster
    assert plan_capacity(workload, with_tier(1e7)).worth.stored is None


def test_a_profile_takes_the_place_of_the_data_sheet():
    slow = ComputeModel(1.0, 0.0, 0.0, 0.0, 0.0)
    profile = Profile("", "", "", slow, {"host": Tier("host", 1e9)}, Tier("transfer", 1e9), {})
    plan = plan_capacity(Workload(1088), dataclasses.replace(H100, profile=profile))
    assert plan.modes["full"].ttft_s == LLAMA3_8B.num_layers
    assert plan.estimated_by == "the profile given"


def test_the_cheapest_tier_that_hides_is_taken():
    workload, tiers = Workload(8256), [TIERS[name] for name in ("host", "nvme", "object")]
    roomy = dataclasses.replace(H100, host_bytes=10**13)
    assert roomy.with_cheapest(tiers, workload).tier.name == "host"  # the others are slower than recomputing
    many = dataclasses.replace(roomy, device=dataclasses.replace(DEVICES["H100"], flops_per_s=1e14))
    assert many.with_cheapest(tiers, workload).tier.name == "nvme"
    faster = [TIERS["host"], Tier("flash", 20e9, 0.0, 3.0)]  # than host memory where devices do not read it
    quicker = dataclasses.replace(roomy, device=dataclasses.replace(DEVICES["H100"], flops_per_s=3e15))
    assert quicker.with_cheapest(faster, workload).tier == TIERS["host"]
    assert dataclasses.replace(quicker, num_devices=2).with_cheapest(faster, workload).tier.name == "flash"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workload(8192, reuse=1.5), "reuse must be in [0, 1], got 1.5"),
        (lambda: Workload(8192, requests_per_s=0.0), "requests_per_s must be positive and finite, got 0.0"),
        (
            lambda: dataclasses.replace(H100, price_per_device_hour=-3.0),
            "price_per_device_hour must be at least 0 and ",
        ),
        (
            lambda: dataclasses.replace(H100, price_per_device_hour=float("nan")),
            "price_per_device_hour must be at least",
        ),
        (lambda: Workload(100), "context must hold a chunk and the question, 512 + 64 tokens, got 100"),
        (lambda: plan_capacity(Workload(10**6), H100), "context must be at most 16384 tokens"),
        (lambda: device_named("H900"), "unknown device 'H900'; expected one of H100, "),
    ],
)
def test_wrong_numbers_are_named(make, message):
    with pytest.raises(cb.CacheBlendError) as raised:
        make()
    assert str(raised.value).startswith(message)


def plan_of(config, mode: str, length: int):
    planner = Planner(config, BlendConfig(0.15, selector="hkvd", num_stages=1))
    return planner.plan(mode, length + 64, 0, 0 if mode == "full" else length)


def outline_on(mesh: jax.sharding.Mesh, config) -> cb.Model:
    """The model on a mesh, with shapes in the place of its weights."""
    partition = partition_of(mesh, config)
    params = jax.tree.map(
        lambda leaf, names: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=partition.sharding(*names)),
        abstract_params(config),
        axis_names(config),
    )
    return cb.Model(config, params, kernels="xla", partition=partition)


def mesh_of(devices) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(devices), ("model",), axis_types=(jax.sharding.AxisType.Auto,))


def test_memory_is_what_xla_takes_for_eight_devices():
    """What an engine compiles, over shapes: no weights are made."""
    config = dataclasses.replace(LLAMA3_8B, num_layers=8, windows=(None,) * 8, dtype="float32")
    executors = Executors(outline_on(mesh_of(jax.devices()[:8]), config), "resident", 4)
    for mode, kv_dtype in (("full", None), ("reuse", None), ("blend", None), ("reuse", "int8")):
        plan = plan_of(config, mode, 8128)
        peak = executors._prepare_plan(plan, "resident", kv_dtype).peak_memory_bytes
        planned = program_memory(config, plan, 8, "cpu", kv_dtype)
        assert planned.peak == pytest.approx(peak, rel=0.05), (mode, kv_dtype, planned)


@pytest.mark.aot
def test_memory_is_what_xla_takes_for_a_tpu_of_eight_chips():
    """A v5e of 2 x 4."""
    if find_spec("libtpu") is None:
        pytest.skip("needs libtpu: see docs/kernels.md")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    chips = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    model, plan = outline_on(mesh_of(chips), LLAMA3_8B), plan_of(LLAMA3_8B, "reuse", 8128)
    request, whole = shapes_of(empty_request(plan), model.placement), model.placement
    table = jax.ShapeDtypeStruct((1, plan.cache_length, LLAMA3_8B.head_dim // 2), jnp.float32, sharding=whole)
    cached = abstract_cache(LLAMA3_8B, plan.cache_length, model.cache_placement)

    def blend(params, request, cached, angles):
        return prefill(params, request, cached, PromptSequence(request.length, angles), config=LLAMA3_8B, plan=plan)

    arguments = model.params, request, cached, Angles(table, table)
    chip = AbstractDevice(device_kind=chips[0].device_kind, num_cores=1, platform="tpu")
    automatic = (jax.sharding.AxisType.Auto,)
    abstract = AbstractMesh((len(chips),), ("model",), axis_types=automatic, abstract_device=chip)
    with jax.sharding.use_abstract_mesh(abstract), kernels("xla"), splitting(model.partition):
        results = result_shardings(model.partition, jax.eval_shape(blend, *arguments))
        lowered = jax.jit(blend, out_shardings=results, donate_argnums=2).lower(*arguments)
        compiled = lowered.compile(compiler_options={"xla_disable_hlo_passes": ""})
    planned = program_memory(LLAMA3_8B, plan, 8, "tpu")
    assert planned.peak == pytest.approx(_peak_memory_bytes(compiled), rel=0.05), planned
