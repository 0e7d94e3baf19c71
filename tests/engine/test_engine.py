"""The engine: generation, misses, several threads, warm-up, and one clear error for each bad call."""

from __future__ import annotations

import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, HF, TWO_STAGES, family_model, fresh_engine, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.blend.flops import prefill_flops
from cacheblend_jax.model.sampling import Sampling


@pytest.fixture(scope="module")
def text_engine():
    engine = cb.Engine(cb.load_model(HF / "llama3", dtype="float32"), blend=TWO_STAGES)
    engine.precompute(PROMPT)
    return engine


PROMPT = cb.Prompt("Answer.", ["The sky is blue.", "Grass is green."], "What is blue?")


def test_text_in_text_out(text_engine):
    pieces = []
    answer = text_engine.generate(
        PROMPT, max_new_tokens=10, stop_token_ids=(), on_token=lambda token, text: pieces.append((token, text))
    )
    assert [token for token, _ in pieces] == answer.token_ids
    assert "".join(text for _, text in pieces) == answer.text
    assert answer.text == text_engine.model.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert answer.stats.finish_reason == "length"
    assert answer.stats.decoded == 9


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_continuation_logits_are_those_of_the_prompt_with_the_tokens_before(family):
    engine, prompt, given = fresh_engine(family), random_prompt(21), [5, 90, 33]
    out = engine.prefill(prompt, "full")
    logits = engine.continuation_logits(out, given)
    for number in range(3):
        longer = cb.Prompt([], [], np.concatenate([out.token_ids, np.asarray(given[:number], np.int32)]))
        assert relative_error(logits[number], engine.prefill(longer, "full").logits) < 1e-5
    with pytest.raises(cb.PromptError, match="the continuation has token id 97"):
        engine.continuation_logits(out, [97])
    with pytest.raises(cb.PromptError, match="no tokens"):
        engine.continuation_logits(out, [])


@pytest.mark.once
def test_flops_count_the_question_pass():
    prompt = random_prompt(22)
    engine = fresh_engine("llama3", 0.15, "query")
    engine.precompute(prompt)
    with_pass = engine.prefill(prompt)
    config = engine.model.config
    forced = np.arange(with_pass.token_ids.size - 7, with_pass.token_ids.size)
    sizes = 2 * config.hidden_size * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    each = sizes + 6 * config.hidden_size * config.intermediate_size
    attention = 6 * config.num_heads * config.head_dim * (forced + 1).sum()  # scores, values, and scores once more
    expected = config.num_layers * (each * forced.size + attention)
    computed = [np.flatnonzero(layer) for layer in with_pass.recomputed]
    assert with_pass.stats.flops - prefill_flops(config, computed) == expected


def test_decoding_goes_on_from_the_blended_cache_as_a_longer_prompt_would(text_engine):
    # In full mode each new token is the one that a full prefill of the text so far gives.
    answer = text_engine.generate(PROMPT, "full", max_new_tokens=6, stop_token_ids=())
    ids = text_engine.prefill(PROMPT, "full").token_ids.tolist()
    for token in answer.token_ids:
        assert text_engine.prefill(cb.Prompt([], [], ids), "full").next_token == token
        ids.append(token)


def test_generation_ends_before_a_stop_token(text_engine):
    free = text_engine.generate(PROMPT, max_new_tokens=8, stop_token_ids=()).token_ids
    stop = free[3]
    answer = text_engine.generate(PROMPT, max_new_tokens=8, stop_token_ids=[stop])
    assert answer.token_ids == free[: free.index(stop)]
    assert answer.stats.finish_reason == "stop"


@pytest.mark.once
def test_the_models_length_bounds_generation():
    engine = fresh_engine("llama3")
    room = engine.model.config.max_positions - 2040
    answer = engine.generate(random_prompt(1, (2000,), 20, 20), "full", max_new_tokens=50, stop_token_ids=())
    assert len(answer.token_ids) == room + 1


def test_the_prefills_own_cache_outlives_generation():
    engine, prompt = fresh_engine("llama3"), random_prompt(1)
    engine.precompute(prompt)
    before = np.asarray(engine.prefill(prompt).cache.k).copy()
    out = engine.prefill(prompt)
    engine.generate(prompt, max_new_tokens=3)
    np.testing.assert_array_equal(np.asarray(out.cache.k), before)


def test_sampling_follows_its_seed_and_its_cuts(text_engine):
    def draw(**options):
        sampling = Sampling(**options)
        return text_engine.generate(PROMPT, max_new_tokens=12, sampling=sampling, stop_token_ids=()).token_ids

    greedy = draw()
    assert draw(temperature=2.0, top_k=1) == greedy
    assert draw(temperature=2.0, top_p=1e-6) == greedy
    assert draw(temperature=2.0, seed=1) == draw(temperature=2.0, seed=1)
    assert len({tuple(draw(temperature=2.0, seed=seed)) for seed in range(4)}) > 1


