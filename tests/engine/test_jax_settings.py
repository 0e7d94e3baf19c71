"""Settings of JAX that users switch on for their own code change nothing here: 64-bit types, and strict promotion.

Strict promotion needs float32 weights: Flax's RMSNorm itself promotes narrower ones.
"""

from __future__ import annotations

import jax
import numpy as np
from conftest import SHAPE, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.rope_config import RopeConfig

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    **SHAPE | {"num_layers": 3},
    qkv_bias=True,
    rope=RopeConfig("yarn", 10000.0, 4.0, 32),
    windows=(None, 20, 20),
    attention_soft_cap=1.5,
    attention_sinks=True,
    logits_soft_cap=2.0,
    residual_scale=0.5,
    num_experts=4,
    experts_per_token=2,
    expert_size=24,
    experts_sum_to_one=True,
    expert_bias=True,
    glu_alpha=1.702,
    glu_limit=0.5,
)
PROMPT = random_prompt(3, chunk_lengths=(12, 20, 1), prefix=5, suffix=6)
SAMPLING = cb.Sampling(temperature=0.7, top_k=9, top_p=0.9, seed=4)


def answers() -> list[tuple[list[int], np.ndarray]]:
    """Tokens and logits by both executors, from programs that are compiled here."""
    found = []
    model = cb.model.random_model(CONFIG, seed=1)
    cases = (("resident", "random", SAMPLING, None), ("streamed", "query", None, "int8"))
    for executor, selector, sampling, kv_dtype in cases:
        blend, store = cb.BlendConfig(0.3, selector=selector, num_stages=1), cb.ChunkStore(kv_dtype=kv_dtype)
        with cb.Engine(model, store, executor=executor, blend=blend) as engine:
            engine.precompute(PROMPT)
            out = engine.prefill(PROMPT)
            assert (out.logits.dtype, out.token_ids.dtype, out.cache.k.dtype) == (np.float32, np.int32, np.float32)
            tokens = engine.complete(out, max_new_tokens=3, sampling=sampling).token_ids
            found.append((tokens, out.logits))
    return found


def test_64_bit_types_and_strict_promotion_change_nothing():
    """Together they find most: defaults become int64, and nothing may be mixed with them."""
    wanted = answers()
    settings = {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict"}
    before = {setting: getattr(jax.config, setting) for setting in settings}
    try:
        for setting, value in settings.items():
            jax.config.update(setting, value)
        for (tokens, logits), (wanted_tokens, wanted_logits) in zip(answers(), wanted, strict=True):
            assert tokens == wanted_tokens
            np.testing.assert_array_equal(logits, wanted_logits)
    finally:
        for setting, value in before.items():
            jax.config.update(setting, value)
