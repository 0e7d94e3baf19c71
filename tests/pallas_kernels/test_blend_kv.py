"""`blend_kv`: every backend (the Pallas ones interpreted) against the reference in float64, and misuse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import TOLERANCE, as_float64

from pallas_kernels import QuantisedKV, blend_kv, tuning
from pallas_kernels.blending import api
from pallas_kernels.blending.reference import blend_kv_reference
from pallas_kernels.tuning import BlendBlocks

BACKENDS = ("xla", *api.BACKENDS)
NAMES = ("k_cached", "v_cached", "k_fresh", "v_fresh", "indices", "cos", "sin")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # So that few keys have many borders.
    monkeypatch.setattr(tuning, "BLEND_KV", {"triton": BlendBlocks(keys=16), "tpu": BlendBlocks(keys=128)})


def arguments(num_keys: int, places, head_dim: int, dtype: str, *, padding: int = 0, kv_heads: int = 2, seed: int = 0):
    """Arguments of `blend_kv` by name: fresh rows at `places`, then `padding` ones that are NaN."""
    rng = np.random.default_rng(seed)
    num_fresh = len(places) + padding

    def array(rows: int, valid: int | None = None) -> jax.Array:
        drawn = rng.standard_normal((rows, kv_heads, head_dim))
        drawn[rows if valid is None else valid :] = np.nan
        return jnp.asarray(drawn.astype(jnp.dtype(dtype)))

    fresh = [array(num_fresh, len(places)) for _ in range(2)]
    indices = jnp.asarray([*sorted(places), *range(num_keys, num_keys + padding)], jnp.int32)
    angles = rng.uniform(0, 1000, (num_keys, head_dim // 2))
    tables = [jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)]
    return dict(zip(NAMES, (array(num_keys), array(num_keys), *fresh, indices, *tables), strict=True))


def call_traced(named: dict, **options):
    more = {name: named[name] for name in ("stored", "k_offset") if name in named}
    return blend_kv(*(named[name] for name in NAMES[:5]), cos=named["cos"], sin=named["sin"], **more, **options)


def stack_of(*layers) -> jax.Array:
    """A stack made by `numpy`: JAX would compile each operation for each shape."""
    return jnp.asarray(np.stack([np.asarray(layer) for layer in layers]))


call = jax.jit(call_traced, static_argnames=("implementation", "layer"))


@jax.jit
def reference(named: dict):
    more = {name: named[name] for name in ("stored", "k_offset") if name in named}
    return blend_kv_reference(*(named[name] for name in NAMES[:5]), cos=named["cos"], sin=named["sin"], **more)


def check(named: dict, implementation: str | None, *, in_stack: bool) -> list[np.ndarray]:
    """Checks one layer, alone or in a stack, whose other layers must stay as they are; returns its keys and values."""
    if in_stack:
        layers = [(2 * np.asarray(named[name]), named[name], 3 * np.asarray(named[name])) for name in NAMES[:2]]
        stacks = {name: stack_of(*each) for name, each in zip(NAMES[:2], layers, strict=True)}
        blended = [np.asarray(stack) for stack in call(named | stacks, implementation=implementation, layer=1)]
        for stack, (before, _, after) in zip(blended, layers, strict=True):
            np.testing.assert_array_equal(stack[::2], np.stack([before, after]))
        k, v = (stack[1] for stack in blended)
    else:
        k, v = map(np.asarray, call(named, implementation=implementation))
    with jax.enable_x64(True):
        exact = {name: x if name == "indices" else as_float64(x) for name, x in named.items()}
        wanted_k, wanted_v = map(np.asarray, reference(exact))
    dtype = named["k_cached"].dtype
    tolerance = TOLERANCE[str(dtype)]
    np.testing.assert_array_equal(v.astype(np.float64), wanted_v)
    np.testing.assert_allclose(k.astype(np.float64), wanted_k, atol=tolerance, rtol=tolerance)
    assert k.dtype == v.dtype == dtype
    return [k, v]


@pytest.mark.parametrize("backend", [pytest.param("xla", marks=pytest.mark.once), *api.BACKENDS])
@settings(max_examples=8, deadline=None)
@given(
    sizes=st.sampled_from(((1, 1), (300, 24), (160, 160))),  # few, since each is compiled
    filled=st.sampled_from((0.0, 0.8, 1.0)),
    heads=st.sampled_from(((1, 16), (3, 80))),
    dtype=st.sampled_from(sorted(TOLERANCE)),
    in_stack=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_keys_are_rotated_once_and_rows_replaced(backend, sizes, filled, heads, dtype, in_stack, seed):
    (num_keys, num_fresh), (kv_heads, head_dim) = sizes, heads
    count = round(filled * num_fresh)
    places = np.random.default_rng(seed).choice(num_keys, count, replace=False)
    padding = num_fresh - count
    named = arguments(num_keys, places, head_dim, dtype, padding=padding, kv_heads=kv_heads, seed=seed)
    check(named, backend, in_stack=in_stack)


@pytest.mark.once
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("places", [[0, 127, 128, 255, 256, 299], [128], range(128, 152), [299]])
def test_rows_at_the_borders_of_blocks(backend, places):
    named = arguments(300, places, 16, "float32", padding=24 - len(places))
    alone, in_stack = (check(named, backend, in_stack=in_stack) for in_stack in (False, True))
    for one, other in zip(in_stack, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def quantised(named: dict, codes: str, *, with_offset: bool) -> dict:
    """The same, with stored KV as codes, and in the place of the cached rows what nobody may read."""
    rng = np.random.default_rng(1)
    shape = named["k_cached"].shape
    drawn = [jnp.asarray(rng.integers(-127, 128, shape), codes) for _ in range(2)]
    scales = [jnp.asarray(rng.uniform(0, 0.01, shape[:2]), jnp.bfloat16) for _ in range(2)]
    offset = {"k_offset": jnp.asarray(rng.uniform(-3, 3, shape[1:]), named["k_cached"].dtype)} if with_offset else {}
    unread = {name: jnp.asarray(np.full_like(named[name], np.nan)) for name in NAMES[:2]}
    return named | unread | offset | {"stored": QuantisedKV(*drawn, *scales)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("codes", "dtype", "with_offset"),
    [("int8", "float32", True), ("int8", "bfloat16", False), ("float8_e4m3fn", "float16", True)],
)
def test_quantised_keys_and_values_are_dequantised_as_they_pass(backend, codes, dtype, with_offset):
    named = quantised(arguments(40, [3, 16, 20], 16, dtype, padding=2), codes, with_offset=with_offset)
    if backend != "xla" and codes != "int8":
        with pytest.raises(ValueError, match="takes codes of int8, got float8_e4m3fn"):
            call(named, implementation=backend)
        return
    k, v = call(named, implementation=backend)
    wanted_k, wanted_v = reference(named)
    np.testing.assert_array_equal(np.asarray(v, np.float32), np.asarray(wanted_v, np.float32))
    tolerance = TOLERANCE[dtype]
    close = {"atol": 4 * tolerance, "rtol": tolerance}
    np.testing.assert_allclose(np.asarray(k, np.float32), np.asarray(wanted_k, np.float32), **close)
    ones = {name: stack_of(*[np.ones_like(named[name])] * 3) for name in NAMES[:2]}
    for stack, layer in zip(call(named | ones, implementation=backend, layer=1), (k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(stack)[1], np.asarray(layer))
        assert not np.isnan(np.asarray(layer, np.float32)).any()


@pytest.mark.parametrize("backend", ["xla", "triton"])  # the TPU's interpreter can't: see test_ahead_of_time.py
@pytest.mark.parametrize("layer", [None, 1])
def test_donated_keys_and_values_are_replaced_in_place(backend, layer):
    named = arguments(40, [3, 20], 16, "float32")
    if layer is not None:
        named |= {name: stack_of(*[named[name]] * 3) for name in NAMES[:2]}
    wanted = call(named, layer=layer)
    donated = [jnp.array(named.pop(name)) for name in NAMES[:2]]
    places = {x.unsafe_buffer_pointer() for x in donated}

    def blend(donated, rest):
        named = {"k_cached": donated[0], "v_cached": donated[1], **rest}
        return call_traced(named, implementation=backend, layer=layer)

    blended = jax.jit(blend, donate_argnums=0)(donated, named)
    for one, other in zip(blended, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)
    assert {x.unsafe_buffer_pointer() for x in blended} == places
    assert all(x.is_deleted() for x in donated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_values_stay_as_they_were(backend):
    named = arguments(40, [3, 20], 16, "float32")
    before = {name: np.array(x) for name, x in named.items()}
    call(named, implementation=backend)
    for name, x in named.items():
        np.testing.assert_array_equal(np.asarray(x), before[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_equals_one_by_one(backend):
    members = [arguments(40, places, 16, "float32", seed=seed) for seed, places in enumerate(([1, 5], [0, 39]))]
    stacked = {name: stack_of(*[member[name] for member in members]) for name in NAMES}
    batched = jax.vmap(lambda named: call(named, implementation=backend))(stacked)
    for i, member in enumerate(members):
        alone = call(member, implementation=backend)
        for one, other in zip(batched, alone, strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_cached": jnp.zeros((6, 8))}, r"k_cached must be of rank 3.*\(6, 8\)"),
        ({"k_cached": jnp.zeros((6, 2, 7))}, "k_cached must have an even head_dim"),
        ({"k_cached": jnp.zeros((6, 2, 16), jnp.int32)}, "k_cached must be floating, got int32"),
        ({"v_cached": jnp.zeros((5, 2, 16))}, r"v_cached must have shape \(6, 2, 16\), got \(5, 2, 16\)"),
        ({"k_fresh": jnp.zeros((2, 3, 16))}, r"k_fresh must have shape \(2, 2, 16\), got \(2, 3, 16\)"),
        ({"v_fresh": jnp.zeros((3, 2, 16))}, r"v_fresh must have shape \(2, 2, 16\), got \(3, 2, 16\)"),
        ({"v_fresh": jnp.zeros((2, 2, 16), jnp.bfloat16)}, "v_fresh must have k_cached's dtype float32, got bfloat16"),
        ({"indices": jnp.zeros(3, jnp.int32)}, r"indices must have shape \(2,\), got \(3,\)"),
        ({"indices": jnp.zeros(2)}, r"indices must be integer, got float32\[2\]"),
        ({"cos": jnp.zeros((6, 16))}, r"cos must have shape \(6, 8\), got \(6, 16\)"),
        ({"sin": jnp.zeros((6, 8), jnp.int32)}, "sin must be floating"),
        ({"layer": 0}, r"k_cached must be of rank 4, .* with a layer, got \(6, 2, 16\)"),
        ({"layer": 1, "k_cached": jnp.zeros((1, 6, 2, 16))}, r"layer must be in \[0, 1\), got 1"),
        ({"stored": QuantisedKV(*[jnp.zeros((6, 2, 16), jnp.int8)] * 4)}, r"k_scales must have shape \(6, 2\), got"),
        (
            {"stored": QuantisedKV(*[jnp.zeros((6, 2, 16))] * 2, *[jnp.zeros((6, 2))] * 2)},
            "codes of one dtype and one byte, got float32 and float32",
        ),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
        ({"implementation": "mosaic_gpu"}, "unknown implementation 'mosaic_gpu'"),
        ({"implementation": "tpu", "k_fresh": jnp.zeros((0, 2, 16))}, "needs a key and a fresh row"),
    ],
)
def test_what_does_not_fit_is_named_when_traced(change, message):
    named = arguments(6, [1, 4], 16, "float32") | change
    if "k_fresh" in change and not change["k_fresh"].size:
        named |= {"v_fresh": named["k_fresh"], "indices": jnp.zeros(0, jnp.int32)}
    implementation, layer, stored = (named.pop(name, None) for name in ("implementation", "layer", "stored"))
    unchecked = getattr(blend_kv, "__wrapped__", blend_kv)  # without jaxtyping's own check

    def blend(named):
        options = {"layer": layer, "implementation": implementation, "stored": stored}
        return unchecked(*(named[n] for n in NAMES[:5]), cos=named["cos"], sin=named["sin"], **options)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(blend, named)


@pytest.mark.parametrize(
    ("head_dim", "backend", "message"),
    [(24, "tpu", "a multiple of 16, got 24"), (512, "tpu", "at most 256"), (512, "triton", "at most 256")],
)
def test_a_backend_that_cannot_serve_says_why(head_dim, backend, message):
    with pytest.raises(ValueError, match=message):
        call(arguments(6, [1, 4], head_dim, "float32"), implementation=backend)


def test_no_keys_and_no_fresh_rows_are_legal():
    none, rows, angles = jnp.ones((0, 2, 4)), jnp.ones((3, 2, 4)), jnp.ones((0, 2))
    k, v = blend_kv(none, none, rows, rows, jnp.arange(3), cos=angles, sin=angles)
    assert (k.shape, v.shape) == (none.shape, none.shape)
    k, v = blend_kv(rows, rows, none, none, jnp.arange(0), cos=jnp.ones((3, 2)), sin=jnp.zeros((3, 2)))
    np.testing.assert_array_equal(k, rows)
