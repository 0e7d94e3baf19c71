"""The tensors of a GGUF file under their Hugging Face names, in Hugging Face form, dequantised row by row."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from cacheblend_jax.errors import CheckpointError, one_line
from cacheblend_jax.model.fused_tensors import RowsAlone
from cacheblend_jax.model.gguf_config import EMBEDDING, HEAD, LONGROPE_FACTORS, ROPE_FACTORS
from cacheblend_jax.model.gguf_file import FLOATS, GgufFile, StoredTensor, dequantised
from cacheblend_jax.model.tensor_names import EMBEDDER_NAMES, layer_modules

LAYER_TENSOR = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)")
# The names of leaves and of layers' modules here, by GGUF's; `tensor_names` has Hugging Face's for them.
LEAVES = {EMBEDDING: "embedding", "output_norm.weight": "final_norm.scale", HEAD: "lm_head.kernel"}
MODULES = {
    "attn_norm": "input_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "post_attention_norm": "attention_out_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "post_ffw_norm": "mlp_out_norm",
    "ffn_gate_inp": "router",
    "ffn_gate_exps": "experts.gate_proj",
    "ffn_up_exps": "experts.up_proj",
    "ffn_down_exps": "experts.down_proj",
}
# Hugging Face's names of tensors that hold several projections in both forms, by architecture.
FUSED_MODULES = {"Phi3ForCausalLM": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}}


# Where llama.cpp's RoPE turns neighbouring dimensions, not halves as Hugging Face's does, rows are reordered.
NEIGHBOURS = ("LlamaForCausalLM", "MixtralForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM")


class NamedTensor(NamedTuple):
    """A stored tensor, and what makes it the one that Hugging Face's checkpoints hold.

    `heads` of 0 leaves rows in their order; `offset` is subtracted.
    """

    stored: StoredTensor
    heads: int = 0
    offset: float = 0.0


def named_tensors(file: GgufFile, config: dict[str, Any]) -> dict[str, NamedTensor]:
    """Returns the tensors by their Hugging Face names; one that has none keeps its own.

    Args:
        config: the model's configuration (`gguf_config`), checked.
    """
    architecture = config["architectures"][0]
    is_gemma = architecture.startswith("Gemma")
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config.get("num_key_value_heads", heads["attn_q"])
    theirs = layer_modules(architecture)
    modules = {module: theirs[ours] for module, ours in MODULES.items() if ours in theirs}
    modules |= FUSED_MODULES.get(architecture, {})
    named = {}
    for name, stored in file.tensors.items():
        if name in (ROPE_FACTORS, *LONGROPE_FACTORS.values()):
            continue
        match = LAYER_TENSOR.fullmatch(name)
        if match is None or match[2] not in modules:
            tensor = NamedTensor(stored, offset=1.0 if is_gemma and name == "output_norm.weight" else 0.0)
            named[EMBEDDER_NAMES[LEAVES[name]] if name in LEAVES else name] = tensor
            continue
        number, module, kind = match.groups()
        reordered = heads.get(module, 0) if architecture in NEIGHBOURS else 0
        tensor = NamedTensor(stored, reordered, 1.0 if is_gemma and module.endswith("norm") else 0.0)
        called = f"model.layers.{int(number)}.{modules[module]}.{kind}"
        if "{}" in called and len(stored.shape) == 3:
            named |= {called.format(i): NamedTensor(_of_expert(stored, i)) for i in range(stored.shape[0])}
        else:
            named[called] = tensor
    return named


def _of_expert(stored: StoredTensor, expert: int) -> StoredTensor:
    shape = stored.shape[1:]
    return stored._replace(shape=shape, offset=stored.offset + expert * math.prod(shape[:-1]) * stored.row_bytes)


class GgufTensors:
    """An open file's tensors, read as `safetensors.safe_open` reads them; to be used in a `with` statement."""

    def __init__(self, path: Path, tensors: dict[str, NamedTensor]) -> None:
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor.stored.path == path}
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise CheckpointError(f"{path} is no longer readable: {one_line(error)}") from error

    def __enter__(self) -> GgufTensors:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def keys(self) -> Iterable[str]:
        """Returns the tensors' names."""
        return self._tensors.keys()

    def get_slice(self, name: str) -> _Rows:
        """Returns a view of a tensor, which reads the rows that are taken from it."""
        return _Rows(self._tensors[name], self._file)


class _Rows(RowsAlone):
    def __init__(self, tensor: NamedTensor, file: FileIO) -> None:
        self._tensor, self._file = tensor, file

    def get_dtype(self) -> str:
        quantisation = self._tensor.stored.quantisation
        return quantisation if quantisation in FLOATS else "F32"

    def get_shape(self) -> list[int]:
        return list(self._tensor.stored.shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        stored, heads, offset = self._tensor
        chosen = np.arange(stored.shape[0]) if heads == 0 else _in_halves(stored.shape[0], heads)
        if len(stored.shape) == 1:  # one row in the file, each of its values a row here
            values = dequantised(stored, self._read(0, 1))[0][chosen[rows]]
        else:
            chosen = chosen[rows]
            first = int(chosen.min())
            content = self._read(first, int(chosen.max()) + 1)
            content = content if heads == 0 else content[chosen - first]
            values = dequantised(stored, content).reshape(-1, *stored.shape[1:])
        return values - np.asarray(offset, values.dtype) if offset else values

    def _read(self, first: int, end: int) -> np.ndarray:
        """Reads rows into memory of their own: pages of a memory map would count as ours besides."""
        stored = self._tensor.stored
        rows = math.prod(stored.shape[1:-1])  # of more than two dimensions, a row here is several there
        content = np.empty(((end - first) * rows, stored.row_bytes), np.uint8)
        self._file.seek(stored.offset + first * rows * stored.row_bytes)
        if self._file.readinto(content.reshape(-1).data) != content.nbytes:
            raise CheckpointError(f"{stored.path} was cut off while it was read")
        return content


def _in_halves(rows: int, heads: int) -> np.ndarray:
    """Returns where each row lies that llama.cpp stores in pairs: within a head, a row of each half in turn."""
    if heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{rows} rows of queries or keys are no multiple of {heads} heads of even dimension")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
