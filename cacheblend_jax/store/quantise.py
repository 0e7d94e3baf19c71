"""Quantises KV to one byte a value when it is stored: one scale per token and KV head, for K and for V each."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from cacheblend_jax.errors import CacheBlendError

Values = Float[np.ndarray, "layers tokens kv_heads head_dim"]
Offset = Float[np.ndarray, "layers kv_heads head_dim"]
INT8, FLOAT8 = "int8", "float8_e4m3fn"
NOT_QUANTISED = "none"  # in place of a dtype, where one has to be named
LARGEST_CODES = {INT8: 127.0, FLOAT8: 448.0}
# As many bytes as float16, with the range of float32: float16 has no scale for a row of 1e-6, nor for one of 1e7. Its
# coarser steps cost nothing, since codes are computed from the rounded scale.
SCALES = np.dtype(ml_dtypes.bfloat16)


class QuantisedRows(NamedTuple):
    """K, or V, as stored: `codes * scales + offset`.

    Attributes:
        scales: of each token and KV head, bfloat16.
        offset: what was subtracted from all tokens' values first; `None` for nothing.
    """

    codes: Shaped[np.ndarray, "*layers tokens kv_heads head_dim"]
    scales: Float[np.ndarray, "*layers tokens kv_heads"]
    offset: Float[np.ndarray, "*layers kv_heads head_dim"] | None = None

    def dequantised(self, dtype: np.dtype) -> Float[np.ndarray, "*layers tokens kv_heads head_dim"]:
        """Returns the values, rounded once: to the bit what `pallas_kernels.blend_kv` makes of them."""
        values = self.codes.astype(np.float32) * self.scales.astype(np.float32)[..., None]
        if self.offset is not None:
            values += self.offset.astype(np.float32)[..., None, :, :]
        return values.astype(dtype)


class Scales(NamedTuple):
    """What makes K and V of an entry's codes.

    Attributes:
        dtype: of the values.
        k, v: see `QuantisedRows`; on the host, or on a device.
    """

    dtype: str
    k: Float[np.ndarray, "layers tokens kv_heads"]
    v: Float[np.ndarray, "layers tokens kv_heads"]


def check_kv_dtype(kv_dtype: str | None) -> None:
    """Checks that KV can be stored so.

    Raises:
        CacheBlendError: it cannot; lists what can.
    """
    if kv_dtype is not None and kv_dtype not in LARGEST_CODES:
        known = ", ".join(map(repr, LARGEST_CODES))
        raise CacheBlendError(f"unknown kv_dtype {kv_dtype!r}; expected {known}, or None to keep the model's dtype")


def quantise(values: Values, kv_dtype: str, offset: Offset | None = None) -> QuantisedRows:
    """Returns the codes and scales of all layers' K or V, less an offset."""
    codes, scales = np.empty(values.shape, kv_dtype), np.empty(values.shape[:-1], SCALES)
    for layer, of_layer in enumerate(values):  # one by one: the float32 copies are larger than what is stored
        rows = of_layer.astype(np.float32)
        if offset is not None:
            rows -= offset[layer].astype(np.float32)[None]
        codes[layer], scales[layer], _ = quantise_rows(rows, kv_dtype)
    return QuantisedRows(codes, scales, offset)


def can_quantise(values: Values) -> bool:
    """Whether values are better stored as codes.

    Not where one is not finite, or beyond half of what its dtype holds: the value of its code may then overflow.
    """
    most = np.float32(ml_dtypes.finfo(values.dtype).max) / 2
    return all(bool((np.abs(layer.astype(np.float32)) <= most).all()) for layer in values)


def quantise_rows(rows: Float[np.ndarray, "tokens kv_heads head_dim"], kv_dtype: str) -> QuantisedRows:
    """Returns the codes of finite float32 values, and the scale of each token and head.

    An int8 code is off by at most half a step, which is the scale. Rows too small for a normal float32 scale are zeros.
    """
    largest_code = LARGEST_CODES[kv_dtype]
    scales = (np.abs(rows).max(axis=-1, initial=0.0) / largest_code).astype(SCALES)
    scales[scales.astype(np.float32) < np.finfo(np.float32).tiny] = 0  # a device takes subnormals for 0
    divisors = np.where(scales == 0, np.inf, scales.astype(np.float32)).astype(np.float32)
    codes = np.clip(rows / divisors[..., None], -largest_code, largest_code)
    return QuantisedRows((np.rint(codes) if kv_dtype == INT8 else codes).astype(kv_dtype), scales)