def test_sampling_draws_from_the_cut_softmax():

    from cacheblend_jax.model.sampling import sample

    logits = jax.numpy.log(jax.numpy.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def frequencies(temperature=1.0, top_k=0, top_p=1.0):
        drawn = jax.vmap(lambda key: sample(logits, key, temperature, top_k, top_p))(keys)
        return np.bincount(np.asarray(drawn), minlength=4) / keys.shape[0]

    np.testing.assert_allclose(frequencies(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(frequencies(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.9), [0.526, 0.316, 0.158, 0], atol=0.03)
    sharp = np.asarray([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), sharp / sharp.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_sampling_that_makes_no_sense_is_named(options, message):
    with pytest.raises(cb.CacheBlendError, match=message):
        Sampling(**options)


def test_misses_are_stored_after_the_first_token_and_hit_the_next_time():
    engine, prompt = fresh_engine("llama3"), random_prompt(21)
    first = engine.prefill(prompt)
    second = engine.prefill(prompt)  # waits for what it needs
    assert (first.stats.misses, first.stats.hits) == (4, 0)
    assert (second.stats.misses, second.stats.hits) == (0, 4)


def test_a_tenants_entries_serve_that_tenant_alone():
    engine, prompt = fresh_engine("llama3"), random_prompt(21)
    of_one, of_two = replace(prompt, tenant="one"), replace(prompt, tenant="two")
    assert not set(engine.precompute(prompt)) & set(engine.precompute(of_one))
    asked = {"none": prompt, "one": of_one, "two": of_two}
    found = {name: engine.prefill(each).stats.loaded for name, each in asked.items()}
    assert found == {"none": (True,) * 4, "one": (True,) * 4, "two": (False,) * 4}
    assert [lookup.is_stored for lookup in engine.look_up(of_one)] == [True] * 4
    assert hash(of_one) == hash(replace(of_one)) != hash(of_two)
    assert of_one not in (of_two, prompt)


def test_full_mode_leaves_the_store_alone():
    engine, prompt = fresh_engine("llama3"), random_prompt(22)
    engine.prefill(prompt, "full")
    engine.flush()
    assert len(engine.store) == 0


def test_precompute_skips_what_is_stored_and_reports_progress():
    engine, prompt = fresh_engine("llama3"), random_prompt(23)
    seen = []
    keys = engine.precompute(prompt, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]  # the prefix too
    stored = engine.store.stats.stored
    assert engine.precompute(prompt.chunks, prefix=prompt.prefix) == keys
    assert engine.store.stats.stored == stored


def test_a_repeated_missing_chunk_is_computed_once():
    engine = fresh_engine("llama3")
    chunk = random_prompt(24).chunks[0]
    engine.prefill(cb.Prompt([1, 2, 3, 4, 5], [chunk] * 3, [7]))
    engine.flush()
    assert engine.store.stats.host.entries == 2  # prefix and chunk


def test_a_store_too_small_costs_hits_and_never_an_answer():
    model = family_model("llama3")
    with cb.Engine(model, cb.ChunkStore(host_bytes=1), TWO_STAGES) as engine:
        prompt = random_prompt(25)
        full = engine.prefill(prompt, "full")
        for _ in range(2):
            out = engine.prefill(prompt)
            assert out.stats.misses == 4
            assert relative_error(out.logits, full.logits) < 1e-5


def test_a_failure_while_storing_is_logged_and_answers_go_on(monkeypatch, caplog):
    engine, prompt = cb.Engine(family_model("llama3"), blend=TWO_STAGES), random_prompt(26)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(engine.store, "put", fail)
    engine.prefill(prompt)
    engine.flush()
    assert "could not be stored" in caplog.text
    assert engine.prefill(prompt).stats.misses == 4


def test_a_closed_engine_answers_and_no_longer_stores():
    with cb.Engine(family_model("llama3"), blend=TWO_STAGES) as engine:
        pass
    assert engine.prefill(random_prompt(27)).stats.misses == 4
    assert len(engine.store) == 0


def test_threads_share_an_engine():
    engine = fresh_engine("llama3", 1.0)
    prompts = [random_prompt(seed, (20, 30), 9, 7) for seed in range(4)]
    wanted = [engine.prefill(prompt, "full").logits for prompt in prompts]
    errors = []

    def ask(i: int) -> None:
        for _ in range(3):
            errors.append(relative_error(engine.prefill(prompts[i]).logits, wanted[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 12
    assert max(errors) < 1e-5


@pytest.mark.once
def test_a_mesh_gives_what_one_device_gives():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    plain = cb.Engine(cb.load_model(HF / "mixtral", dtype="float32"), blend=TWO_STAGES)
    meshed = cb.Engine(cb.load_model(HF / "mixtral", dtype="float32", mesh=mesh), blend=TWO_STAGES)
    prompt = random_prompt(28)
    for engine in (plain, meshed):
        engine.precompute(prompt)
    for mode in ("full", "blend"):
        out, wanted = meshed.prefill(prompt, mode), plain.prefill(prompt, mode)
        assert relative_error(out.logits, wanted.logits) < 1e-5
        np.testing.assert_array_equal(out.recomputed, wanted.recomputed)
        answers = [
            engine.complete(prefilled, max_new_tokens=4, stop_token_ids=[]).token_ids
            for engine, prefilled in ((meshed, out), (plain, wanted))
        ]
        assert answers[0] == answers[1]
    layers = meshed.model.params.layers
    for kernel in (layers["q_proj"]["kernel"], layers["experts"]["gate_proj"]["kernel"]):
        assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 2


BAD_CALLS = {
    "unknown mode": (
        lambda engine, prompt: engine.prefill(prompt, "fast"),
        "unknown mode 'fast'; expected one of full",
    ),
    "no new tokens": (lambda engine, prompt: engine.generate(prompt, max_new_tokens=0), "max_new_tokens must be"),
    "a flag for a number": (lambda engine, prompt: engine.generate(prompt, max_new_tokens=True), "got True"),
    "text": (lambda engine, _: engine.prefill(cb.Prompt("text")), "no tokenizer"),
    "one string": (lambda engine, _: engine.precompute("text"), "got one string"),
    "empty": (lambda engine, _: engine.prefill(cb.Prompt([])), "is empty"),
    "vocabulary": (lambda engine, _: engine.precompute([[5], [97]]), "chunk 1 has token id 97"),
    "long chunk": (lambda engine, _: engine.precompute([[1], [1] * 3000]), "chunk 1 with its context has 3000 tokens"),
    "long prompt": (lambda engine, _: engine.precompute(cb.Prompt([1], [[1] * 1500] * 2)), "has 3001 tokens"),
    "warm-up": (lambda engine, _: engine.warmup(10**6), r"max_tokens must be in \[1, 2048\]"),
    "warm-up mode": (lambda engine, _: engine.warmup(10, modes=("fast",)), "unknown mode 'fast'"),
    "warm-up sizes": (
        lambda engine, _: engine.warmup(10, suffix_tokens=0),
        "suffix_tokens must be a whole number of at least 1, got 0",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_named_before_any_work(case):
    engine = fresh_engine("llama3")
    call, message = BAD_CALLS[case]
    programs = engine.model.runner.count
    with pytest.raises(cb.CacheBlendError, match=message):
        call(engine, random_prompt(1))
    engine.flush()
    assert len(engine.store) == 0
    assert engine.model.runner.count == programs


@pytest.mark.parametrize("tokens", [-1, 1.5, "4"])
def test_a_context_that_makes_no_sense_is_named(tokens):
    with pytest.raises(cb.CacheBlendError, match="context_tokens must be"):
        cb.Engine(family_model("llama3"), context_tokens=tokens)


def test_a_check_layer_beyond_the_model_is_named():
    with pytest.raises(cb.CacheBlendError, match=r"check_layer must be in \[1, 5\] for 6 layers, got 6"):
        cb.Engine(family_model("llama3"), blend=cb.BlendConfig(check_layer=6))


def test_a_models_fingerprint_follows_weights_configuration_and_tokenizer():
    import dataclasses

    model = family_model("llama3")
    assert model.fingerprint == cb.model.random_model(FAMILIES["llama3"], seed=7).fingerprint
    assert model.fingerprint != cb.model.random_model(FAMILIES["llama3"], seed=8).fingerprint
    longer = dataclasses.replace(model.config, rms_norm_eps=1e-3)
    assert cb.Model(longer, model.params).fingerprint != model.fingerprint
    elsewhere = dataclasses.replace(model.config, check_layer=3)
    assert cb.Model(elsewhere, model.params).fingerprint == model.fingerprint
    with_tokenizer = cb.Model(model.config, model.params, cb.load_model(HF / "llama3").tokenizer)
    assert with_tokenizer.fingerprint != model.fingerprint


@pytest.mark.once
def test_chosen_buckets_change_programs_and_not_answers():
    model, prompts = family_model("llama3"), [random_prompt(seed, (30, size), 9, 7) for seed, size in ((1, 3), (2, 99))]
    coarse = cb.Engine(cb.model.random_model(model.config, seed=7), blend=TWO_STAGES, length_buckets=(200,))
    for prompt in prompts:
        for mode in ("full", "blend"):
            wanted = fresh_engine("llama3").prefill(prompt, mode)
            np.testing.assert_allclose(coarse.prefill(prompt, mode).logits, wanted.logits, atol=1e-5)
        coarse.flush()
    once = coarse.model.runner.count
    coarse.prefill(random_prompt(3, (30, 55), 9, 7), "full")
    assert coarse.model.runner.count == once


@pytest.mark.once
def test_warm_up_provides_for_exact_first_chunks_missing_ones_and_decoding(caplog):
    """Without a prefix the first chunk is exact, and its tokens are not active."""
    engine = cb.Engine(cb.model.random_model(FAMILIES["llama3"], seed=9), blend=TWO_STAGES)
    engine.warmup(128, suffix_tokens=7, chunk_tokens=40, max_new_tokens=3)
    count = engine.model.runner.count
    for seed, lengths in ((1, (30, 40)), (2, (5, 70)), (3, (40,))):
        prompt = random_prompt(seed, lengths, 0)
        engine.precompute([chunk[:40] for chunk in prompt.chunks])
        engine.precompute(prompt)
        assert engine.generate(prompt, max_new_tokens=3).stats.prefill.compile_s == 0
    assert engine.model.runner.count == count
    assert not caplog.records
    assert engine.prefill(random_prompt(4, (200,), 0)).stats.compile_s > 0
    assert "warm-up did not cover Plan(" in caplog.text


@pytest.mark.once
def test_a_request_may_choose_its_own_blend():
    engine, prompt = fresh_engine("llama3"), random_prompt(21)
    engine.precompute(prompt)
    usual = engine.prefill(prompt).stats.recompute_ratio
    other = engine.prefill(prompt, blend=cb.BlendConfig(0.5, "epic", num_stages=1))
    assert (other.plan.selector, other.stats.recompute_ratio) == (cb.SELECTORS["epic"], pytest.approx(0.5, abs=0.01))
    answer = engine.generate(prompt, blend=cb.BlendConfig(1.0, num_stages=1), max_new_tokens=1)
    assert answer.stats.prefill.recompute_ratio == 1.0
    assert engine.generate(prompt, blend="auto", max_new_tokens=1).stats.prefill.decision is not None
    assert engine.prefill(prompt).stats.recompute_ratio == usual  # the engine's own is as it was
    with pytest.raises(cb.CacheBlendError, match="check_layer must be in"):
        engine.prefill(prompt, blend=cb.BlendConfig(check_layer=99))
    with pytest.raises(cb.CacheBlendError, match=r"blend must be a BlendConfig or 'auto', got 0\.5"):
        engine.prefill(prompt, blend=0.5)


def test_streaming_gives_what_generating_gives(text_engine):
    options = {"max_new_tokens": 10, "stop_token_ids": ()}
    wanted = text_engine.generate(PROMPT, **options)
    stream = text_engine.stream(PROMPT, **options)
    first = next(stream)
    assert first[0] == wanted.token_ids[0] == stream.generation.token_ids[0]
    pieces = [first, *stream]
    assert [token for token, _ in pieces] == wanted.token_ids
    assert "".join(text for _, text in pieces) == wanted.text == stream.generation.text
    assert stream.generation.stats.finish_reason == wanted.stats.finish_reason == "length"
    stopped = text_engine.stream(PROMPT, max_new_tokens=10, stop_token_ids=wanted.token_ids[2:3])
    assert [token for token, _ in stopped] == wanted.token_ids[: wanted.token_ids.index(wanted.token_ids[2])]
    assert stopped.generation.stats.finish_reason == "stop"
    assert next(stopped, None) is None


@pytest.mark.once
def test_a_selector_replaced_under_its_name_is_not_the_compiled_one(monkeypatch):
    """Programs are compiled for the selector itself, not for its name."""
    engine, prompt = fresh_engine("llama3", 0.3), random_prompt(22)
    engine.precompute(prompt)
    first = cb.Selector("mine", lambda evidence: -evidence.positions.astype(jnp.float32))
    last = cb.Selector("mine", lambda evidence: evidence.positions.astype(jnp.float32))
    blends = [cb.BlendConfig(0.3, selector, num_stages=1) for selector in (first, last)]
    chosen = [engine.prefill(prompt, blend=blend).recomputed for blend in blends]
    candidates = slice(9, 9 + 96)
    assert chosen[0][-1, candidates][:20].all()
    assert chosen[1][-1, candidates][-20:].all()
