"""The embedder: what surrounds a model's layers, from token ids to hidden states and from those to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.projection import linear, multiplied
from cacheblend_jax.model.rms_norm import RMSNorm
from pallas_kernels import soft_capped
from pallas_kernels.partition import constrained


class Embedder(nnx.Module):
    """What surrounds the layers: token embedding, final norm, and the projection to logits (tied or not)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.embedding = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (config.vocab_size, config.hidden_size), dtype),
            out_sharding=("vocab", None),
            eager_sharding=False,
        )
        self.embedding_scale, self.logits_scale = config.embedding_scale, config.logits_scale
        self.logits_soft_cap = config.logits_soft_cap
        self.final_norm = RMSNorm(config, config.hidden_size)
        if config.tied_embeddings:
            self.lm_head = None
        else:
            axes = None, "vocab"
            self.lm_head = linear(config, config.hidden_size, config.vocab_size, bias=False, axes=axes, rngs=rngs)

    def embed(self, token_ids: Int[Array, " tokens"]) -> Float[Array, "tokens hidden"]:
        """Looks up the tokens' embeddings, and scales them."""
        embedded = constrained(self.embedding[...][token_ids], "rows")
        return embedded * jnp.asarray(self.embedding_scale, embedded.dtype)  # rounded first, as in transformers

    def logits(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """Returns float32 next-token logits."""
        with jax.named_scope("logits"):
            normed = self.final_norm(hidden)
            kernel = self.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
            logits = multiplied(lambda x: jnp.matmul(x, kernel, preferred_element_type=jnp.float32), normed)
            logits = constrained(logits, "rows", "vocab")  # XLA would gather the matrix, not the logits
            logits = logits if self.logits_scale == 1 else logits * self.logits_scale
            return constrained(soft_capped(logits, self.logits_soft_cap), "rows")
