"""The supported model families: for each, what its name says that its configurations leave out.

A new family begins with an entry here; docs/guide/contributing.md has the rest. What one needs that no other has had
becomes an option of `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config_fields import Fields
from cacheblend_jax.model.family import Family
from cacheblend_jax.model.family_fields import (
    all_windows_but,
    gpt_oss_experts,
    mixtral_experts,
    no_windows,
    qwen_experts,
    qwen_windows,
    same_windows,
    smollm3_rotated,
    smollm3_windows,
    soft_cap,
    window_if_used,
)

# What other mixtures of experts have: groups of experts that are chosen first, experts for all tokens, other weights.
OTHER_ROUTERS = (
    *("n_group", "n_shared_experts", "shared_expert_intermediate_size", "routed_scaling_factor"),
    *("scoring_func", "moe_layer_freq"),
)
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama",
        defaults={"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
        windows=no_windows,
        biases=("attention_bias", "mlp_bias"),
    ),
    "MistralForCausalLM": Family(
        "mistral",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        windows=same_windows,
    ),
    "Qwen2ForCausalLM": Family("qwen2", defaults=QWEN_DEFAULTS, windows=qwen_windows, qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
        windows=qwen_windows,
        biases=("attention_bias",),
        qk_norm=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096},
        windows=window_if_used,
        biases=("attention_bias",),
        unsupported=OTHER_ROUTERS,
        qk_norm=True,
        experts=qwen_experts,
        own_keys=lambda config: {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token or None,
            "moe_intermediate_size": config.expert_size or None,
            "norm_topk_prob": config.experts_sum_to_one,
        },
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
        windows=same_windows,
        unsupported=OTHER_ROUTERS,
        experts=mixtral_experts,
        own_keys=lambda config: {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
        },
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        defaults={
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "sliding_window": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_parameters": GPT_OSS_ROPE,
            "attention_bias": True,
        },
        windows=all_windows_but(every=2),
        biases=("attention_bias",),
        unsupported=OTHER_ROUTERS,
        attention_sinks=True,
        experts=gpt_oss_experts,
        own_keys=lambda config: {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "swiglu_alpha": config.glu_alpha,
            "swiglu_limit": config.glu_limit,
        },
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        defaults={
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        windows=same_windows,
        states_scaled_positions=True,
        partial_rotary=True,
        rope_types={"su": "longrope", "yarn": "longrope"},
        own_keys=lambda config: {"original_max_position_embeddings": config.rope.original_max_positions},
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        defaults={"num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        windows=no_windows,
        biases=("attention_bias",),
        qk_norm=True,
        qk_norm_over_heads=True,
        pre_norms=False,
        post_norms=True,
    ),
    "GraniteForCausalLM": Family(
        "granite",
        defaults={"num_key_value_heads": None, "max_position_embeddings": 2048},
        windows=no_windows,
        biases=("attention_bias", "mlp_bias"),
        attention_scale=lambda fields: fields.number("attention_multiplier", 1.0),
        embedding_scale=lambda fields: fields.number("embedding_multiplier", 1.0),
        residual_scale=lambda fields: fields.number("residual_multiplier", 1.0),
        logits_scale=lambda fields: 1 / fields.number("logits_scaling", 1.0),
        own_keys=lambda config: {
            "attention_multiplier": config.attention_scale,
            "embedding_multiplier": config.embedding_scale,
            "residual_multiplier": config.residual_scale,
            "logits_scaling": 1 / config.logits_scale,
        },
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        defaults={
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        windows=smollm3_windows,
        biases=("attention_bias", "mlp_bias"),
        rotated=smollm3_rotated,
        own_keys=lambda config: {"no_rope_layers": [int(turns) for turns in config.rotated] or [1] * config.num_layers},
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        windows=all_windows_but(every=2),
        biases=("attention_bias",),
        unsupported=("use_bidirectional_attention",),
        activation_key="hidden_activation",
        norm_offset=1.0,
        post_norms=True,
        attention_scale=lambda fields: fields.integer("query_pre_attn_scalar") ** -0.5,
        attention_soft_cap=soft_cap("attn_logit_softcapping"),
        logits_soft_cap=soft_cap("final_logit_softcapping"),
        embedding_scale=lambda fields: fields.integer("hidden_size") ** 0.5,
        own_keys=lambda config: {
            "query_pre_attn_scalar": round(config.attention_scale**-2),
            "attn_logit_softcapping": config.attention_soft_cap,
            "final_logit_softcapping": config.logits_soft_cap,
        },
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        defaults={
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
        windows=all_windows_but(every=6, key="sliding_window_pattern"),
        biases=("attention_bias",),
        unsupported=("attn_logit_softcapping", "use_bidirectional_attention"),
        activation_key="hidden_activation",
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        ropes_by_type=True,
        states_scaled_positions=True,
        attention_scale=lambda fields: fields.integer("query_pre_attn_scalar") ** -0.5,
        logits_soft_cap=soft_cap("final_logit_softcapping"),
        embedding_scale=lambda fields: fields.integer("hidden_size") ** 0.5,
        own_keys=lambda config: {
            "query_pre_attn_scalar": round(config.attention_scale**-2),
            "final_logit_softcapping": config.logits_soft_cap,
        },
    ),
}
# Multimodal checkpoints whose text tower is a model of a family: its architecture, and their model_type.
MULTIMODAL = {"Gemma3ForConditionalGeneration": ("gemma3", "Gemma3ForCausalLM")}
# What such a configuration says for its text tower, too.
SHARED_KEYS = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings")


def family_of(fields: Fields) -> str:
    """Returns the architecture that a configuration names: a key of `FAMILIES`.

    Raises:
        CheckpointError: there is no such family; the supported ones are named.
    """
    named, model_type = fields.texts("architectures"), fields.text("model_type")
    by_type = {family.model_type: architecture for architecture, family in FAMILIES.items()}
    architecture = named[0] if named else by_type.get(model_type or "")
    if architecture not in FAMILIES:
        got = architecture or model_type or "none"
        raise CheckpointError(f"architecture {got!r} is not supported; supported: {', '.join(FAMILIES)}")
    return architecture


def text_tower(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the configuration of a multimodal checkpoint's text tower; any other configuration as it is.

    Args:
        prefix: stands before the keys in messages.
    """
    fields = Fields(raw, prefix)
    named, model_type = fields.texts("architectures"), fields.text("model_type")
    for multimodal, (its_type, architecture) in MULTIMODAL.items():
        if multimodal == named[0] if named else its_type == model_type:
            text = fields.nested("text_config") or Fields({})
            shared = {key: raw[key] for key in SHARED_KEYS if key in fields}
            return {**text.content, **shared, "architectures": [architecture]}
    return dict(raw)
