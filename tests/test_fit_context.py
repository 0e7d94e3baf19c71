"""Fitting a context: what is minimised is what an engine loses by full KV reuse, and it falls."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from conftest import HF

import cacheblend_jax as cb
from cacheblend_jax.model.rope import rope_tables
from scripts import fit_context
from scripts.fit_context import SINK, Sizes, examples, fit, main, reuse_kl

pytestmark = pytest.mark.once  # arithmetic of the model, and optax
SMALL = Sizes(shortest=3, longest=6, question=5)


@pytest.fixture(scope="module")
def model() -> cb.Model:
    return cb.load_model(HF / "gemma3", dtype="float32")  # scaled embeddings, windows


@pytest.fixture(scope="module")
def drawn(model):
    streams = [np.random.default_rng(seed).integers(0, model.config.vocab_size, 40) for seed in range(3)]
    return next(examples([stream.astype(np.int32) for stream in streams], np.arange(SINK, dtype=np.int32), SMALL, 0))


def test_what_is_minimised_is_what_an_engine_loses_by_reuse(model, drawn):
    rows = 0.1 * np.random.default_rng(1).normal(size=(7, model.config.hidden_size)).astype(np.float32)
    angles = rope_tables(model.config, SMALL.prompt)
    kl = jax.jit(reuse_kl, static_argnames="config")(rows, model.params, drawn, angles, config=model.config)
    sizes = [int((drawn.in_piece & (drawn.chunk == number)).sum()) for number in range(len(drawn.chunks))]
    chunks = [ids[:size] for ids, size in zip(drawn.chunks, sizes, strict=True)]
    prompt = cb.Prompt(drawn.token_ids[:SINK], chunks, drawn.token_ids[drawn.question])
    with cb.Engine(model, context=cb.FittedContext.of(model, rows)) as engine:
        engine.precompute(prompt)
        wanted, got = (jax.nn.log_softmax(engine.prefill(prompt, mode).logits) for mode in ("full", "reuse"))
    assert float(kl[-1]) == pytest.approx(float((np.exp(wanted) * (wanted - got)).sum()), rel=1e-3)


def test_the_loss_falls(model, drawn, monkeypatch, capsys):
    monkeypatch.setattr(fit_context, "examples", lambda *_: itertools.repeat(drawn))
    begin = np.arange(3, dtype=np.int32)
    context, losses = fit(model, [], tokens=3, steps=12, batch=1, sizes=SMALL, begin=begin)
    assert context.embeddings.shape == (3, model.config.hidden_size)
    assert losses[-1] < 0.95 * losses[0]
    assert "step 12 of 12" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    common = ["--model", str(HF / "llama3"), "--texts", str(tmp_path / "a.txt"), "--steps", "1", "--out"]
    with pytest.raises(cb.CacheBlendError, match="no text has 515 tokens, the least that a training prompt takes"):
        main([*common, str(tmp_path / "out.safetensors")])
    with pytest.raises(cb.CacheBlendError, match=r"--out must end in \.safetensors"):
        main([*common, str(tmp_path / "out.npz")])
