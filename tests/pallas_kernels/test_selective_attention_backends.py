"""Every backend of `selective_attention`, the Pallas ones interpreted, against the reference in float64."""

from __future__ import annotations

import faulthandler
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import Case, as_float64, attend, attend_by_reference, cases

from pallas_kernels import selective_attention, tuning
from pallas_kernels.attention import mosaic_gpu, tiles, triton
from pallas_kernels.attention.api import BACKENDS
from pallas_kernels.attention.tiles import Grid, make_grid
from pallas_kernels.attention.xla import BlockSizes, block_sizes
from pallas_kernels.tuning import AttentionBlocks

INTERPRETS_MOSAIC_GPU = hasattr(plgpu, "InterpretGPUParams")
needs_mosaic_interpreter = pytest.mark.skipif(
    not INTERPRETS_MOSAIC_GPU, reason="the Mosaic GPU interpreter needs jax 0.11 (Python 3.12 or later)"
)
# Small blocks, so that few keys have many borders.
BLOCKS = {
    "tpu": AttentionBlocks(rows=128, keys=128),
    "triton": AttentionBlocks(rows=32, keys=64),
    "mosaic_gpu": AttentionBlocks(rows=128, keys=64, stages=2),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    table = {(name, ""): [(size, 256, blocks) for size in (2, 4)] for name, blocks in BLOCKS.items()}
    monkeypatch.setattr(tuning, "SELECTIVE_ATTENTION", table)
    # A small device, so that few queries share out their keys over several blocks, and many do not.
    monkeypatch.setattr(tiles, "KEYS_OF_A_SPLIT", 64)
    monkeypatch.setattr(mosaic_gpu, "CONCURRENT", 4)
    monkeypatch.setattr(triton, "CONCURRENT", 4)


@pytest.fixture
def callbacks_run_at_once():
    # Warpgroups wait for each other in callbacks: dispatched to a pool of as many threads as cores, they may starve.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    faulthandler.dump_traceback_later(300, exit=True)  # a deadlock ends the process, not the patience
    yield
    faulthandler.cancel_dump_traceback_later()
    jax.config.update("jax_cpu_enable_async_dispatch", True)


EACH_PALLAS_BACKEND = [
    "tpu",
    "triton",
    pytest.param("mosaic_gpu", marks=[needs_mosaic_interpreter, pytest.mark.mosaic]),
]
# By backend: the cases that it is checked with, and how many of them. XLA's blocks are fixed: 40 keys are attended at
# once, 720 have several blocks in one tile and in two, also unmasked ones of twice the size.
CASES = {
    "xla": (cases(lengths=(1, 40, 720), head_dims=(8, 80), borders=(360, 512)), 40),
    "tpu": (cases(lengths=(1, 300), head_dims=(32, 80), borders=(128,)), 8),
    "triton": (cases(lengths=(1, 300), head_dims=(32, 80), borders=(64,)), 10),
    "mosaic_gpu": (
        cases(lengths=(1, 300), head_dims=(32, 80), borders=(64,), dtypes=("bfloat16", "float16")),
        25,
    ),
}


@pytest.mark.usefixtures("callbacks_run_at_once")
@pytest.mark.parametrize("backend", [pytest.param("xla", marks=pytest.mark.once), *EACH_PALLAS_BACKEND])
def test_attention_equals_its_reference(backend):
    strategy, max_examples = CASES[backend]

    @settings(max_examples=max_examples, deadline=None)
    @given(strategy, st.booleans())
    def check(case, poisoned):
        case.check(backend, poisoned=poisoned)
        assert backend != "mosaic_gpu" or not _races_found()

    check()


@pytest.mark.usefixtures("callbacks_run_at_once")
@pytest.mark.parametrize("backend", ["xla", *EACH_PALLAS_BACKEND])
def test_poisoned_padding_never_reaches_a_result(backend):
    # NaN from inside the block that holds the last valid key: read, masked, and multiplied by a weight of zero.
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((tokens, 1, 32)).astype(jnp.bfloat16) for tokens in (24, 300, 300))
    positions, length = np.arange(130, 154, dtype=np.int32), np.int32(150)
    options = {"kv_length": length, "return_lse": True, "implementation": backend}
    clean = attend(q, k, v, positions, **options)
    k[length:] = v[length:] = np.nan
    for one, other in zip(clean, attend(q, k, v, positions, **options), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.usefixtures("callbacks_run_at_once")
@pytest.mark.parametrize("backend", ["xla", *EACH_PALLAS_BACKEND])
@pytest.mark.parametrize(("num_keys", "head_dim"), [(256, 32), (100, 80)])  # read in place, and padded first
def test_a_layer_of_a_stack_is_that_layer_alone(backend, num_keys, head_dim):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 2, head_dim)).astype(jnp.bfloat16) for n in (24, num_keys, num_keys))
    positions = np.sort(rng.choice(num_keys, 24)).astype(np.int32)
    options = {"kv_length": np.int32(num_keys - 3), "return_lse": True, "implementation": backend}
    alone = attend(q, k, v, positions, **options)
    stacks = (np.stack([np.full_like(x, np.nan), x, np.full_like(x, np.nan)]) for x in (k, v))
    for one, other in zip(attend(q, *stacks, positions, layer=np.int32(1), **options), alone, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_keys_are_shared_out_where_tiles_leave_the_device_idle(monkeypatch):
    monkeypatch.undo()  # large blocks
    grid = partial(make_grid, num_kv_heads=8, concurrent=132)
    assert grid(1, num_keys=8192) == Grid(1, 16, 8)  # one query: 128 blocks instead of 8
    assert grid(7, num_keys=8192) == Grid(7, 2, 8)
    assert grid(39, num_keys=8192) == Grid(39, 1, 8)
    assert grid(1, num_keys=1500) == Grid(1, 2, 8)
    assert grid(1, num_keys=100) == Grid(1, 1, 8)


def test_a_grid_has_each_tile_split_and_head_once_and_long_tiles_first():
    grid = Grid(num_tiles=3, num_splits=2, num_kv_heads=4)
    places = [tuple(map(int, grid.place(jnp.int32(block)))) for block in range(grid.size)]
    assert len(set(places)) == 24
    assert [tile for tile, *_ in places] == [2] * 8 + [1] * 8 + [0] * 8


def test_every_backend_is_compared_with_the_reference():
    assert CASES.keys() == {"xla", *BACKENDS}


def test_the_cases_of_xla_cross_its_blocks():
    assert block_sizes(160, 257) == (160, BlockSizes(inner=160, edge=160))
    assert block_sizes(720, 720) == (360, BlockSizes(inner=720, edge=360))
    assert block_sizes(24, 720) == (24, BlockSizes(inner=512, edge=512))


@pytest.mark.once
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_query_is_no_loop_over_keys_and_equals_the_reference(dtype, group):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, heads, 32)).astype(dtype) for n, heads in ((1, 2 * group), (90, 2), (90, 2)))
    for position, start, length, window in (
        (70, None, 75, None),
        (0, None, 90, None),
        (89, 60, 90, 20),
        (75, None, 75, None),  # padding
        (50, 51, 90, None),  # sees no key
    ):
        starts = None if start is None else np.asarray([start], np.int32)
        case = Case(q, k, v, np.asarray([position], np.int32), starts, length, window)
        case.check("xla", poisoned=length < 90)
    text = jax.jit(partial(selective_attention, implementation="xla")).lower(q, k, v, np.asarray([5])).as_text()
    assert "while" not in text


