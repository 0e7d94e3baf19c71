"""RoPE's inverse frequencies against those that transformers computes for published settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.rope import inverse_frequencies, rope_tables

DATA = Path(__file__).parents[1] / "data"  # scripts/make_hf_goldens.py
CASES = json.loads((DATA / "rope.json").read_text())
BASE = {"model_type": "llama", "vocab_size": 9, "hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1}
BASE |= {"num_attention_heads": 2}


@pytest.mark.parametrize("case", CASES)
def test_inverse_frequencies_equal_transformers(case):
    golden = np.load(DATA / "rope.npz")
    config = ModelConfig.from_hugging_face(BASE | {"rope_parameters": CASES[case]})
    frequencies, factor = inverse_frequencies(config.rope, 128)
    np.testing.assert_allclose(frequencies, golden[f"{case}/frequencies"], rtol=3e-7)
    assert factor == pytest.approx(float(golden[f"{case}/factor"]))


def test_tables_hold_float32_angles_times_the_attention_factor():
    config = ModelConfig.from_hugging_face(BASE | {"rope_parameters": CASES["qwen2.5-yarn"]})
    frequencies, factor = inverse_frequencies(config.rope, 128)
    assert factor > 1
    cos, sin = rope_tables(config, 5000).of_layer(config, 0)
    angles = np.float32(4321) * frequencies
    np.testing.assert_allclose(cos[4321], np.cos(angles) * factor, atol=1e-6)
    np.testing.assert_allclose(sin[4321], np.sin(angles) * factor, atol=1e-6)
