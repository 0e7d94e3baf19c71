"""The engine: generation, misses, several threads, warm-up, and one clear error for what makes no sense."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, HF, family_model, fresh_engine, random_prompt, relative_error

import cacheblend_jax as cb
from cacheblend_jax.model.decode import Sampling
from cacheblend_jax.runtime.programs import (
    COMPILER_OPTIONS,
    REGIONS,
    ProgramCache,
    _tell_of_drops,
    compiler_options,
    mapped_share,
)


@pytest.fixture(scope="module")
def text_engine():
    engine = cb.Engine(cb.load_model(HF / "llama3", dtype="float32"))
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
    import jax

    from cacheblend_jax.model.decode import sample

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
    with cb.Engine(model, cb.ChunkStore(host_bytes=1)) as engine:
        prompt = random_prompt(25)
        full = engine.prefill(prompt, "full")
        for _ in range(2):
            out = engine.prefill(prompt)
            assert out.stats.misses == 4
            assert relative_error(out.logits, full.logits) < 1e-5


def test_a_failure_while_storing_is_logged_and_answers_go_on(monkeypatch, caplog):
    engine, prompt = cb.Engine(family_model("llama3")), random_prompt(26)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(engine.store, "put", fail)
    engine.prefill(prompt)
    engine.flush()
    assert "could not be stored" in caplog.text
    assert engine.prefill(prompt).stats.misses == 4


def test_a_closed_engine_answers_and_no_longer_stores():
    with cb.Engine(family_model("llama3")) as engine:
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


def test_a_mesh_gives_what_one_device_gives():
    import jax

    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    plain = cb.Engine(cb.load_model(HF / "qwen3", dtype="float32"))
    meshed = cb.Engine(cb.load_model(HF / "qwen3", dtype="float32", mesh=mesh))
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
    kernel = meshed.model.params.layers["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[2] == kernel.shape[2] // 2


BAD_CALLS = {
    "unknown mode": (
        lambda engine, prompt: engine.prefill(prompt, "fast"),
        "unknown mode 'fast'; expected one of full",
    ),
    "no new tokens": (lambda engine, prompt: engine.generate(prompt, max_new_tokens=0), "max_new_tokens must be"),
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
    programs = engine.model.programs.count
    with pytest.raises(cb.CacheBlendError, match=message):
        call(engine, random_prompt(1))
    engine.flush()
    assert len(engine.store) == 0
    assert engine.model.programs.count == programs


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
    assert model.fingerprint == cb.random_model(FAMILIES["llama3"], seed=7).fingerprint
    assert model.fingerprint != cb.random_model(FAMILIES["llama3"], seed=8).fingerprint
    longer = dataclasses.replace(model.config, rms_norm_eps=1e-3)
    assert cb.Model(longer, model.params).fingerprint != model.fingerprint
    elsewhere = dataclasses.replace(model.config, check_layer=3)
    assert cb.Model(elsewhere, model.params).fingerprint == model.fingerprint
    with_tokenizer = cb.Model(model.config, model.params, cb.load_model(HF / "llama3").tokenizer)
    assert with_tokenizer.fingerprint != model.fingerprint


def test_chosen_buckets_change_programs_and_not_answers():
    model, prompts = family_model("llama3"), [random_prompt(seed, (30, size), 9, 7) for seed, size in ((1, 3), (2, 99))]
    coarse = cb.Engine(cb.random_model(model.config, seed=7), length_buckets=(200,))
    for prompt in prompts:
        for mode in ("full", "blend"):
            wanted = fresh_engine("llama3").prefill(prompt, mode)
            np.testing.assert_allclose(coarse.prefill(prompt, mode).logits, wanted.logits, atol=1e-5)
        coarse.flush()
    once = coarse.model.programs.count
    coarse.prefill(random_prompt(3, (30, 55), 9, 7), "full")
    assert coarse.model.programs.count == once


def test_warm_up_provides_for_exact_first_chunks_missing_ones_and_decoding(caplog):
    """No prefix: the first chunk is exact, and as many tokens less are active as it has."""
    engine = cb.Engine(cb.random_model(FAMILIES["llama3"], seed=9))
    engine.warmup(128, suffix_tokens=7, chunk_tokens=40, max_new_tokens=3)
    count = engine.model.programs.count
    for seed, lengths in ((1, (30, 40)), (2, (5, 70)), (3, (40,))):
        prompt = random_prompt(seed, lengths, 0)
        engine.precompute([chunk[:40] for chunk in prompt.chunks])
        engine.precompute(prompt)
        assert engine.generate(prompt, max_new_tokens=3).stats.prefill.compile_s == 0
    assert engine.model.programs.count == count
    assert not caplog.records
    assert engine.prefill(random_prompt(4, (200,), 0)).stats.compile_s > 0
    assert "warm-up did not provide for Plan(" in caplog.text


def test_programs_used_least_recently_make_room(monkeypatch, caplog):
    """A process may map only so many regions of memory; a compiler that finds none left kills it."""
    share = 0.0
    monkeypatch.setattr("cacheblend_jax.runtime.programs.mapped_share", lambda: share)
    monkeypatch.setattr("cacheblend_jax.runtime.programs.KEPT", 2)
    monkeypatch.setattr("cacheblend_jax.runtime.programs._cpu_caches", weakref.WeakSet())  # other tests' programs stay
    _tell_of_drops.cache_clear()
    idle, busy = ProgramCache("cpu"), ProgramCache("cpu")

    def compile_s(programs: ProgramCache, number: int) -> float:
        shape = jax.ShapeDtypeStruct((number,), np.float32)
        return programs.get(jnp.negative, lambda: (shape,), number=number).compile_s

    assert all(compile_s(busy, number) > 0 for number in (1, 2, 3))
    assert all(compile_s(idle, number) > 0 for number in (1, 2))
    assert compile_s(busy, 1) == compile_s(busy, 3) == 0  # used again: 2 is the oldest now, then what is idle
    share = 0.99
    assert compile_s(busy, 4) > 0
    assert caplog.text.count("used least recently are dropped") == 1
    assert compile_s(busy, 1) == compile_s(busy, 3) == compile_s(busy, 4) == 0
    share = 0.0
    assert all(compile_s(*dropped) > 0 for dropped in ((busy, 2), (idle, 1), (idle, 2)))
    assert (busy.count, idle.count) == (5, 4)


def test_no_more_programs_are_dropped_than_needed(monkeypatch):
    """What a dropped program had mapped is given back before it is asked whether more must go."""
    monkeypatch.setattr("cacheblend_jax.runtime.programs._cpu_caches", weakref.WeakSet())
    monkeypatch.setattr("cacheblend_jax.runtime.programs.KEPT", 1)
    monkeypatch.setattr("cacheblend_jax.runtime.programs.EVICTED_AT_ONCE", 2)
    programs, alive = ProgramCache("cpu"), []

    def compile_one(number: int) -> None:
        shape = jax.ShapeDtypeStruct((number,), np.float32)
        alive.append(weakref.ref(programs.get(jnp.negative, lambda: (shape,), number=number).run))

    for number in range(6):
        compile_one(number)
    monkeypatch.setattr(
        "cacheblend_jax.runtime.programs.mapped_share", lambda: sum(program() is not None for program in alive) / 6
    )
    compile_one(6)  # full
    assert sum(program() is not None for program in alive) == 5  # four are little enough


def test_what_a_process_has_mapped_is_counted(monkeypatch):
    assert 0 <= mapped_share() < 1
    assert mapped_share() > 0 or not REGIONS.exists()
    monkeypatch.setattr("cacheblend_jax.runtime.programs.REGIONS", Path("/nowhere"))  # as on other systems than Linux
    assert mapped_share() == 0


def test_a_compiler_that_dropped_an_option_is_told_of_and_used_without(monkeypatch, caplog):
    monkeypatch.setitem(COMPILER_OPTIONS, "cpu", {"xla_cpu_was_dropped": "1"})
    compiler_options.cache_clear()
    try:
        assert compiler_options("cpu") == {}
        assert "compiled without xla_cpu_was_dropped" in caplog.text
        assert ProgramCache("cpu").get(jnp.negative, lambda: (jax.ShapeDtypeStruct((2,), np.float32),)).compile_s > 0
    finally:
        compiler_options.cache_clear()
