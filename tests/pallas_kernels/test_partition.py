"""Operations whose heads are split over a mesh: each device's kernel sees its own, and results are the whole's."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_cases import mesh_of

from pallas_kernels import QuantisedKV, attention_mass, blend_kv, selective_attention
from pallas_kernels.partition import Partition, by_shares, constrained, rows_called, splitting

KEYS, ROWS, DIM = 48, 16, 16
AXES = ("heads", "model"), ("kv_heads", "model")


def split(kv_heads: int) -> Partition:
    return Partition(mesh_of("2x4"), tuple((name, (axis,)) for name, axis in AXES if kv_heads > 1 or name == "heads"))


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("implementation", "kv_heads"), [("pallas", 4), ("xla", 1)])
def test_attention_by_shares_of_heads(implementation, kv_heads):
    q, k, v = drawn(ROWS, 8, DIM), drawn(2, KEYS, kv_heads, DIM), drawn(2, KEYS, kv_heads, DIM) + 1
    positions = jnp.arange(0, KEYS, 3, dtype=jnp.int32)
    options = {"q_starts": positions // 2, "sinks": drawn(8), "kv_length": jnp.int32(KEYS - 2)}
    alone = jax.jit(partial(selective_attention, layer=1, implementation="xla", return_lse=True))
    wanted = alone(q, k, v, positions, **options)

    def attend(q, k, v):
        at = {"layer": jnp.int32(1), "implementation": implementation, "return_lse": True}
        attended = selective_attention(q, k, v, positions, **at, **options)
        return *attended, attention_mass(q, k[1], attended[1], positions, kv_length=KEYS - 2)

    with splitting(split(kv_heads)):
        text = (compiled := jax.jit(attend).lower(q, k, v).compile()).as_text()
    out, lse, mass = compiled(q, k, v)
    np.testing.assert_allclose(out, wanted[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(lse, wanted[1], rtol=2e-5, atol=2e-5)
    whole = jax.jit(partial(attention_mass, kv_length=KEYS - 2))(q, k[1], wanted[1], positions)
    np.testing.assert_allclose(mass, whole, rtol=2e-5, atol=2e-5)
    assert f"f32[2,{KEYS},{kv_heads}" not in "".join(line for line in text.splitlines() if "all-gather(" in line)


def test_blending_of_quantised_keys_by_shares_of_heads():
    k, v, fresh = drawn(KEYS, 4, DIM), drawn(KEYS, 4, DIM) + 1, drawn(ROWS, 4, DIM)
    indices = jnp.arange(0, KEYS, 3, dtype=jnp.int32)
    angles = drawn(KEYS, DIM // 2)
    codes = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (KEYS, 4, DIM)), jnp.int8)
    scales = jnp.abs(drawn(KEYS, 4)).astype(jnp.bfloat16)
    stored, offset = QuantisedKV(codes, codes, scales, scales), drawn(4, DIM)
    blend = partial(blend_kv, cos=jnp.cos(angles), sin=jnp.sin(angles), implementation="pallas")
    wanted = blend(k, v, fresh, fresh, indices, stored=stored, k_offset=offset)
    with splitting(split(4)):
        run = jax.jit(lambda *arrays: blend(*arrays[:5], stored=arrays[5], k_offset=arrays[6]))
        found = run(k, v, fresh, fresh, indices, stored, offset)
    for x, one in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(x, one)
        assert x.sharding.shard_shape(x.shape) == (KEYS, 1, DIM)


def test_without_a_partition_nothing_is_added_to_a_program():
    def function(x):
        with rows_called("slots"):
            return by_shares(lambda x: x + 1, [("rows",)], ("rows",))(constrained(x, "rows", "heads"))

    assert str(jax.make_jaxpr(function)(jnp.zeros(3))) == str(jax.make_jaxpr(lambda x: x + 1)(jnp.zeros(3)))
