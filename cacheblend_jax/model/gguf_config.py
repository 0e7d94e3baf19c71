"""What a GGUF file's metadata says of the model, as a Hugging Face configuration, which is then checked like any."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cacheblend_jax.errors import CheckpointError, is_whole_number
from cacheblend_jax.model.config_fields import shown
from cacheblend_jax.model.gguf_file import GgufFile

ARCHITECTURES = {  # Mistral's files call themselves llama, and are computed alike
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",  # whose every fourth layer has no RoPE, there as here by default
}
MIXTURES = {"llama": "MixtralForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}  # where there are experts
REQUIRED = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Read where they stand; what they mean elsewhere is unset, or as transformers has it.
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "final_logit_softcapping": "final_logit_softcapping",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# What is said of routers that choose by a softmax over all experts, and have no experts for all tokens.
USUAL_ROUTER = {
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
}
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
# By what llama.cpp multiplies YaRN's own factor of attention, and what it does where these are absent.
YARN_MULTIPLIERS = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
TOKENIZER = "tokenizer.ggml."
# Tokens that end a turn, whatever the metadata says: as llama.cpp has it.
TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>"),
    *("<EOT>", "_<EOT>"),
)
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
LONGROPE_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # its scale of attention differs, which only its size tells
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_LENGTH = 1.0, 4.0, 8192  # of every published Llama 3.1, 3.2 and 3.3
LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window


def hugging_face_config(file: GgufFile, rope_factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the configuration of a file's model.

    Args:
        rope_factors: those of the tensors `ROPE_FACTORS` and `LONGROPE_FACTORS` that there are.

    Raises:
        CheckpointError: the architecture is unknown, or what is needed is missing or unsupported.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {shown(name)} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path}: the tensor {EMBEDDING} is missing")
    said = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    said = {key: _for_all_layers(value) for key, value in said.items()}
    for key in REQUIRED:
        if key not in said:
            raise CheckpointError(f"{file.path}: {name}.{key} is missing")
    if said.get("attention.causal", True) is not True:
        raise CheckpointError(f"{file.path}: {name}.attention.causal must be true: only decoders are supported")
    if name == "olmo2" and (window := said.get("attention.sliding_window", 0)) != 0:  # so Olmo 3's files are called
        raise CheckpointError(f"{file.path}: olmo2.attention.sliding_window {shown(window)} is not supported, only 0")
    has_experts = said.get("expert_count", 0) != 0
    has_biases = "blk.0.attn_output.bias" in file.tensors
    return {
        "architectures": [(MIXTURES if has_experts and name in MIXTURES else ARCHITECTURES)[name]],
        **{ours: said[key] for key, ours in REQUIRED.items()},
        **{ours: said[key] for key, ours in OPTIONAL.items() if key in said},
        **_heads(file, said, may_turn_a_part=name == "phi3"),
        **(_experts(file, name, said) if has_experts else {}),
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": HEAD not in file.tensors,
        "attention_bias": has_biases,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "eos_token_id": stop_ids(file),
        **(_query_scalar(said, GEMMA_27B_LAYERS[name]) if name in GEMMA_27B_LAYERS else {}),
        **_rope_keys(file, name, said, rope_factors),
    }


def _rope_keys(file: GgufFile, name: str, said: dict[str, Any], factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if name == "gemma3":
        return _gemma3_ropes(said)
    if name == "phi3":
        return _phi_keys(file, said, factors)
    return {"rope_scaling": _rope_scaling(file, said, factors.get(ROPE_FACTORS))}


def _experts(file: GgufFile, name: str, said: dict[str, Any]) -> dict[str, Any]:
    if name not in MIXTURES:
        raise CheckpointError(
            f"{file.path}: {shown(said['expert_count'])} experts are not supported in {name}; "
            f"supported: {', '.join(MIXTURES)}"
        )
    for key, usual in USUAL_ROUTER.items():
        if said.get(key, usual[0]) not in usual:
            raise CheckpointError(f"{file.path}: {name}.{key} {shown(said[key])} is not supported, only {usual[-1]}")
    keys = {ours: said[key] for key, ours in EXPERTS.items() if key in said}
    return keys | {"norm_topk_prob": said.get("expert_weights_norm", True)}  # llama.cpp takes it for granted


def stop_ids(file: GgufFile) -> list[int]:
    """Returns the tokens that end an answer."""
    said = [file.metadata.get(f"{TOKENIZER}{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = file.metadata.get(f"{TOKENIZER}tokens")
    ends = turn_ends(tokens) if isinstance(tokens, list) else []
    return [*(token for token in said if token is not None), *ends]


def turn_ends(tokens: list[str]) -> list[int]:
    """Returns the ids of the tokens of a vocabulary that end a turn, in whatever model."""
    return [number for number, token in enumerate(tokens) if token in TURN_ENDS]


def _for_all_layers(value: Any) -> Any:
    """What may differ between layers is stored as an array: one value where it does not."""
    if not isinstance(value, np.ndarray):
        return value
    return value[0].item() if value.size and (value == value[0]).all() else value.tolist()


def _heads(file: GgufFile, said: dict[str, Any], *, may_turn_a_part: bool) -> dict[str, Any]:
    """Returns the heads' dimension, and the share of it that RoPE turns."""
    hidden, heads = said["embedding_length"], said["attention.head_count"]
    if not is_whole_number(hidden, least=1) or not is_whole_number(heads, least=1):
        return {}  # refused by name when the configuration is read
    head_dim = said.get("attention.key_length", hidden // heads)
    if said.get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{file.path}: keys of {shown(head_dim)} and values of {shown(said['attention.value_length'])} dimensions "
            "are not supported; their dimensions must be the same"
        )
    turned = said.get("rope.dimension_count", head_dim)
    if may_turn_a_part and turned != head_dim and is_whole_number(turned, least=2, below=head_dim):
        return {"head_dim": head_dim, "partial_rotary_factor": turned / head_dim}
    if turned != head_dim:
        raise CheckpointError(
            f"{file.path}: RoPE over {shown(turned)} of {shown(head_dim)} dimensions is not supported, only over all"
        )
    return {"head_dim": head_dim}