def _races_found() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    races = gpu_callbacks._races
    return races is not None and races.races_found


@pytest.mark.usefixtures("callbacks_run_at_once")
@pytest.mark.parametrize("backend", ["xla", *EACH_PALLAS_BACKEND])
def test_the_scale_may_be_any_number(backend):
    # The others multiply scores by it, where any number is as good as another.
    for scale in (-0.4, 0.0, 1e-40, 9.0) if backend == "mosaic_gpu" else (-0.4,):
        _check_scale(backend, scale)


def _check_scale(backend, scale):
    # Each row starts later than the one before: most see nothing of the tile's first block.
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((tokens, 1, 32)), jnp.bfloat16) for tokens in (24, 300, 300))
    positions = jnp.arange(250, 274)
    masks = {"q_starts": jnp.linspace(0, 260, 24).astype(jnp.int32)}
    function = partial(selective_attention, scale=scale, return_lse=True, implementation=backend)
    out, lse = (function if backend == "mosaic_gpu" else jax.jit(function))(q, k, v, positions, **masks)
    with jax.enable_x64(True):
        wanted, wanted_lse = attend_by_reference(*map(as_float64, (q, k, v)), positions, scale=scale, **masks)
    np.testing.assert_allclose(np.asarray(out, np.float64), np.asarray(wanted), atol=0.08, rtol=0.02)
    np.testing.assert_allclose(np.asarray(lse), np.asarray(wanted_lse), atol=0.02, rtol=1e-3)


