"""A context fitted to a model: embeddings that chunks are precomputed after, in place of a text."""

from __future__ import annotations

import hashlib
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


@dataclass(frozen=True, eq=False)
class FittedContext:
    """Embeddings for `Engine(context=…)`, which no token need have: `scripts/fit_context.py` fits them to a model.

    The idea is KV Packet's (arXiv 2604.13226): trained so that chunks precomputed after them are closest to what they
    would be in a prompt.

    Attributes:
        embeddings: as the first layer reads them; values that float16 has.
        weights_digest: of the model that they were fitted to.
    """

    embeddings: Float[np.ndarray, "tokens hidden"]
    weights_digest: str

    @classmethod
    def of(cls, model: Model, embeddings: jax.Array | np.ndarray) -> FittedContext:
        """Returns the context of these embeddings, fitted to a model."""
        return cls(np.asarray(embeddings).astype(np.float16).astype(np.float32), model.weights_digest)

    @cached_property
    def token_ids(self) -> Int[np.ndarray, " tokens"]:
        """Ids that stand for the embeddings in keys and records, each a hash of one: negative, as no token's is."""
        rows = self.embeddings.astype("<f4")
        hashes = [hashlib.sha256(row.tobytes()).digest()[:4] for row in rows]
        return np.asarray([int.from_bytes(each, "little") | 2**31 for each in hashes], np.uint32).view(np.int32)

    def fits(self, model: Model) -> bool:
        """Returns whether the context was fitted to a model, in whatever dtype it is."""
        return model.config.hidden_size == self.embeddings.shape[1] and model.weights_digest == self.weights_digest

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
        tensors = {"embeddings": self.embeddings.astype(np.float16)}
        try:
            save_file(tensors, path, {"format": FORMAT, "weights_digest": self.weights_digest})
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
                embeddings, metadata = file.get_tensor("embeddings"), file.metadata()
        except OSError as error:
            raise CacheBlendError(f"context {os.fspath(path)!r} cannot be read: {reason_and_remedy(error)}") from error
        except SafetensorError as error:
            raise CacheBlendError(f"context {os.fspath(path)!r} is not a fitted context: {error}") from error
        if (metadata or {}).get("format") != FORMAT:
            raise CacheBlendError(f"context {os.fspath(path)!r} is not a fitted context: it says nothing of its format")
        return cls(embeddings.astype(np.float32), metadata.get("weights_digest", ""))