def _gemma3_ropes(said: dict[str, Any]) -> dict[str, Any]:
    # Only the layers without a window are scaled.
    scaling = said.get("rope.scaling.type", "none")
    keys: dict[str, Any] = {"rope_local_base_freq": said.get("rope.freq_base_swa", LOCAL_THETA)}
    if scaling != "none":
        keys["rope_scaling"] = {"rope_type": scaling, "factor": said.get("rope.scaling.factor")}
    return keys


def _query_scalar(said: dict[str, Any], layers_of_27b: int) -> dict[str, Any]:
    hidden, heads, dim = said["embedding_length"], said["attention.head_count"], said.get("attention.key_length")
    if said["block_count"] == layers_of_27b and is_whole_number(hidden, least=1) and is_whole_number(heads, least=1):
        dim = hidden // heads
    return {} if dim is None else {"query_pre_attn_scalar": dim}


def _phi_keys(file: GgufFile, said: dict[str, Any], factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    keys: dict[str, Any] = {"sliding_window": said.get("attention.sliding_window") or None}
    if factors.keys().isdisjoint(LONGROPE_FACTORS.values()):
        return keys
    original, stated = said.get("rope.scaling.original_context_length"), said["context_length"]
    if not is_whole_number(original, least=2) or not is_whole_number(stated, least=1):
        raise CheckpointError(
            f"{file.path}: phi3.rope.scaling.original_context_length must be a whole number above 1, "
            f"got {shown(original)}"
        )
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    scaling |= {key: factors[name].tolist() for key, name in LONGROPE_FACTORS.items() if name in factors}
    implied = math.sqrt(1 + math.log(max(stated / original, 1)) / math.log(original))
    factor = said.get("rope.scaling.attn_factor", implied)
    if not isinstance(factor, float) or not math.isclose(factor, implied, rel_tol=1e-5):
        scaling["attention_factor"] = factor
    return keys | {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _rope_scaling(file: GgufFile, said: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any] | None:
    original = said.get("rope.scaling.original_context_length")
    if factors is not None:
        return _llama3_scaling(file, said, factors, original)
    kind = said.get("rope.scaling.type", "linear" if "rope.scale_linear" in said else "none")
    if kind == "none":
        return None
    for key, usual in YARN_MULTIPLIERS.items():
        if (value := said.get(f"rope.scaling.{key}", usual)) != usual:
            raise CheckpointError(f"{file.path}: rope.scaling.{key} {shown(value)} is not supported, only {usual:g}")
    scaling = {"rope_type": kind, "factor": said.get("rope.scaling.factor", said.get("rope.scale_linear"))}
    scaling |= {ours: said[f"rope.scaling.{key}"] for key, ours in YARN.items() if f"rope.scaling.{key}" in said}
    return scaling if original is None else scaling | {"original_max_position_embeddings": original}


def _llama3_scaling(file: GgufFile, said: dict[str, Any], factors: np.ndarray, original: Any) -> dict[str, Any] | None:
    """Finds the scaling whose factors are those stored: GGUF has no room for its parameters."""
    if (factors == 1).all():
        return None
    length = LLAMA3_LENGTH if original is None else original
    theta, factor = said.get("rope.freq_base", LOCAL_THETA), float(factors.max())
    if isinstance(theta, float) and theta > 1 and is_whole_number(length, least=1) and factor > 1:
        inverse = theta ** (np.arange(factors.size) / factors.size) / length * (2 * np.pi)  # wave lengths to `length`
        smooth = np.clip((1 / inverse - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(expected, factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": LLAMA3_LOW,
                "high_freq_factor": LLAMA3_HIGH,
                "original_max_position_embeddings": length,
            }
    raise CheckpointError(
        f"{file.path}: the factors in {ROPE_FACTORS} are not those of Llama 3 (frequencies from {LLAMA3_LOW:g} to "
        f"{LLAMA3_HIGH:g} times 1/{shown(length)}), and others are not supported"
    )
