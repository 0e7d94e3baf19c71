"""Tiny GGUF files, written with the package's own writer from models in Hugging Face form."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

FFN = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
MIXTRALS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
EXPERT = re.compile(r"\.experts\.(\d+)\.")
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{f"mlp.{name}": theirs for name, theirs in FFN.items()},
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GEMMA = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OLMO = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
MIXTURE = NAMES | {
    **{"mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp"},
    **{f"mlp.experts.{name}": f"{theirs}_exps" for name, theirs in FFN.items()},
    **{f"block_sparse_moe.experts.{w}": f"{FFN[name]}_exps" for w, name in MIXTRALS.items()},
}
PHI = NAMES | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
OTHER_NAMES = {"gemma2": GEMMA, "gemma3": GEMMA, "olmo2": OLMO, "llama": MIXTURE, "qwen3moe": MIXTURE, "phi3": PHI}
GRANITES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
WORDS = ["the store keeps 1234 checksums in its index", "naïve 日本語 text, and don't you forget", "one two  three\n\n"]


def stored_name(name: str, architecture: str) -> str:
    """The name of a Hugging Face tensor in a GGUF file."""
    module, kind = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    number, module = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{OTHER_NAMES.get(architecture, NAMES)[module]}.{kind}"


def stored_form(name: str, tensor: np.ndarray, architecture: str, heads: dict[str, int]) -> np.ndarray:
    """A tensor as llama.cpp's converter stores it."""
    tensor = np.asarray(tensor, np.float32)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return tensor + 1
    count = next((count for end, count in heads.items() if end in name and "norm" not in name), 0)
    if architecture not in ("llama", "granite", "smollm3") or not count:
        return tensor
    halves = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def metadata_of(config: dict[str, Any], architecture: str, head_dim: int) -> dict[str, Any]:
    """What the converter says of a Hugging Face configuration."""
    return {
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.key_length": head_dim,
        f"{architecture}.attention.value_length": head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }


def byte_level_tokenizer() -> Tokenizer:
    """A tiny byte-level BPE, trained on a few words, with SmolLM's splitting."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 4, trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str = "smollm") -> dict[str, Any]:
    """What the converter says of a byte-level BPE whose first three tokens are special."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=lambda token: model["vocab"][token])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    quantisations: dict[str, str] | None = None,
) -> Path:
    """Writes a file; tensors named in `quantisations` are quantised."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        kind = (quantisations or {}).get(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        else:
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE parameters of a configuration of transformers 4 or 5."""
    old = config.get("rope_scaling") or {}
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], "rope_type": old["type"], **old}
    return rope.get("full_attention", rope)  # Gemma's other layers have a RoPE that the format takes for granted


def rope_metadata(rope: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What the converter says of RoPE; `rope_factors` is the rest of it for Llama 3."""
    said = {f"{architecture}.rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        said[f"{architecture}.rope.scaling.type"] = rope["rope_type"]
        said[f"{architecture}.rope.scaling.factor"] = float(rope["factor"])
    if "original_max_position_embeddings" in rope:
        key = f"{architecture}.rope.scaling.original_context_length"
        said[key] = rope["original_max_position_embeddings"]
    return said


def rope_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """By what Llama 3's scaling divides each frequency: the converter's loop."""
    factors = []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for place in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (place / head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            ratio = rope["original_max_position_embeddings"] / wavelength
            smooth = (ratio - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)


def with_experts_stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a layer's experts as one, in their order; others as they are."""
    stacked, experts = {}, {}
    for name, tensor in tensors.items():
        if match := EXPERT.search(name):
            experts.setdefault(EXPERT.sub(".experts.", name), {})[int(match[1])] = tensor
        else:
            stacked[name] = tensor
    return stacked | {name: np.stack([of[number] for number in sorted(of)]) for name, of in experts.items()}


def mixture_metadata(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What the converter says of experts."""
    said = {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
    if "moe_intermediate_size" in config:
        said["expert_feed_forward_length"] = config["moe_intermediate_size"]
    return {f"{architecture}.{key}": value for key, value in said.items()}


def phi_metadata(config: dict[str, Any], rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """What the converter says of Phi's configurations."""
    original, stated = config["original_max_position_embeddings"], config["max_position_embeddings"]
    said = {"attention.sliding_window": config["sliding_window"] or 0, "rope.scaling.original_context_length": original}
    said["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if "long_factor" in rope:
        said["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(stated / original) / math.log(original))
    return {f"phi3.{key}": value for key, value in said.items()}


def from_hugging_face(
    directory: Path, path: Path, architecture: str, kind_of: dict[str, str] | None = None, **metadata: Any
) -> Path:
    """Converts a checkpoint as llama.cpp's converter does; `kind_of` quantises tensors by the end of their name."""
    config = json.loads((directory / "config.json").read_text())
    head_dim = config["head_dim"] if config.get("head_dim") else config["hidden_size"] // config["num_attention_heads"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors, kinds = {}, {}
    source: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        source |= load_file(file)
    source = with_experts_stacked(source)
    for name, tensor in source.items():
        stored = stored_name(name, architecture)
        tensors[stored] = stored_form(name, tensor, architecture, heads)
        if kind := next((kind for end, kind in (kind_of or {}).items() if stored.endswith(end)), None):
            kinds[stored] = kind
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_factors(rope, head_dim)
    said = metadata_of(config, architecture, head_dim)
    said |= rope_metadata(rope, architecture)
    if architecture == "gemma2":
        said["gemma2.attention.sliding_window"] = config["sliding_window"]
        said |= {f"gemma2.{key}": config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if architecture == "gemma3":
        said["gemma3.attention.sliding_window"] = config["sliding_window"]
        said["gemma3.attention.sliding_window_pattern"] = config["sliding_window_pattern"]
    if "num_local_experts" in config:
        said |= mixture_metadata(config, architecture)
    if architecture == "phi3":
        said |= phi_metadata(config, rope, head_dim)
        for name in ("long", "short"):
            if f"{name}_factor" in rope:
                tensors[f"rope_factors_{name}.weight"] = np.asarray(rope[f"{name}_factor"], np.float32)
    if architecture == "granite":
        said |= {f"granite.{theirs}": float(config[ours]) for theirs, ours in GRANITES.items()}
    return write_gguf(path, architecture, said | metadata, tensors, kinds)
