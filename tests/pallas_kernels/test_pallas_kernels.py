"""What the public functions promise beyond equality with their references, and at which positions a blend attends."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, family_model
from hypothesis import given, settings
from jax.experimental import checkify
from kernel_cases import TOLERANCE, as_float64, attend, attend_by_reference, cases

from cacheblend_jax.blend.layer_step import PromptSequence
from cacheblend_jax.blend.resident import prefill
from cacheblend_jax.blend.schedule import BlendConfig, make_plan
from cacheblend_jax.evaluation.whole_prefills import request_of
from cacheblend_jax.model import KVCache, kv_cache
from cacheblend_jax.model.rope import rope_tables
from pallas_kernels import apply_rope, attention_mass, selective_attention


def test_keys_after_the_last_visible_one_are_not_computed():
    # NaN in every key block past the last that the queries need: it is skipped, not masked.
    keys, q = jnp.zeros((4096, 1, 8)), jnp.ones((2, 1, 8))
    poisoned = keys.at[2048:].set(jnp.nan)
    positions = jnp.asarray([300, 301], jnp.int32)
    assert np.isfinite(np.asarray(selective_attention(q, poisoned, poisoned, positions))).all()
    assert np.isnan(np.asarray(selective_attention(q, poisoned, poisoned, positions + 2000))).any()


def test_one_query_that_sees_nan_returns_nan_and_one_that_does_not_is_finite():
    keys, q = jnp.zeros((64, 1, 8)), jnp.ones((1, 1, 8))
    poisoned = keys.at[32:].set(jnp.nan)
    assert np.isfinite(np.asarray(selective_attention(q, poisoned, poisoned, jnp.asarray([31], jnp.int32)))).all()
    assert np.isnan(np.asarray(selective_attention(q, poisoned, poisoned, jnp.asarray([32], jnp.int32)))).all()


def test_a_row_that_sees_nothing_is_zeros_whatever_the_others_see():
    q, keys, positions = jnp.ones((2, 1, 8)), jnp.zeros((3, 1, 8)), jnp.asarray([2, 3], jnp.int32)
    out = selective_attention(q, keys, keys.at[2].set(jnp.inf), positions, kv_length=jnp.int32(3))
    assert np.isinf(np.asarray(out[0])).all()
    np.testing.assert_array_equal(out[1], jnp.zeros((1, 8)))


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_attend_to_gives_zeros(queries, keys):
    q, kv = jnp.ones((queries, 4, 8)), jnp.ones((keys, 2, 8))
    positions = jnp.arange(queries)
    out, lse = selective_attention(q, kv, kv, positions, return_lse=True)
    np.testing.assert_array_equal(out, np.zeros(q.shape))
    np.testing.assert_array_equal(lse, np.full((queries, 4), -np.inf))
    np.testing.assert_array_equal(attention_mass(q, kv, lse, positions), np.zeros(keys))


def test_padding_queries_give_zeros():
    q, k = jnp.ones((3, 2, 8)), jnp.ones((16, 1, 8))
    out, lse = selective_attention(q, k, k, jnp.asarray([3, 12, 16], jnp.int32), kv_length=10, return_lse=True)
    assert (np.asarray(out[0]) == 1).all()
    assert (np.asarray(out[1:]) == 0).all()
    assert np.isneginf(np.asarray(lse[1:])).all()


@pytest.mark.parametrize("kv_length", [None, 40])
def test_attention_works_under_vmap_and_with_a_traced_length(kv_length):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, tokens, 2, 8)), jnp.float32) for tokens in (5, 50, 50))
    positions = jnp.asarray(np.sort(rng.integers(0, 50, (3, 5)), axis=1), jnp.int32)

    def one(q, k, v, positions, length):
        return selective_attention(q, k, v, positions, kv_length=length)

    lengths = jnp.full(3, 50 if kv_length is None else kv_length, jnp.int32)
    batched = jax.jit(jax.vmap(one))(q, k, v, positions, lengths)
    for i in range(3):
        alone = attend(q[i], k[i], v[i], positions[i], kv_length=kv_length)
        np.testing.assert_allclose(batched[i], alone, atol=1e-6)


mass_of = jax.jit(attention_mass, static_argnames=("window", "soft_cap"))


@pytest.mark.once
@settings(max_examples=20, deadline=None)
@given(cases(lengths=(1, 90), head_dims=(8, 80), borders=(32,)))  # its tiles have 8 queries, and all keys
def test_attention_mass_is_the_column_sum_of_the_weights(case):
    case = replace(case, soft_cap=1.5, sinks=np.linspace(-1, 2, case.q.shape[1]).astype(np.float32))
    _, lse = attend(case.q, case.k, case.v, case.positions, return_lse=True, **case.masks, **case.scores)
    mass = mass_of(case.q, case.k, lse, case.positions, soft_cap=case.soft_cap, **case.masks)
    num_keys, kv_heads, head_dim = case.k.shape
    # With one-hot values the output of attention is its weights; values and keys have one width.
    width = max(num_keys, head_dim)
    values = np.broadcast_to(np.eye(num_keys, width)[:, None, :], (num_keys, kv_heads, width))
    with jax.enable_x64(True):
        q, k = (np.pad(as_float64(x), ((0, 0), (0, 0), (0, width - head_dim))) for x in (case.q, case.k))
        weights, _ = attend_by_reference(
            q, k, values, case.positions, scale=head_dim**-0.5, **case.masks, **case.scores
        )
        wanted = np.asarray(weights).sum(axis=(0, 1))[:num_keys]
    tolerance = TOLERANCE[str(case.q.dtype)] * 10
    np.testing.assert_allclose(np.asarray(mass), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((2, 3, 8))}, "multiple of k's 2 kv_heads"),
        ({"k": jnp.zeros((5, 2, 8))}, "v must be of k's shape"),
        ({"q": jnp.zeros((2, 4, 16))}, "head_dim 8"),
        ({"q": jnp.zeros((2, 4, 8), jnp.bfloat16)}, "one dtype"),
        ({"q_positions": jnp.zeros(3, jnp.int32)}, "integers of shape"),
        ({"q_positions": jnp.zeros(2)}, "integers of shape"),
        ({"kv_length": 7}, r"in \[0, 6\]"),
        ({"window": 0}, "at least 1"),
        ({"soft_cap": 0.0}, "soft_cap must be a positive number, got 0.0"),
        ({"sinks": jnp.zeros(2)}, r"sinks must be floats of shape \[4\], got float32\[2\]"),
        ({"sinks": jnp.zeros(4, jnp.int32)}, r"sinks must be floats of shape \[4\], got int32\[4\]"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
        ({"implementation": "mosaic_gpu"}, "mosaic_gpu computes in bfloat16 or float16"),
        ({"implementation": "tpu", "q": jnp.zeros((0, 4, 8)), "q_positions": jnp.zeros(0, jnp.int32)}, "needs a query"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"q": jnp.zeros((2, 4, 8)), "k": jnp.zeros((6, 2, 8)), "v": jnp.zeros((6, 2, 8))}
    arguments |= {"q_positions": jnp.zeros(2, jnp.int32)} | change
    q, k, v, positions = (arguments.pop(name) for name in ("q", "k", "v", "q_positions"))
    unchecked = getattr(selective_attention, "__wrapped__", selective_attention)  # without jaxtyping's own check
    with pytest.raises(ValueError, match=message):
        unchecked(q, k, v, positions, **arguments)


def test_rotated_keys_and_queries_see_only_their_distance():
    rng = np.random.default_rng(3)
    x, y = (jnp.asarray(rng.standard_normal((1, 1, 16)), jnp.float32) for _ in range(2))
    frequency = 10000.0 ** -(np.arange(8) / 8)

    def product(i: int, j: int) -> float:
        angles = [jnp.asarray(p * frequency, jnp.float32)[None] for p in (i, j)]
        turned = [apply_rope(z, jnp.cos(a), jnp.sin(a)) for z, a in zip((x, y), angles, strict=True)]
        return float((turned[0] * turned[1]).sum())

    assert product(7, 3) == pytest.approx(product(107, 103), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 5), abs=1e-2)


def ascending(attend):
    """Attention that also checks, when it runs under `checkify`, what tracing can't show."""

    def checked(q, k, v, q_positions, **options):
        checkify.check((jnp.diff(q_positions) >= 0).all(), "q_positions descend")
        return attend(q, k, v, q_positions, **options)

    return checked


