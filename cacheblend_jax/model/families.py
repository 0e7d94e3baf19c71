"""The supported model families: for each, what its name says that its configurations leave out.

To add a family is to add an entry here. What one needs that no other has had becomes an option of `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config_fields import Fields

LAYER_TYPES = ("full_attention", "sliding_attention")
Windows = tuple[int | None, ...]


@dataclass(frozen=True)
class Family:
    """How the configurations of a family are to be read, and how its layer differs from Llama's.

    Attributes:
        model_type: transformers' name of the family.
        defaults: what transformers takes for absent keys, where families differ. Shapes are among them only where
            published checkpoints leave them out; any other checkpoint that doesn't state them is refused.
        windows: each layer's sliding window, given the number of layers.
        biases: those of the keys `attention_bias` and `mlp_bias` that the family's layers read.
        unsupported: keys which, unless null or false, ask for what no layer here computes.
        activation_key: under which key the activation stands.
        qkv_bias: whether the projections to queries, keys and values always have a bias.
        qk_norm: whether queries and keys are normalised.
        norm_offset: what norms add to their weight.
        pre_norms: whether what attention and MLP read is normalised.
        post_norms: whether what attention and MLP return is normalised.
        qk_norm_over_heads: whether queries, and keys, of all heads are normalised together.
        ropes_by_type: whether layers with a window have a RoPE of their own.
        states_scaled_positions: whether `max_position_embeddings` counts RoPE scaling of any type.
        partial_rotary: whether RoPE may turn a part of each head alone.
        rope_types: other names of types of RoPE.
        rotated: whether each layer has RoPE, given the number of layers; an empty tuple: all have.
        attention_scale: the factor of attention's scores; `None` for `head_dim ** -0.5`.
        attention_soft_cap, logits_soft_cap, attention_sinks: as in `ModelConfig`.
        embedding_scale, residual_scale, logits_scale: as in `ModelConfig`.
        experts: what `ModelConfig` is told of experts, given the number of layers.
        own_keys: what `ModelConfig.to_hugging_face` writes that other families' configurations do not have.
    """

    model_type: str
    defaults: Mapping[str, Any]
    windows: Callable[[Fields, int], Windows]
    biases: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    activation_key: str = "hidden_act"
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    ropes_by_type: bool = False
    states_scaled_positions: bool = False
    partial_rotary: bool = False
    rope_types: Mapping[str, str] | None = None
    rotated: Callable[[Fields, int], tuple[bool, ...]] = lambda fields, num_layers: ()
    attention_scale: Callable[[Fields], float | None] = lambda fields: None
    attention_soft_cap: Callable[[Fields], float | None] = lambda fields: None
    logits_soft_cap: Callable[[Fields], float | None] = lambda fields: None
    attention_sinks: bool = False
    embedding_scale: Callable[[Fields], float] = lambda fields: 1.0
    residual_scale: Callable[[Fields], float] = lambda fields: 1.0
    logits_scale: Callable[[Fields], float] = lambda fields: 1.0
    experts: Callable[[Fields, int], dict[str, Any]] = lambda fields, num_layers: {}
    own_keys: Callable[[Any], dict[str, Any]] = lambda config: {}


def _no_windows(_: Fields, num_layers: int) -> Windows:
    return (None,) * num_layers


def _same_windows(fields: Fields, num_layers: int) -> Windows:
    """One window for all layers, whatever `layer_types` says; an explicit null means none."""
    return ((fields.integer("sliding_window") if "sliding_window" in fields else None),) * num_layers


def _qwen_windows(fields: Fields, num_layers: int) -> Windows:
    return _windows_if_used(fields, num_layers, lambda layer: layer >= fields.integer("max_window_layers", 28))


def _all_windows_but(every: int) -> Callable[[Fields, int], Windows]:
    """All layers have the window but every so many-th, unless the configuration says otherwise."""

    def windows(fields: Fields, num_layers: int) -> Windows:
        pattern = fields.integer("sliding_window_pattern", every)
        return _windows_by_type(fields, num_layers, lambda layer: (layer + 1) % pattern)

    return windows


def _soft_cap(key: str) -> Callable[[Fields], float | None]:
    return lambda fields: fields.number(key, 0.0) if key in fields else None


def _windows_if_used(fields: Fields, num_layers: int, slides: Callable[[int], int]) -> Windows:
    """As `_windows_by_type`, where the configuration says that windows are used."""
    if not fields.flag("use_sliding_window") or "sliding_window" not in fields:
        return (None,) * num_layers
    return _windows_by_type(fields, num_layers, slides)


def _windows_by_type(fields: Fields, num_layers: int, slides: Callable[[int], int]) -> Windows:
    """Reads `layer_types`; where there are none, the layers for which `slides` is true have the window."""
    kinds = fields.texts("layer_types") or [LAYER_TYPES[bool(slides(layer))] for layer in range(num_layers)]
    if unknown := set(kinds) - set(LAYER_TYPES):
        raise CheckpointError(f"layer type {min(unknown)!r} is not supported; supported: {', '.join(LAYER_TYPES)}")
    is_read = "sliding_window" in fields or "sliding_attention" in kinds
    window = fields.integer("sliding_window") if is_read else None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _smollm3_rotated(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    if (switches := fields.switches("no_rope_layers")) is not None:  # 1 where a layer has RoPE, whatever the name says
        return tuple(switches[:num_layers])
    interval = fields.integer("no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))


def _smollm3_windows(fields: Fields, num_layers: int) -> Windows:
    rotated = _smollm3_rotated(fields, num_layers)
    return _windows_if_used(fields, num_layers, lambda layer: not rotated[layer])


def _window_if_used(fields: Fields, num_layers: int) -> Windows:
    return _windows_if_used(Fields({**fields.content, "layer_types": None}), num_layers, lambda layer: True)


def _num_experts(fields: Fields, default: int) -> int:
    """Reads one of the key's two names: transformers 5 writes the second, whatever the family."""
    return fields.integer("num_experts" if "num_experts" in fields else "num_local_experts", default)


