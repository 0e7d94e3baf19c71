"""Quantised checkpoints: recognised and named, instead of a report of tensors that are missing; all but one refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config_fields import Fields

# transformers' key, that of older compressed-tensors, and MLX's.
KEYS = ("quantization_config", "compression_config", "quantization")
# What the names of tensors end in that replace a weight, or come with it.
TENSORS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or INT8",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".scales": "MLX, or an unknown method",
}
LOADED = {"mxfp4": "GptOssForCausalLM"}  # by method, of which architecture
WAY_OUT = (
    "load the checkpoint that it was made from (float32, bfloat16 or float16 safetensors), or a GGUF file of the model"
)


def refuse_quantised_config(path: Path, raw: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where the configuration, read from `path`, states a quantisation that is not loaded.

    It is named.
    """
    fields = Fields(raw, f"{path}: ")
    for key in KEYS:
        stated = fields.nested(key)
        if stated is not None and stated.content:
            method = _method(stated)
            if LOADED.get(method) not in (fields.texts("architectures") or ()):
                raise _refusal(path, method)


def refuse_quantised_tensors(directory: Path, names: Iterable[str]) -> None:
    """Raises `CheckpointError` where the tensors' names are those of a quantisation that no configuration states."""
    for name in names:
        method = next((method for ending, method in TENSORS.items() if name.endswith(ending)), None)
        if method is not None:
            raise _refusal(directory, f"{method}, by the tensor {name!r}")


def _refusal(path: Path, method: str) -> CheckpointError:
    return CheckpointError(f"{path}: the weights are quantised ({method}), which is not supported; {WAY_OUT}")


def _method(stated: Fields) -> str:
    if method := stated.text("quant_method"):
        return method
    if stated.flag("load_in_4bit") or stated.flag("load_in_8bit"):
        return "bitsandbytes"
    return f"{stated.content['bits']} bits" if "bits" in stated else "unknown method"
