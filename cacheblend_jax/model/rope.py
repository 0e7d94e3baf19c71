"""RoPE angles: inverse frequencies of every supported type, and the cosine and sine tables made from them."""

from __future__ import annotations

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.rope_config import LONGROPE, NO_ROPE, RopeConfig
from pallas_kernels.indexing import at_each, entry_of


@struct.dataclass
class Angles:
    """Cosines and sines of the angles that rotate some tokens, float32, for each RoPE in `ModelConfig.ropes`."""

    cos: Float[Array, "ropes tokens half"]
    sin: Float[Array, "ropes tokens half"]

    @property
    def num_tokens(self) -> int:
        """How many tokens they are of."""
        return self.cos.shape[1]

    def take(self, tokens: Int[Array, " taken"] | slice) -> Angles:
        """Returns the angles of some of the tokens."""
        return Angles(at_each(self.cos, (slice(None), tokens)), at_each(self.sin, (slice(None), tokens)))

    def of_layer(
        self, config: ModelConfig, index: Int[Array, ""] | int
    ) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
        """Returns the `cos` and `sin` of layer `index`, traced or not, as `apply_rope` takes them."""
        if len(config.ropes) == 1:  # no table is looked up where there is but one
            return self.cos[0], self.sin[0]
        rope = entry_of(jnp.asarray(config.rope_of_layer, jnp.int32), index)
        return entry_of(self.cos, rope), entry_of(self.sin, rope)


def inverse_frequencies(rope: RopeConfig, head_dim: int, divisors: tuple[float, ...] = ()) -> tuple[np.ndarray, float]:
    """Returns float32 `inv_freq [head_dim // 2]` and the attention factor by which cosine and sine are multiplied.

    Source: `modeling_rope_utils.py` of Hugging Face transformers 5; YaRN (arXiv 2309.00071) for `yarn`, LongRoPE (arXiv
    2402.13753) for `longrope`.

    Args:
        head_dim: how many dimensions are turned.
        divisors: of LongRoPE's frequencies.
    """
    if rope.type == NO_ROPE:
        return np.zeros(head_dim // 2, np.float32), 1.0
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.power(np.float32(rope.theta), exponent)).astype(np.float32)
    if rope.type == "linear":
        return (plain / np.float32(rope.factor)).astype(np.float32), 1.0
    if rope.type == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.type == "yarn":
        return _yarn(plain, rope, head_dim), _yarn_attention_factor(rope)
    if rope.type == LONGROPE:
        return (plain / np.asarray(divisors, np.float32)).astype(np.float32), _longrope_attention_factor(rope)
    return plain, 1.0


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    wavelength = 2 * math.pi / plain
    low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
    smooth = np.clip((rope.original_max_positions / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * plain / rope.factor + smooth * plain).astype(np.float32)


def _yarn(plain: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    interpolated = np.clip(ramp, 0.0, 1.0)
    return (plain / np.float32(rope.factor) * interpolated + plain * (1 - interpolated)).astype(np.float32)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


@lru_cache(maxsize=16)
def rope_tables(config: ModelConfig, num_positions: int) -> Angles:
    """Returns the angles of positions 0 … num_positions - 1, in tables `[ropes, num_positions, head_dim // 2]`.

    Angles are products of float32 position and float32 inverse frequency, as transformers computes them; they are
    made once on the host, so that fresh, cached and blended keys of every program agree.
    """
    positions = np.arange(num_positions, dtype=np.float32)[:, None]
    cos, sin = [], []
    for rope in config.ropes:
        turned = config.rotary_dim or config.head_dim
        frequencies, attention_factor = inverse_frequencies(rope, turned, config.rope_divisors)
        angles, factor = positions * frequencies, np.float32(attention_factor)
        others = ((0, 0), (0, (config.head_dim - turned) // 2))  # which keep what they are
        cos.append(np.pad(np.cos(angles) * factor, others, constant_values=1))
        sin.append(np.pad(np.sin(angles) * factor, others))
    with jax.ensure_compile_time_eval():  # the cache must hold arrays even when first called inside a trace
        return Angles(*jax.device_put((np.stack(cos), np.stack(sin))))  # which, unlike `jnp.asarray`, compiles nothing
