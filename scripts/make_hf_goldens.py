"""Makes tiny checkpoints of every supported family, with logits and greedy continuations by transformers + torch.

    python scripts/make_hf_goldens.py [--out tests/data/hf] [case ...]

Needs torch. Goldens are computed in float32 from the bf16 weights that the checkpoint stores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

NUM_TOKENS, NUM_GREEDY = 48, 12
ROWS = (16, 47)  # the fixtures keep the logits of these tokens
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# A case's place is its seed: new ones come last.
CASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama2": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama3": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama_bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama_linear": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama_yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "mistral": (MistralConfig, {"sliding_window": 12}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}),
    "qwen2_full": (Qwen2Config, {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3_yarn_bias": (
        Qwen3Config,
        {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 10,
            "sliding_window": 12,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "granite": (
        GraniteConfig,
        {
            "attention_multiplier": 0.1875,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.375,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (Phi3Config, {"sliding_window": 12, "pad_token_id": 0}),
    "phi3_longrope": (
        Phi3Config,
        {
            "hidden_size": 64,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
            },
        },
    ),
    "smollm3": (SmolLM3Config, {"pad_token_id": 0}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
        },
    ),
    "mixtral": (
        MixtralConfig,
        {
            "num_hidden_layers": 3,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 10,
            "sliding_window": 12,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "swiglu_limit": 1.5,
            "rope_parameters": YARN | {"factor": 8.0, "truncate": False},
        },
    ),
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|end|>{{ message['content'] | trim }}"
    "<|turn|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)


def build_model(case: str) -> torch.nn.Module:
    """Returns the case's seeded model: float32, weights rounded to bf16, no parameter at a neutral value."""
    config_class, options = CASES[case]
    config = config_class(**(SHAPE | options), attn_implementation="eager")
    torch.manual_seed(list(CASES).index(case))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name
            noise = torch.randn(parameter.shape) * (0.2 if is_norm else 0.25)
            neutral = is_norm and not config.model_type.startswith("gemma")  # whose norms add one
            parameter.copy_((noise + neutral).to(torch.bfloat16).to(torch.float32))
    return model


@torch.no_grad()
def golden_outputs(model: torch.nn.Module, token_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 logits `[tokens, vocab]` and the int32 greedy continuation of `NUM_GREEDY` tokens."""
    ids = torch.tensor(token_ids[None].astype(np.int64))
    logits = model(ids, use_cache=False).logits[0].numpy()
    for _ in range(NUM_GREEDY):
        following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    return logits, ids[0, len(token_ids) :].numpy().astype(np.int32)


def write_case(case: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model = build_model(case)
    token_ids = np.random.default_rng(list(CASES).index(case)).integers(3, 160, NUM_TOKENS).astype(np.int32)
    logits, greedy = golden_outputs(model, token_ids)
    np.savez(directory / "golden.npz", token_ids=token_ids, logits=logits[list(ROWS)], greedy=greedy)
    shard = "20KB" if case == "llama3" else "1GB"
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=shard)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if case == "llama3":
        write_tokenizer(directory)
    if case == "llama_linear":
        write_old_style_config(directory / "config.json")


ROPE_CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama-3.1": LLAMA3_ROPE | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192},
    "llama-3.2": LLAMA3_ROPE | {"rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
    "qwen2.5-yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0, "factor": 40.0, "truncate": False},
}


def write_rope(path: Path) -> None:
    """Writes the inverse frequencies (head_dim 128) and attention factors of published RoPE settings."""
    arrays = {}
    for name, parameters in ROPE_CASES.items():
        config = LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=dict(parameters))
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
        arrays |= {f"{name}/frequencies": frequencies.numpy(), f"{name}/factor": np.float64(factor)}
    np.savez(path, **arrays)
    path.with_suffix(".json").write_text(json.dumps(ROPE_CASES, indent=1) + "\n")


def write_old_style_config(path: Path) -> None:
    """Rewrites a configuration as transformers 4 wrote it."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "linear", "factor": rope["factor"]}}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_tokenizer(directory: Path) -> None:
    """Writes a character-level tokenizer over printable ASCII, with a chat template."""
    special = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>", "<|turn|>"]
    vocabulary = {token: i for i, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/data/hf"))
    parser.add_argument("cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    for case in arguments.cases:
        write_case(case, arguments.out / case)
    write_rope(arguments.out.parent / "rope.npz")


if __name__ == "__main__":
    main()
