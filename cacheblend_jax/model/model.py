"""A loaded model: configuration, parameters and tokenizer, with the fingerprint that ties stored KV to its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.transformer import Params, init_params
from cacheblend_jax.programs import ProgramCache


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder ready to run. `tokenizer` is `None` where the checkpoint has none: then prompts are token ids."""

    config: ModelConfig
    params: Params
    tokenizer: Any = None
    name: str = ""
    stop_token_ids: tuple[int, ...] = ()
    directory: Path | None = None  # the checkpoint's, if it has one

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over configuration, parameters and tokenizer: stored KV is valid for them alone."""
        digest = hashlib.sha256()
        # The check layer says where HKVD tokens are chosen: stand-alone KV does not depend on it.
        shape = {name: value for name, value in asdict(self.config).items() if name != "check_layer"}
        parts = [json.dumps(shape, sort_keys=True).encode(), _tokenizer_bytes(self.tokenizer)]
        leaves, treedef = jax.tree.flatten(self.params)
        parts += [str(treedef).encode(), np.asarray(jax.device_get([_bits_digest(leaf) for leaf in leaves])).tobytes()]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    @cached_property
    def programs(self) -> ProgramCache:
        """What was compiled for this model: shared by all its engines."""
        return ProgramCache(self.platform)

    @property
    def placement(self) -> jax.sharding.Sharding:
        """Where what is not a parameter goes: the parameters' device, or all of their mesh."""
        sharding = jax.tree.leaves(self.params)[0].sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.P())
        return sharding

    @property
    def platform(self) -> str:
        """What the parameters live on: `"cpu"`, `"gpu"` or `"tpu"`."""
        device: Any = next(iter(self.placement.device_set))
        return device.platform


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """Returns a model with random weights, drawn on the device: for benchmarks and tests of shape and speed."""
    params = jax.jit(partial(init_params, config=config))(jax.random.key(seed))
    return Model(config, params, name="random")


def _tokenizer_bytes(tokenizer: Any) -> bytes:
    if tokenizer is None:
        return b""
    vocabulary = sorted(tokenizer.get_vocab().items())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.dumps(vocabulary).encode() + (backend.to_str().encode() if backend is not None else b"")


@jax.jit
def _bits_digest(leaf: jax.Array) -> jax.Array:
    """A position-dependent 4 x 32-bit digest of an array's bits, computed where the array lives.

    Every element enters two multiply-mixed sums, once by value and once with its place; this guards against mixing
    models up, not against an adversary, who could replace the stored KV itself.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf.reshape(-1), unsigned).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, bits.size)

    def mixed(x: jax.Array, odd: int) -> jax.Array:
        x = (x ^ (x >> 16)) * jnp.uint32(odd)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    words = [mixed(bits + place * jnp.uint32(odd), odd) for odd in (0x7FEB352D, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)]
    return jnp.stack([word.sum(dtype=jnp.uint32) for word in words])
