"""Decoding by a program for each layer: the tokens, and the contexts, of decoding in one program."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import FAMILIES, TWO_STAGES, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.model import params
from cacheblend_jax.model.decode_by_layer import decode_layer
from cacheblend_jax.model.layer_cache import CacheByLayer
from cacheblend_jax.model.params import is_by_layer
from cacheblend_jax.runtime.programs import shapes_of

LLAMA = FAMILIES["llama3"]
NO_STOP = {"stop_token_ids": ()}


@pytest.fixture
def by_layer(monkeypatch):
    """Has programs of one layer take small layers' weights alone, too."""

    def set_to(wanted: bool) -> None:
        monkeypatch.setattr(params, "LEAST_LAYER_BYTES", 0 if wanted else 1 << 60)

    set_to(True)
    return set_to


def new_engine(config: cb.ModelConfig = LLAMA, **options: object) -> cb.Engine:
    return cb.Engine(cb.model.random_model(config, seed=9), blend=TWO_STAGES, **options)


def programs(engine: cb.Engine) -> set[str]:
    return {entry.key[0].__name__ for entry in engine.model.runner._entries.values()}


SAMPLING = cb.Sampling(temperature=0.7, top_k=9, top_p=0.8, seed=4)


@pytest.mark.parametrize(
    ("family", "sampling"), [("llama3", SAMPLING), ("qwen3", None), ("gemma3", SAMPLING), ("every_option", None)]
)
def test_answers_are_those_of_one_program(family, sampling, by_layer):
    engine = new_engine(replace(FAMILIES[family], dtype="float32"))
    out = engine.prefill(random_prompt(5), "full")
    options = {"max_new_tokens": 12, "sampling": sampling, **NO_STOP}
    answer = engine.complete(out, **options)
    assert {"decode_layer", "token_after"} <= programs(engine)
    assert "decode_tokens" not in programs(engine)
    by_layer(False)
    assert answer.token_ids == engine.complete(out, **options).token_ids
    assert "decode_tokens" in programs(engine)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_of_16_bit_floats_is_written_in_place_and_keeps_them(dtype, by_layer):
    engine = new_engine(replace(LLAMA, dtype=dtype))
    stream = engine.stream(engine.prefill(random_prompt(5), "full"), max_new_tokens=3, **NO_STOP)
    list(stream)
    (layer,) = [entry for entry in engine.model.runner._entries.values() if entry.key[0] is decode_layer]
    text, keys = layer.program.result().run.as_text(), stream.context.cache.layers[0].v.shape[1]
    assert f"u16[{LLAMA.num_kv_heads},{keys},{LLAMA.head_dim}]" in text
    assert "may-alias" in text.splitlines()[0]
    cached, prefilled = stream.context.cache.growing().cache(), engine.prefill(random_prompt(5), "full").cache
    length = prefilled.k.shape[1]
    for one, other in ((cached.k, prefilled.k), (cached.v, prefilled.v)):
        np.testing.assert_array_equal(np.asarray(one[:, :length]), np.asarray(other))


def test_an_answer_ends_with_a_stop_token_and_comes_in_blocks(by_layer):
    engine = new_engine()
    out = engine.prefill(random_prompt(5), "full")
    free = engine.complete(out, max_new_tokens=9, **NO_STOP).token_ids
    at = free.index(free[4])
    for at_once in (1, 3, 9):
        stopped = engine.complete(out, max_new_tokens=9, stop_token_ids=[free[4]], tokens_at_once=at_once)
        assert (stopped.token_ids, stopped.stats.finish_reason) == (free[:at], "stop")


def test_a_context_goes_on_after_an_answer(by_layer):
    engine = new_engine()
    stream = engine.stream(engine.prefill(random_prompt(5), "full"), max_new_tokens=5, **NO_STOP)
    answer = [token for token, _ in stream]
    assert isinstance(stream.context.cache, CacheByLayer)
    later = list(range(1, 9))
    extended = engine.extend(stream, later)
    prompt = cb.Prompt([], [], [*engine.prefill(random_prompt(5), "full").token_ids.tolist(), *answer, *later])
    wanted = engine.prefill(prompt, "full")
    assert relative_error(extended.logits, wanted.logits) < 1e-5
    again = [engine.complete(out, max_new_tokens=4, **NO_STOP).token_ids for out in (extended, wanted)]
    assert again[0] == again[1]


