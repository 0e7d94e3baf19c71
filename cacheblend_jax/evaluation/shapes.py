"""Shapes of models that are timed with random weights, by name."""

from __future__ import annotations

from cacheblend_jax.model.config import ModelConfig, RopeConfig

SHAPES = {
    "bench-16l": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=16,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        max_positions=32768,
    ),
    "llama-3-8b": ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=131072,
        rope=RopeConfig("llama3", 500000.0, 8.0, 8192, 1.0, 4.0),
        dtype="bfloat16",
    ),
    "qwen3-4b": ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=40960,
        rope=RopeConfig(theta=1e6),
        qk_norm=True,
        tied_embeddings=True,
        dtype="bfloat16",
    ),
}
