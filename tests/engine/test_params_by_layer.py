"""Weights stacked and weights by layer are one model: the same results, as many programs, one fingerprint."""

from __future__ import annotations

import gc
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import FAMILIES, HF, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.evaluation.attention import attention_deviation_by_layer
from cacheblend_jax.model import projection
from cacheblend_jax.model.kv_cache import cache_shape
from cacheblend_jax.model.params import Params, is_by_layer
from cacheblend_jax.model.quantised_kv import key_biases
from cacheblend_jax.model.tensor_names import hugging_face_tensors
from cacheblend_jax.model.transformer import abstract_params, embedder, joined_by_layer, layer_at
from cacheblend_jax.model.weights import load_params, open_checkpoint
from pallas_kernels.dispatch import Target

CONFIG = replace(FAMILIES["qwen3"], num_layers=3, qkv_bias=True, windows=(None, 20, None))  # few layers to compile


def both_forms() -> list[cb.Model]:
    return [cb.model.random_model(CONFIG, seed=7, by_layer=by_layer) for by_layer in (False, True)]


def same_leaves(one: Params, other: Params) -> bool:
    separated = [params.separated().layers for params in (one, other)]
    layers = [jax.tree.map(np.stack, of_layers, is_leaf=is_by_layer) for of_layers in separated]
    pairs = jax.tree.map(np.array_equal, (one.embedder, layers[0]), (other.embedder, layers[1]))
    return all(jax.tree.leaves(pairs))


# Each mode, and each way of the resident executor's and of the streamed one's to take a layer's weights.
@pytest.mark.parametrize(
    ("executor", "modes"), [("resident", ("full", "reuse", "blend")), ("streamed", ("prefix", "blend"))]
)
def test_prefills_and_answers_are_those_of_stacked_weights(executor, modes):
    blend = cb.BlendConfig(0.3, "query", num_stages=2)
    stacked, by_layer = (cb.Engine(model, blend=blend, executor=executor) for model in both_forms())
    prompt = random_prompt(11)
    for engine in (stacked, by_layer):
        engine.precompute(prompt)
    for mode in modes:
        before = [engine.model.runner.count for engine in (by_layer, stacked)]
        out, wanted = by_layer.prefill(prompt, mode), stacked.prefill(prompt, mode)
        compiled = [engine.model.runner.count - of for engine, of in zip((by_layer, stacked), before, strict=True)]
        # One more where a program runs layer by layer: the layers whose queries stand apart share one of their own.
        assert compiled[0] == compiled[1] + (executor == "streamed" and mode != "full")
        assert out.stats.executor == wanted.stats.executor
        np.testing.assert_array_equal(out.recomputed, wanted.recomputed)
        assert relative_error(out.logits, wanted.logits) < 2e-6
        assert relative_error(out.cache.k, wanted.cache.k) < 2e-6
    answers = [engine.generate(prompt, max_new_tokens=4, stop_token_ids=()) for engine in (by_layer, stacked)]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # with biases, with norms of heads
def test_each_layers_projections_are_those_of_stacked_weights(family):
    config = replace(FAMILIES[family], num_layers=4, windows=(None,) * 4, check_layer=2)
    stacked, by_layer = (cb.model.random_model(config, seed=3, by_layer=by_layer) for by_layer in (False, True))
    apart = [index for index in range(4) if "q_proj" in by_layer.params.layer(index)]
    assert apart == [2, 3]  # the check layer, and the last
    hidden = jax.random.normal(jax.random.key(2), (5, config.hidden_size))

    def computed(layer) -> tuple:
        q, k, v = layer.queries_keys_values(hidden)
        return q, k, v, layer.queries(hidden), *layer.keys_values(hidden), layer.finish(hidden, q)

    for index in range(4):
        wanted = computed(layer_at(stacked.params, config, index))
        for params in (by_layer.params, by_layer.params.only_layer(index)):
            layer = layer_at(params, config, index)
            assert layer.has_queries_joined == (index not in apart)
            for got, right in zip(computed(layer), wanted, strict=True):
                assert got.shape == right.shape
                assert relative_error(got, right) < 1e-6


def test_attention_deviation_is_that_of_stacked_weights():
    rng, shape = np.random.default_rng(0), cache_shape(CONFIG, 64)
    blended, true = (cb.KVCache(*rng.normal(size=(2, *shape)).astype(np.float32)) for _ in range(2))
    token_ids = rng.integers(0, CONFIG.vocab_size, 50).astype(np.int32)
    wanted, measured = (attention_deviation_by_layer(model, token_ids, 43, blended, true) for model in both_forms())
    np.testing.assert_allclose(measured, wanted, rtol=1e-5)


