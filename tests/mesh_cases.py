"""Small models, split over meshes of the eight devices that conftest.py forces, and what one device gives."""

from __future__ import annotations

import re
from functools import cache

import jax
from conftest import random_prompt

import cacheblend_jax as cb
from cacheblend_jax.model import ModelConfig
from cacheblend_jax.model.model import split_model
from cacheblend_jax.model.sharding import ShardingRules

SHAPE = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 64, "num_layers": 3, "num_heads": 8}
SHAPE |= {"head_dim": 8, "max_positions": 256, "architecture": "LlamaForCausalLM"}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_size": 16, "expert_bias": True, "experts_sum_to_one": True}
CONFIGS = {
    "8 KV heads": ModelConfig(num_kv_heads=8, **SHAPE),
    "2 KV heads": ModelConfig(num_kv_heads=2, qkv_bias=True, qk_norm=True, tied_embeddings=True, **SHAPE),
    "1 KV head": ModelConfig(num_kv_heads=1, post_norms=True, attention_sinks=True, windows=(20,) * 3, **SHAPE),
    "experts": ModelConfig(num_kv_heads=4, **SHAPE, **EXPERTS),
}
BLEND = cb.BlendConfig(selector="hkvd", num_stages=1)
BY_QUESTION = cb.BlendConfig(selector="query", num_stages=1)
PROMPT = random_prompt(3, (30, 25), prefix=5, suffix=4)
BY_EXPERT = ShardingRules(experts="model", expert_mlp=None)


def mesh_of(shape: str) -> jax.sharding.Mesh:
    """A mesh of the first devices: `"2x4"` has two groups of four."""
    data, model = map(int, shape.split("x"))
    axes = {"axis_types": (jax.sharding.AxisType.Auto,) * 2, "devices": jax.devices()[: data * model]}
    return jax.make_mesh((data, model), ("data", "model"), **axes)


@cache
def whole_model(name: str) -> cb.Model:
    return cb.model.random_model(CONFIGS[name], seed=7)


@cache
def model_on(name: str, shape: str, rules: ShardingRules | None = None) -> cb.Model:
    return split_model(whole_model(name), mesh_of(shape), rules)


@cache
def store_of(name: str) -> cb.ChunkStore:
    """What one device computed of the prompt's chunks, which engines on meshes read."""
    store = cb.ChunkStore()
    with cb.Engine(whole_model(name), store, BLEND) as engine:
        engine.precompute(PROMPT)
    return store


@cache
def wanted(name: str, mode: str, blend: cb.BlendConfig = BLEND) -> cb.PrefillResult:
    """What one device gives, by the resident executor."""
    with cb.Engine(whole_model(name), store_of(name), blend) as engine:
        out = engine.prefill(PROMPT, mode)
        engine.flush()
        return engine.prefill(PROMPT, mode) if mode == "prefix" else out  # stored after its first use


def collectives(text: str) -> list[tuple[str, str]]:
    """What an optimised program has the devices exchange: operations, and the shapes of their results."""
    found = re.findall(r"= (\(.*?\)|\S+) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    return sorted((kind, re.sub(r"\{.*?\}", "", shape)) for shape, kind in found)
