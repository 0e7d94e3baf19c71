"""The model named `"demo"`: a tiny checkpoint made on the spot with random weights, to try commands without a download.

It is untrained: its answers are noise. What it shows is real all the same: loading, stores, modes, times.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path
from safetensors.numpy import save_file

from cacheblend_jax.errors import CheckpointError

NOTICE = "the demo model is untrained (random weights): times and token counts are real, answers are noise"
VERSION = "demo-untrained-1"
SPECIAL_TOKENS = ("<s>", "</s>")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256 + len(SPECIAL_TOKENS),
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "dtype": "float32",
}


def demo_directory() -> Path:
    """Returns the demo checkpoint's directory in the user's cache; makes it on first use (about a second).

    Raises:
        CheckpointError: the user's cache directory cannot be written.
    """
    directory = user_cache_path("cacheblend-jax") / VERSION
    if (directory / "config.json").is_file():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its place and renamed, so that a killed or a second process leaves nothing half-made.
        making = Path(tempfile.mkdtemp(prefix=f".{VERSION}-", dir=directory.parent))
        write_demo_checkpoint(making)
        try:
            making.rename(directory)
        except OSError:
            shutil.rmtree(making)
            if not (directory / "config.json").is_file():
                raise
    except OSError as error:
        raise CheckpointError(f"the demo model cannot be made in {directory}: {error}; set XDG_CACHE_HOME") from error
    return directory


def write_demo_checkpoint(directory: Path) -> None:
    """Writes configuration, random weights (seeded) and a byte-level tokenizer in Hugging Face format."""
    save_file(_random_tensors(), directory / "model.safetensors", metadata={"format": "pt"})
    _byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    bos, eos = SPECIAL_TOKENS
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")


def _random_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    q_size = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    kv_size = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]

    def matrix(outputs: int, inputs: int, scale: float | None = None) -> np.ndarray:
        return (rng.standard_normal((outputs, inputs)) * (scale or inputs**-0.5)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(CONFIG["vocab_size"], hidden, 1.0),
        "model.norm.weight": np.full(hidden, 0.1, np.float32),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, np.float32)
    return tensors


def _byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer
