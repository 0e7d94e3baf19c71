"""Attention of scattered queries and KV blending for JAX, usable without `cacheblend_jax`."""

from pallas_kernels.attention.api import selective_attention
from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.blending.api import blend_kv
from pallas_kernels.blending.quantised import QuantisedKV, dequantised
from pallas_kernels.rotary import apply_rope
from pallas_kernels.soft_cap import soft_capped
from pallas_kernels.verdicts import use_verdicts

__all__ = [
    "QuantisedKV",
    "apply_rope",
    "attention_mass",
    "blend_kv",
    "dequantised",
    "selective_attention",
    "soft_capped",
    "use_verdicts",
]
