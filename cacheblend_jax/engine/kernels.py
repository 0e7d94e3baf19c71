"""Which implementation of the kernels an engine's programs have."""

from __future__ import annotations

from typing import Any

from cacheblend_jax.choices import KERNELS
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.model import Model
from pallas_kernels.dispatch import implementation_override
from pallas_kernels.proving.first_use import use_verdicts_on
from pallas_kernels.verdicts import Kind


def with_kernels(model: Model, kernels: str) -> Model:
    """Returns the model with programs whose kernels are as asked; see `Engine`. `"auto"` is as the model has them.

    Raises:
        CacheBlendError: unknown kernels.
    """
    if kernels not in KERNELS:
        raise CacheBlendError(f"unknown kernels {kernels!r}; expected one of {', '.join(KERNELS)}")
    if kernels != "auto":
        return model.with_kernels(kernels)
    is_split = len(model.placement.device_set) > 1
    # Only a model's partition splits the Pallas kernels; and hosts may have found different ones to be the best.
    takes_xla = is_split and (model.partition is None or model.spans_hosts)
    if takes_xla and model.kernels is None and implementation_override() is None:
        return model.with_kernels("xla")
    return model


def asked_kernels(model: Model) -> str:
    """Returns what a model's programs are to have: the name of kernels, or `"auto"`."""
    return model.kernels or implementation_override() or "auto"


def prove_kernels(model: Model) -> None:
    """Proves the kernels for the model on its GPU or TPU, where its programs are to have the best ones.

    Once a device, dtype and head_dim.
    """
    if model.kernels is None and implementation_override() is None and model.platform != "cpu":
        device: Any = next(iter(model.placement.device_set))
        use_verdicts_on(device, Kind(model.config.dtype, model.config.head_dim))
