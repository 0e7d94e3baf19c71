"""A GGUF file as a checkpoint: the configuration, tensors and tokenizer that `load_model` asks one for."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config_fields import Fields
from cacheblend_jax.model.gguf_config import EMBEDDING, LONGROPE_FACTORS, ROPE_FACTORS, hugging_face_config
from cacheblend_jax.model.gguf_file import FLOATS, GgufFile, StoredTensor, read_gguf
from cacheblend_jax.model.gguf_tensors import GgufTensors, NamedTensor, named_tensors
from cacheblend_jax.model.gguf_tokenizer import gguf_tokenizer

MAX_ROPE_FACTORS = 2**11  # half of the longest head


class GgufCheckpoint:
    """A model in a GGUF file, or in all parts of one.

    Raises:
        CheckpointError: a file is missing, damaged, or holds what isn't supported.
    """

    defaults_file: Path | None = None  # what lies beside a GGUF file may belong to another model

    def __init__(self, path: Path) -> None:
        self.location = self.config_location = path
        self.directory = path.absolute().parent
        self._file: GgufFile = read_gguf(path.absolute())

    @property
    def is_quantised(self) -> bool:
        """Whether tensors are dequantised while they are read."""
        return any(tensor.quantisation not in FLOATS for tensor in self._file.tensors.values())

    def config(self) -> dict[str, Any]:
        """Returns the configuration in Hugging Face form."""
        return self._config

    def tensor_files(self) -> dict[str, Path]:
        """Returns the file of every tensor, by its Hugging Face name."""
        return {name: tensor.stored.path for name, tensor in self._tensors.items()}

    def open_tensors(self, path: Path) -> GgufTensors:
        """Opens the tensors of one file, to be used in a `with` statement."""
        return GgufTensors(path, self._tensors)

    def tokenizer(self) -> Any:
        """Returns the tokenizer; `None` where the file has none."""
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        rows = self._file.tensors[EMBEDDING].shape[0]
        if isinstance(tokens, list) and len(tokens) > rows:
            raise CheckpointError(f"{self.location}: {len(tokens)} tokens, but {rows} rows of embeddings")
        return gguf_tokenizer(self._file)

    def stop_token_ids(self) -> set[int]:
        """Returns every token that ends an answer."""
        return set(Fields(self._config, f"{self.location}: ").token_ids("eos_token_id"))

    @cached_property
    def _config(self) -> dict[str, Any]:
        return hugging_face_config(self._file, self._rope_factors())

    @cached_property
    def _tensors(self) -> dict[str, NamedTensor]:
        return named_tensors(self._file, self._config)

    def _rope_factors(self) -> dict[str, np.ndarray]:
        names = (ROPE_FACTORS, *LONGROPE_FACTORS.values())
        return {name: self._factors(name, self._file.tensors[name]) for name in names if name in self._file.tensors}

    def _factors(self, name: str, stored: StoredTensor) -> np.ndarray:
        if len(stored.shape) != 1 or stored.shape[0] > MAX_ROPE_FACTORS:
            raise CheckpointError(f"{self.location}: {name} has the shape {list(stored.shape)}")
        with GgufTensors(stored.path, {name: NamedTensor(stored)}) as tensors:
            return tensors.get_slice(name)[:].astype(np.float64)