def test_descending_positions_are_found_by_checkify():
    q, k = jnp.ones((3, 2, 8)), jnp.ones((9, 2, 8))
    attend = checkify.checkify(jax.jit(ascending(selective_attention)))
    assert attend(q, k, k, jnp.asarray([2, 2, 7]))[0].get() is None
    assert "q_positions descend" in attend(q, k, k, jnp.asarray([2, 7, 6]))[0].get()


@pytest.mark.once
@pytest.mark.parametrize("selector", ["hkvd", "cross"])  # without and with attention before the check layer
def test_a_blend_attends_at_ascending_positions_only(monkeypatch, selector):
    monkeypatch.setattr(kv_cache, "selective_attention", ascending(selective_attention))
    config, length = FAMILIES["llama2"], 200
    blend = BlendConfig(0.3, selector=selector)
    plan = make_plan(num_layers=6, length=length, active=length, forced=64, blend=blend, check_layer=1)
    cached = jax.random.normal(jax.random.key(0), (2, 6, plan.cache_length, config.num_kv_heads, config.head_dim))
    tables = rope_tables(config, plan.cache_length)
    request = request_of(plan, length, config.vocab_size, 0.3)
    arguments = request, KVCache(*cached), PromptSequence(request.length, tables)
    run = jax.jit(checkify.checkify(partial(prefill, family_model("llama2").params, config=config, plan=plan)))
    error, out = run(*arguments)
    error.throw()
    assert np.isfinite(out.logits).all()