@pytest.mark.usefixtures("callbacks_run_at_once")
@pytest.mark.parametrize("queries", [1, 24])  # one: decoding's, whose keys are shared out over several blocks
@pytest.mark.parametrize("backend", ["xla", *EACH_PALLAS_BACKEND])
def test_scores_are_capped_and_sinks_are_in_the_denominator(backend, queries):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((n, heads, 32)).astype("bfloat16") for n, heads in ((queries, 6), (300, 2), (300, 2))
    )
    positions = np.linspace(280, 301, queries).astype(np.int32)  # the last is padding, where there are several
    starts = np.linspace(5, 282, queries).astype(np.int32)  # the second sees nothing of its tile's first block
    sinks = np.asarray([-np.inf, -20, 0, 1, 6, 30], np.float32)  # from none to all of the denominator
    # Scores of up to 15, far beyond the cap.
    case = Case(q * 4, k, v, positions, starts, 299, None, 2.5, sinks)
    case.check(backend, poisoned=True)
    assert backend != "mosaic_gpu" or not _races_found()


POSITIONS = jnp.asarray([300], jnp.int32)


@pytest.mark.usefixtures("callbacks_run_at_once")
@pytest.mark.parametrize("backend", EACH_PALLAS_BACKEND)
def test_keys_outside_of_the_visible_blocks_are_not_computed(backend):
    # NaN before the window's first block and after the last visible one: skipped, not masked. The control sees it.
    q = jnp.ones((1, 1, 32), jnp.bfloat16)
    keys = jnp.zeros((640, 1, 32), jnp.bfloat16)
    poisoned = keys.at[:256].set(jnp.nan).at[384:].set(jnp.nan)

    def attended(positions):
        out = attend(q, poisoned, poisoned, positions, window=20, implementation=backend)
        return np.asarray(out, np.float32)

    assert np.isfinite(attended(POSITIONS)).all()
    assert np.isnan(attended(POSITIONS + 140)).any()


@pytest.mark.usefixtures("callbacks_run_at_once")
@pytest.mark.parametrize("backend", EACH_PALLAS_BACKEND)
def test_a_batch_equals_one_by_one(backend):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, tokens, 2, 32)), jnp.bfloat16) for tokens in (5, 50, 50))
    positions = jnp.asarray(np.sort(rng.integers(0, 50, (3, 5)), axis=1), jnp.int32)
    lengths = jnp.asarray([50, 20, 33], jnp.int32)

    def one(q, k, v, positions, length):
        return selective_attention(q, k, v, positions, kv_length=length, implementation=backend)

    jit = jax.jit if backend != "mosaic_gpu" else lambda function: function  # see `attend`
    batched, alone = jit(jax.vmap(one))(q, k, v, positions, lengths), jit(one)
    for i in range(3):
        np.testing.assert_array_equal(batched[i], alone(q[i], k[i], v[i], positions[i], lengths[i]))


@pytest.mark.parametrize(
    ("version", "refused"),
    [("12.6.85", False), ("12.8.61", True), ("12.9.41", True), ("12.9.86", False), (None, False)],
)
def test_compilers_that_miscompile_masks_are_refused(version, refused, monkeypatch):
    def version_of(package):
        if version is None:
            raise mosaic_gpu.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(mosaic_gpu.metadata, "version", version_of)
    q = jnp.zeros((1, 1, 64), jnp.bfloat16)
    reason = mosaic_gpu.unsupported_reason(q, q, interpret=False)
    assert (reason is not None and f"{version} miscompiles masks" in reason) == refused
