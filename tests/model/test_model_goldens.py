"""I9: full prefill and greedy decoding equal Hugging Face transformers on the same weights, for every family."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from conftest import HF

import cacheblend_jax as cb

# On every version of Python and JAX: layers that differ, and experts; the others are arithmetic that these do alike.
ON_EVERY_VERSION = ("gemma3", "gpt_oss")
CASES = [
    pytest.param(path.name, marks=[] if path.name in ON_EVERY_VERSION else pytest.mark.once)
    for path in sorted(HF.iterdir())
]
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_hf_goldens.py"


@pytest.mark.parametrize("case", CASES)
def test_full_prefill_and_greedy_decoding_equal_transformers(case):
    golden = np.load(HF / case / "golden.npz")
    engine = cb.Engine(cb.load_model(HF / case, dtype="float32"), length_buckets=(64,))  # one program for both lengths
    for row, tokens in enumerate((17, 48)):
        ids = golden["token_ids"][:tokens]
        logits = engine.prefill(cb.Prompt(prefix=[], suffix=ids), "full").logits
        np.testing.assert_allclose(logits, golden["logits"][row], rtol=2e-4, atol=2e-4)
    answer = engine.generate(
        cb.Prompt(prefix=[], suffix=golden["token_ids"]), "full", max_new_tokens=12, stop_token_ids=()
    )
    assert answer.token_ids == golden["greedy"].tolist()


@pytest.mark.once
@pytest.mark.parametrize("executor", ["resident", "streamed"])
def test_a_blend_of_three_chunks_that_recomputes_all_equals_transformers(executor):
    """Of the model whose layers differ in window and RoPE; the prompt is four times as long as the windows."""
    golden = np.load(HF / "gemma3" / "golden.npz")
    ids = golden["token_ids"]
    engine = cb.Engine(
        cb.load_model(HF / "gemma3", dtype="float32"), blend=cb.BlendConfig(1.0, num_stages=2), executor=executor
    )
    prompt = cb.Prompt(ids[:5], [ids[5:19], ids[19:31], ids[31:42]], ids[42:])
    engine.precompute(prompt)
    out = engine.prefill(prompt)
    assert (out.stats.hits, out.stats.executor) == (3, executor)
    np.testing.assert_allclose(out.logits, golden["logits"][1], rtol=2e-4, atol=2e-4)


@pytest.mark.live
@pytest.mark.parametrize("case", CASES)
def test_live_transformers_agrees_on_other_tokens(case):
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("make_hf_goldens", SCRIPT)
    goldens = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(goldens)
    ids = np.random.default_rng(1234).integers(3, 160, 61).astype(np.int32)
    logits, greedy = goldens.golden_outputs(goldens.build_model(case), ids)
    engine = cb.Engine(cb.load_model(HF / case, dtype="float32"))
    np.testing.assert_allclose(
        engine.prefill(cb.Prompt(prefix=[], suffix=ids), "full").logits, logits[-1], rtol=2e-4, atol=2e-4
    )
    answer = engine.generate(cb.Prompt(prefix=[], suffix=ids), "full", max_new_tokens=12, stop_token_ids=())
    assert answer.token_ids == greedy.tolist()
