"""A context fitted to a model: embeddings that chunks are precomputed after, in place of a text."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.model.model import Model

FORMAT = "cacheblend_jax fitted context"
PROBED_TOKENS = 8  # evenly spaced in the vocabulary
TOLERANCE = 0.02  # relative, of their embeddings: the model may be loaded in another dtype


@dataclass(frozen=True, eq=False)
class FittedContext:
    """Embeddings for `Engine(context=…)`, which no token need have: `scripts/fit_context.py` fits them to a model.

    The idea is KV Packet's (arXiv 2604.13226): trained so that chunks precomputed after them are closest to what they
    would be in a prompt.

    Attributes:
        embeddings: as the first layer reads them; values that float16 has.
        probe: embeddings of a few tokens of the model that they were fitted to, by which it is recognised.
    """

    embeddings: Float[np.ndarray, "tokens hidden"]
    probe: Float[np.ndarray, "probed hidden"]

    @classmethod
    def of(cls, model: Model, embeddings: jax.Array | np.ndarray) -> FittedContext:
        """Returns the context of these embeddings, fitted to a model."""
        return cls(np.asarray(embeddings).astype(np.float16).astype(np.float32), _probe(model))

    @cached_property
    def token_ids(self) -> Int[np.ndarray, " tokens"]:
        """Ids that stand for the embeddings in keys and records, each a hash of one: negative, as no token's is."""
        rows = self.embeddings.astype("<f4")
        hashes = [hashlib.sha256(row.tobytes()).digest()[:4] for row in rows]
        return np.asarray([int.from_bytes(each, "little") | 2**31 for each in hashes], np.uint32).view(np.int32)

    def fits(self, model: Model) -> bool:
        """Returns whether the context was fitted to a model, by the embeddings of a few tokens."""
        if model.config.hidden_size != self.probe.shape[1]:
            return False
        return bool(np.abs(_probe(model) - self.probe).max() <= TOLERANCE * np.abs(self.probe).max())

    def check(self, model: Model) -> None:
        """Checks that the context was fitted to a model.

        Raises:
            CacheBlendError: it was fitted to another one.
        """
        if not self.fits(model):
            raise CacheBlendError(
                f"the context was fitted to another model than {model.name!r}; fit one to it with "
                "scripts/fit_context.py, or use a text"
            )

    def save(self, path: Path | str) -> None:
        """Writes the context to a safetensors file.

        Raises:
            CacheBlendError: the file cannot be written.
        """
        tensors = {"embeddings": self.embeddings.astype(np.float16), "probe": self.probe.astype(np.float16)}
        try:
            save_file(tensors, path, {"format": json.dumps(FORMAT)})
        except (OSError, SafetensorError) as error:
            raise CacheBlendError(f"context {os.fspath(path)!r} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path | str) -> FittedContext:
        """Reads a context that `save` wrote.

        Raises:
            CacheBlendError: the file cannot be read, or holds something else.
        """
        try:
            with safe_open(path, "numpy") as file:
                tensors = {name: file.get_tensor(name) for name in ("embeddings", "probe")}
        except OSError as error:
            raise CacheBlendError(f"context {os.fspath(path)!r} cannot be read: {reason_and_remedy(error)}") from error
        except SafetensorError as error:
            raise CacheBlendError(f"context {os.fspath(path)!r} is not a fitted context: {error}") from error
        return cls(*(tensors[name].astype(np.float32) for name in ("embeddings", "probe")))


def _probe(model: Model) -> np.ndarray:
    table = model.params.embedder["embedding"]
    rows = np.linspace(0, table.shape[0] - 1, PROBED_TOKENS).astype(np.int32)
    return np.asarray(table[rows]).astype(np.float32)
