"""KV blending in place, alone and in whole prefills, compiled for an H200 and a TPU v5e without either."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import compiler
from test_ahead_of_time import NO_SPILL, _outside_fusions, blend_by_cublas

from pallas_kernels import QuantisedKV, blend_kv, selective_attention
from scripts.count_kernels import count_bytes, count_kernels

pytestmark = pytest.mark.aot
LAYERS, KEYS, ROWS = 4, 8192, 1293


def _arguments(backend: str, head_dim: int, dtype, kv_heads: int, *, stacked: bool):
    shape = jax.ShapeDtypeStruct
    cached = shape((*((LAYERS,) if stacked else ()), KEYS, kv_heads, head_dim), dtype)
    fresh, angles = shape((ROWS, kv_heads, head_dim), dtype), shape((KEYS, head_dim // 2), jnp.float32)

    def blend(k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin, layer, stored=None, k_offset=None):
        options = {"cos": cos, "sin": sin, "layer": layer if stacked else None, "implementation": backend}
        options |= {"stored": stored, "k_offset": k_offset}
        return blend_kv(k_cached, v_cached, k_fresh, v_fresh, indices, **options)

    layer = shape((), jnp.int32)
    return blend, cached, cached, fresh, fresh, shape((ROWS,), jnp.int32), angles, angles, layer


@pytest.mark.parametrize(
    ("backend", "head_dim", "dtype", "kv_heads", "stacked"),
    [
        ("triton", 128, "bfloat16", 8, True),
        ("triton", 80, "bfloat16", 2, False),
        ("triton", 256, "float32", 8, True),
        ("tpu", 128, "bfloat16", 8, True),
        ("tpu", 256, "float32", 8, False),
    ],
)
def test_blending_in_place_copies_nothing(backend, head_dim, dtype, kv_heads, stacked):
    platform = "gpu" if backend == "triton" else "tpu"
    arguments = _arguments(backend, head_dim, jnp.dtype(dtype), kv_heads, stacked=stacked)
    compiled = compiler(platform)(*arguments, donate=(0, 1), options=NO_SPILL if platform == "gpu" else None)
    text = compiled.as_text()
    assert f"blend_kv_{backend}" in text
    assert not re.search(rf"\[(\d,)?{KEYS},{kv_heads},{head_dim}\]\S* copy\(", text)
    memory = compiled.memory_analysis()
    cached, fresh = (x.size * x.dtype.itemsize for x in (arguments[1], arguments[3]))
    assert memory.alias_size_in_bytes >= 2 * cached
    # On a GPU, the fresh keys and values are put into one array.
    assert memory.temp_size_in_bytes < 2.2 * fresh


@pytest.mark.parametrize(
    ("backend", "codes", "dtype", "head_dim"),
    [
        ("triton", "int8", "bfloat16", 128),
        ("xla", "float8_e4m3fn", "bfloat16", 64),
        ("tpu", "int8", "bfloat16", 128),
        ("xla", "int8", "bfloat16", 128),
    ],
)
def test_quantised_kv_is_dequantised_without_a_copy_of_its_values(backend, codes, dtype, head_dim):
    platform = "tpu" if backend == "tpu" else "gpu"
    blend, *shapes = _arguments(backend, head_dim, jnp.dtype(dtype), 8, stacked=True)
    shape = jax.ShapeDtypeStruct
    stored = (shape((KEYS, 8, head_dim), codes),) * 2 + (shape((KEYS, 8), jnp.bfloat16),) * 2
    arguments = *shapes, QuantisedKV(*stored), shape((8, head_dim), dtype)
    options = NO_SPILL if backend == "triton" else None
    compiled = compiler(platform)(blend, *arguments, donate=(0, 1), options=options)
    memory, layer = compiled.memory_analysis(), KEYS * 8 * head_dim * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes >= 2 * LAYERS * layer
    fresh = ROWS * 8 * head_dim * jnp.dtype(dtype).itemsize
    # XLA has one layer's blended keys and values before it puts them into the stack.
    assert memory.temp_size_in_bytes < (2.2 * layer if backend == "xla" else 2.2 * fresh)


def test_a_stack_is_blended_in_place_by_xla():
    arguments = _arguments("xla", 128, jnp.bfloat16, 8, stacked=True)
    compiled = compiler("gpu")(*arguments, donate=(0, 1))
    assert not re.search(rf"\[{LAYERS},{KEYS},8,128\]\S* copy\(", compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * arguments[1].size * 2
    assert memory.temp_size_in_bytes <= 2.2 * arguments[1].size * 2 / LAYERS


def test_blending_heads_that_fill_no_lanes_compiles_for_tpu():
    # XLA lays such arrays out with the keys as lanes, and turns them round for the kernel: it copies.
    arguments = _arguments("tpu", 80, jnp.bfloat16, 2, stacked=False)
    assert "blend_kv_tpu" in compiler("tpu")(*arguments).as_text()


def test_a_copy_of_what_is_not_donated_is_seen():
    arguments = _arguments("triton", 128, jnp.bfloat16, 8, stacked=False)
    assert re.search(rf"\[(1,)?{KEYS},8,128\]\S* copy\(", compiler("gpu")(*arguments).as_text())


@pytest.mark.parametrize("attention", ["mosaic_gpu", "triton"])
def test_layers_of_a_stack_are_blended_and_attended_to_where_they_lie(attention):
    blend, *shapes = _arguments("triton", 128, jnp.bfloat16, 8, stacked=True)

    def layers(q, k, v, k_fresh, v_fresh, indices, cos, sin, layer):
        for at in (layer, layer + 1):
            k, v = blend(k, v, k_fresh, v_fresh, indices, cos, sin, at)
            q = selective_attention(q, k, v, indices, layer=at, implementation=attention)
        return q, k, v

    compiled = compiler("gpu")(layers, jax.ShapeDtypeStruct((ROWS, 32, 128), jnp.bfloat16), *shapes, donate=(1, 2))
    assert _made_of_kv(compiled.as_text(), LAYERS) == []
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * shapes[0].size * 2


def _made_of_kv(text: str, layers: int) -> list[str]:
    """Operations, other than blending in place, whose result is as large as a layer's keys, or all layers'."""
    made = re.compile(rf"= \(?bf16\[({layers},|1,)?{KEYS},8,128\]")
    given = re.compile(r"\b(parameter|get-tuple-element|bitcast|tuple)\(|blend_kv_triton")
    return [line for line in _outside_fusions(text) if made.search(line) and not given.search(line)]


def test_a_blend_for_an_h200_turns_stored_kv_into_blended_kv_in_place_in_few_kernels():
    counts, moved = [], []
    for layers in (6, 8):  # one more in either stage
        compiled = blend_by_cublas(layers)
        assert _made_of_kv(compiled.as_text(), layers) == []
        cache = 2 * layers * KEYS * 8 * 128 * 2
        assert compiled.memory_analysis().alias_size_in_bytes >= cache
        counts.append(count_kernels(compiled.as_text()).total())
        moved.append(count_bytes(compiled.as_text()))
    assert counts[1] - counts[0] <= 2 * 13
    moved[1].subtract(moved[0])
    rows = 1472 + 1120
    assert moved[1]["activations and sums"] == rows * 3 * 14336 * 2  # gate, up and their product
    assert moved[1]["blending"] == pytest.approx(2 * 46e6, rel=0.03)
    assert moved[1].total() < rows * 200e3