def test_gradients_are_those_of_dense_attention_and_zero_where_nothing_is_seen():
    """With a cap, and with sinks as what they stand for: one more key, whose value is zero."""
    rng = np.random.default_rng(12)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, heads, 8)), jnp.float32) for rows, heads in ((5, 4), (9, 2), (9, 2)))
    positions, weights = jnp.asarray([0, 2, 3, 8, 9], jnp.int32), jnp.asarray(rng.normal(size=(5, 4, 8)), jnp.float32)
    sinks = jnp.asarray([-1.0, 0.0, 1.0, 2.0])

    def by_us(q, k, v, sinks):
        options = {"kv_length": 9, "window": 3, "return_lse": True, "soft_cap": 1.5, "sinks": sinks}
        out, lse = selective_attention(q, k, v, positions, **options)
        return (out * weights).sum() + lse[:4].sum(), (out, lse)  # the last is padding

    def densely(q, k, v, sinks):
        k, v = jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1)
        column, row = jnp.arange(9)[None], positions[:4, None]
        seen = (column <= row) & (column > row - 3)
        scores = jnp.where(seen, 1.5 * jnp.tanh(jnp.einsum("qhd,khd->hqk", q[:4], k) * 8**-0.5 / 1.5), -1e9)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (4, 4, 1))], axis=-1)
        out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores)[..., :-1], v)
        lse = jax.nn.logsumexp(scores, axis=-1)
        return (out * weights[:4]).sum() + lse.sum(), (out, lse.T)

    both = (jax.jit(jax.grad(each, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks) for each in (by_us, densely))
    (gradients, results), (wanted_gradients, wanted) = both
    np.testing.assert_allclose(results[0], np.concatenate([wanted[0], np.zeros((1, 4, 8))]), atol=1e-5)
    np.testing.assert_allclose(results[1][:4], wanted[1], atol=1e-5)
    for got, expected in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_parts_of_the_keys_are_merged_before_sinks_join():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((n, 2, 8)), jnp.float32) for n in (5, 40, 40))
    positions, sinks = jnp.arange(35, 40), jnp.asarray([0.0, 1.0])
    attend = jax.jit(partial(selective_attention, return_lse=True))
    parts = [attend(q, k, v, jnp.minimum(positions, 29)), attend(q, k, v, positions, q_starts=jnp.full(5, 30))]
    lse = jnp.logaddexp(jnp.logaddexp(parts[0][1], parts[1][1]), sinks[None])
    merged = sum(out * jnp.exp(each - lse)[..., None] for out, each in parts)
    for one, other in zip(attend(q, k, v, positions, sinks=sinks), (merged, lse), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
