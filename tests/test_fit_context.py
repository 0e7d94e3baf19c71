"""Fitting a context: what is minimised is what an engine's blend loses, and it falls."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from conftest import HF

import cacheblend_jax as cb
from cacheblend_jax.model.rope import rope_tables
from pallas_kernels.dispatch import OVERRIDE
from scripts.fit_context import SINK, Sizes, blend_kl, choice_at, fit, main, training_prompts

SMALL = Sizes(pieces=4, words=2, answer=1)
TEXTS = [" ".join(f"{name}{number} goes by" for number in range(9)) for name in ("Ada", "Ben", "Cleo")]


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model(HF / "llama3", dtype="float32")


@pytest.fixture(scope="module")
def prompts(model):
    return training_prompts(model, TEXTS, 2, sizes=SMALL)


def test_what_is_minimised_is_what_an_engines_blend_loses(model, prompts):
    dense, rows = prompts[1], 0.1 * np.random.default_rng(1).normal(size=(7, model.config.hidden_size))
    angles = rope_tables(model.config, dense.token_ids.size)
    kl = jax.jit(blend_kl, static_argnames="config")
    context = cb.FittedContext.of(model, rows)
    loss = kl(context.embeddings, model.params, dense, choice_at(0.3, dense, model.config), angles, config=model.config)
    chunks = [dense.token_ids[dense.candidate & (dense.chunk == number)] for number in range(len(dense.chunks))]
    begin, end = np.flatnonzero(dense.candidate)[[0, -1]]
    prompt = cb.Prompt(dense.token_ids[:begin], chunks, dense.token_ids[end + 1 : int(dense.length) - 1])
    with cb.Engine(model, context=context, blend=cb.BlendConfig(0.3, "query"), context_tokens=SINK) as engine:
        engine.precompute(prompt)
        wanted, got = (jax.nn.log_softmax(engine.prefill(prompt, mode).logits) for mode in ("full", "blend"))
    assert float(loss) == pytest.approx(float((np.exp(wanted) * (wanted - got)).sum()), rel=1e-3)


def test_every_second_answer_is_the_models_own(model, prompts):
    own, following = (int(prompt.token_ids[int(prompt.length) - 1]) for prompt in prompts)
    prompt = prompts[0].token_ids[: int(prompts[0].length) - 1]
    with cb.Engine(model) as engine:
        assert own == engine.prefill(cb.Prompt([], [], prompt), "full").logits.argmax()
    assert model.tokenizer.decode([following]) in {text[0] for text in TEXTS} | {"g", "b"}


def test_the_loss_falls_whatever_kernels_the_device_prefers(model, prompts, capsys, monkeypatch):
    monkeypatch.setenv(OVERRIDE, "pallas")  # they have no gradients
    begin = 0.1 * np.random.default_rng(2).normal(size=(3, model.config.hidden_size)).astype(np.float32)
    context, losses = fit(model, prompts[:1], steps=16, batch=1, begin=begin)
    assert context.embeddings.shape == (3, model.config.hidden_size)
    assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2])  # at both ratios
    assert "step 16 of 16" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    common = ["--model", str(HF / "llama3"), "--texts", str(tmp_path / "a.txt"), "--steps", "1", "--out"]
    with pytest.raises(cb.CacheBlendError, match="no text has 664 words, as a training prompt takes; give longer ones"):
        main([*common, str(tmp_path / "out.safetensors")])
    with pytest.raises(cb.CacheBlendError, match=r"--out must end in \.safetensors"):
        main([*common, str(tmp_path / "out.npz")])
    with pytest.raises(cb.CacheBlendError, match="experts, whose products have no gradient on a CPU"):
        main(["--model", str(HF / "mixtral"), *common[2:], str(tmp_path / "out.safetensors")])