def test_a_cache_that_an_interrupt_took_is_lost(by_layer, monkeypatch):
    engine = new_engine()
    stream = engine.stream(engine.prefill(random_prompt(5), "full"), max_new_tokens=9, tokens_at_once=1, **NO_STOP)
    next(stream), next(stream)
    calls, runner = [], type(engine.model.runner)
    call = runner.__call__

    def interrupted(self, function, *arrays, **options):
        calls.append(function)
        if calls.count(decode_layer) == 2:
            raise KeyboardInterrupt
        return call(self, function, *arrays, **options)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert isinstance(stream.context.cache, cb.KVCache)  # the prefill's
    engine.extend(stream, [3, 4])


@pytest.mark.parametrize("selector", ["hkvd", "query"])
def test_streamed_prefills_take_each_layers_weights_alone(selector, by_layer):
    blend, prompt = cb.BlendConfig(0.3, selector, num_stages=2), random_prompt(11)
    model = cb.model.random_model(LLAMA, seed=9)
    engine = cb.Engine(model, blend=blend, executor="streamed")
    engine.precompute(prompt)
    out = engine.prefill(prompt)
    taken = [entry.key for entry in model.runner._entries.values() if entry.key[0].__name__ == "plain_layer"]
    assert taken
    assert not [key for key in taken for shape in key[4] if shape[0][:2] == (LLAMA.num_layers, LLAMA.hidden_size)]
    by_layer(False)
    wanted = engine.prefill(prompt)
    np.testing.assert_array_equal(out.recomputed, wanted.recomputed)
    assert relative_error(out.logits, wanted.logits) < 2e-6
    assert relative_error(out.cache.k, wanted.cache.k) < 2e-6


def test_layers_share_the_stacks_memory_and_follow_a_replaced_parameter(by_layer):
    model = cb.model.random_model(replace(LLAMA, hidden_size=64, intermediate_size=128), seed=9)
    shared = model.step_params
    assert shared is model.step_params is model.with_kernels("xla").step_params
    for stack, layers in zip(
        jax.tree.leaves(model.params.layers), jax.tree.leaves(shared.layers, is_leaf=is_by_layer), strict=True
    ):
        for index, layer in enumerate(layers):
            np.testing.assert_array_equal(layer, stack[index])
            if stack[0].nbytes % 64 == 0:
                assert layer.unsafe_buffer_pointer() == stack.unsafe_buffer_pointer() + index * layer.nbytes
    engine, prompt = cb.Engine(model), random_prompt(5)
    before = engine.generate(prompt, "full", max_new_tokens=6, **NO_STOP).token_ids
    model.params.layers["down_proj"]["kernel"] = model.params.layers["down_proj"]["kernel"][::-1]
    after = engine.generate(prompt, "full", max_new_tokens=6, **NO_STOP).token_ids
    assert before != after
    by_layer(False)
    assert after == engine.generate(prompt, "full", max_new_tokens=6, **NO_STOP).token_ids


def test_what_is_compiled_for_an_outline_runs_the_model(by_layer):
    model = cb.model.random_model(LLAMA, seed=9)
    outline = replace(model, params=shapes_of(model.params))
    cb.Engine(outline, length_buckets=(64, 96)).warmup(64, modes=("full",), max_new_tokens=9)
    assert "decode_layer" in {entry.key[0].__name__ for entry in outline.runner._entries.values()}
    count = outline.runner.count
    model.follow(outline)
    cb.Engine(model, length_buckets=(64, 96)).generate(
        cb.Prompt([], [], np.arange(64, dtype=np.int32)), "full", max_new_tokens=9
    )
    assert model.runner.count == count


def test_after_warm_up_nothing_compiles(by_layer):
    engine = new_engine(length_buckets=(64, 96))
    engine.warmup(64, modes=(), max_new_tokens=9)
    assert {"layer_with_room", "embedded_row", "decode_layer", "token_after"} <= programs(engine)
    count = engine.model.runner.count
    engine.complete(engine.prefill(cb.Prompt([], [], np.arange(64, dtype=np.int32)), "full"), max_new_tokens=9)
    after = engine.model.runner.count
    engine.complete(engine.prefill(cb.Prompt([], [], np.arange(60, dtype=np.int32)), "full"), max_new_tokens=9)
    assert after == engine.model.runner.count
    assert after - count <= 1  # the prefill's own


def test_small_layers_and_meshes_keep_to_one_program():
    assert not cb.model.random_model(LLAMA).takes_layers
    large = replace(LLAMA, hidden_size=256, intermediate_size=1024, dtype="float32")
    assert cb.model.random_model(large).takes_layers
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("model",)) if len(jax.devices()) > 1 else None
    if mesh is not None:
        assert not cb.model.split_model(cb.model.random_model(large), mesh).takes_layers