def test_the_bias_of_keys_is_that_of_stacked_weights():
    config = replace(FAMILIES["qwen2"], num_layers=2, windows=(None, None))
    models = [cb.model.random_model(config, by_layer=by_layer) for by_layer in (False, True)]
    stacked, by_layer = (key_biases(model.params, config) for model in models)
    assert np.abs(stacked).min() > 0
    np.testing.assert_array_equal(by_layer, stacked)
    for index, wanted in enumerate(stacked):
        for model in models:
            np.testing.assert_array_equal(layer_at(model.params, config, index).key_bias, wanted)


@pytest.mark.parametrize("module", ["qkv_proj", "q_proj", "kv_proj"])
def test_the_fingerprint_and_the_tensors_are_those_of_stacked_weights(module):
    stacked, by_layer = both_forms()
    assert same_leaves(by_layer.params, stacked.params)
    assert by_layer.fingerprint == stacked.fingerprint
    named, wanted = (hugging_face_tensors(model.params, model.config) for model in (by_layer, stacked))
    assert named.keys() == wanted.keys()
    assert all(np.array_equal(named[name], tensor) for name, tensor in wanted.items())
    changed = by_layer.params.layers[module]
    changed["kernel"] = jax.tree.map(lambda kernel: kernel.at[0, -1].mul(2), changed["kernel"])
    assert by_layer.fingerprint != stacked.fingerprint


@pytest.mark.parametrize(("case", "ways"), [("qwen3", 1), ("qwen3", 2), ("mixtral", 1)])
def test_checkpoints_load_by_layer(case, ways):
    mesh = jax.make_mesh((ways,), ("model",), axis_types=(jax.sharding.AxisType.Auto,)) if ways > 1 else None
    checkpoint, stacked = open_checkpoint(HF / case), cb.load_model(HF / case, mesh=mesh)
    by_layer = load_params(checkpoint, stacked.config, partition=stacked.partition, by_layer=True)
    assert by_layer.by_layer
    assert by_layer.joined == (mesh is None)
    assert same_leaves(by_layer, stacked.params)
    abstract = abstract_params(stacked.config, by_layer=True, joined=mesh is None)
    assert jax.tree.structure(by_layer) == jax.tree.structure(abstract)
    assert [leaf.shape for leaf in jax.tree.leaves(by_layer)] == [leaf.shape for leaf in jax.tree.leaves(abstract)]
    if mesh is not None:
        kernel = by_layer.layers["q_proj"]["kernel"][1]
        assert kernel.sharding.spec == jax.P(None, "model")
        assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2


def test_a_model_on_a_gpu_takes_stacked_weights_apart(monkeypatch):
    wanted, params = (model.params for model in both_forms()[::-1])
    monkeypatch.setattr(cb.Model, "platform", "gpu")
    model = cb.Model(CONFIG, params)
    assert model.params.by_layer
    assert model.params.joined
    assert jax.tree.structure(model.params) == jax.tree.structure(wanted)
    assert same_leaves(model.params, wanted)


def test_taking_weights_apart_holds_no_more_than_one_leaf_twice(monkeypatch):
    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    stacked, sizes = both_forms()[0].params, []
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(stacked.layers))
    gc.collect()
    before, block_until_ready = held(), jax.block_until_ready

    def recorded(arrays):
        sizes.append(held() - before)
        return block_until_ready(arrays)

    monkeypatch.setattr(jax, "block_until_ready", recorded)
    stacked.take_apart(joined_by_layer(CONFIG))
    assert stacked.joined
    assert max(sizes) <= largest
    assert held() <= before + 1000  # indices of slices


def test_a_single_row_is_the_same_on_a_gpu(monkeypatch):
    params = both_forms()[0].params
    row = jax.random.normal(jax.random.key(1), (1, CONFIG.hidden_size))

    def computed() -> tuple:
        return *layer_at(params, CONFIG, 0).keys_values(row), embedder(params, CONFIG).logits(row)

    wanted = computed()
    monkeypatch.setattr(projection, "current_target", lambda: Target("gpu"))
    for of_gpu, other in zip(computed(), wanted, strict=True):
        assert of_gpu.shape == other.shape
        assert relative_error(of_gpu, other) < 1e-6