def _qwen_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    num_experts, step = _num_experts(fields, 128), fields.integer("decoder_sparse_step", 1)
    dense = set(fields.layers("mlp_only_layers"))
    sparse = [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0]
    if not num_experts or not sparse:
        return {}
    if len(sparse) < num_layers:
        key = "mlp_only_layers" if dense else "decoder_sparse_step"
        raise fields.wrong(key, "such that all layers have experts, or none", fields.content[key])
    return {
        "num_experts": num_experts,
        "experts_per_token": fields.integer("num_experts_per_tok", 8),
        "expert_size": fields.integer("moe_intermediate_size", 768),
        "experts_sum_to_one": fields.flag("norm_topk_prob"),
    }


def _mixtral_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {
        "num_experts": _num_experts(fields, 8),
        "experts_per_token": fields.integer("num_experts_per_tok", 2),
        "expert_size": fields.integer("intermediate_size"),
        "experts_sum_to_one": True,
    }


def _gpt_oss_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    return {
        "num_experts": _num_experts(fields, 128),
        "experts_per_token": fields.integer("num_experts_per_tok", 4),
        "expert_size": fields.integer("intermediate_size"),
        "experts_sum_to_one": True,  # a softmax over the chosen ones alone
        "expert_bias": True,
        "glu_alpha": fields.number("swiglu_alpha", 1.702),
        "glu_limit": fields.number("swiglu_limit", 7.0),
    }


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
        windows=_no_windows,
        biases=("attention_bias", "mlp_bias"),
    ),
    "MistralForCausalLM": Family(
        "mistral",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        windows=_same_windows,
    ),
    "Qwen2ForCausalLM": Family("qwen2", defaults=QWEN_DEFAULTS, windows=_qwen_windows, qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
        windows=_qwen_windows,
        biases=("attention_bias",),
        qk_norm=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "sliding_window": 4096},
        windows=_window_if_used,
        biases=("attention_bias",),
        unsupported=OTHER_ROUTERS,
        qk_norm=True,
        experts=_qwen_experts,
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
        windows=_same_windows,
        unsupported=OTHER_ROUTERS,
        experts=_mixtral_experts,
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
        windows=_all_windows_but(every=2),
        biases=("attention_bias",),
        unsupported=OTHER_ROUTERS,
        attention_sinks=True,
        experts=_gpt_oss_experts,
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
        windows=_same_windows,
        states_scaled_positions=True,
        partial_rotary=True,
        rope_types={"su": "longrope", "yarn": "longrope"},
        own_keys=lambda config: {"original_max_position_embeddings": config.rope.original_max_positions},
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        defaults={"num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        windows=_no_windows,
        biases=("attention_bias",),
        qk_norm=True,
        qk_norm_over_heads=True,
        pre_norms=False,
        post_norms=True,
    ),
    "GraniteForCausalLM": Family(
        "granite",
        defaults={"num_key_value_heads": None, "max_position_embeddings": 2048},
        windows=_no_windows,
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
        windows=_smollm3_windows,
        biases=("attention_bias", "mlp_bias"),
        rotated=_smollm3_rotated,
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
        windows=_all_windows_but(every=2),
        biases=("attention_bias",),
        unsupported=("use_bidirectional_attention",),
        activation_key="hidden_activation",
        norm_offset=1.0,
        post_norms=True,
        attention_scale=lambda fields: fields.integer("query_pre_attn_scalar") ** -0.5,
        attention_soft_cap=_soft_cap("attn_logit_softcapping"),
        logits_soft_cap=_soft_cap("final_logit_softcapping"),
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
        windows=_all_windows_but(every=6),
        biases=("attention_bias",),
        unsupported=("attn_logit_softcapping", "use_bidirectional_attention"),
        activation_key="hidden_activation",
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        ropes_by_type=True,
        states_scaled_positions=True,
        attention_scale=lambda fields: fields.integer("query_pre_attn_scalar") ** -0.5,
        logits_soft_cap=_soft_cap("final_logit_softcapping"),
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
