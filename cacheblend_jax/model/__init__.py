"""One config-driven decoder for the Llama form: Llama 2/3.x, Mistral, Qwen2/2.5, Qwen3, Gemma 3 and what shares it."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cacheblend_jax.model.config import ModelConfig, RopeConfig
    from cacheblend_jax.model.decode import Sampling
    from cacheblend_jax.model.kv_cache import KVCache, LayerKV
    from cacheblend_jax.model.model import Model, random_model
    from cacheblend_jax.model.weights import load_model, save_check_layer

__all__ = [
    "KVCache",
    "LayerKV",
    "Model",
    "ModelConfig",
    "RopeConfig",
    "Sampling",
    "load_model",
    "random_model",
    "save_check_layer",
]
_HOMES = ("config", "kv_cache", "decode", "model", "weights")  # as in the package above


def __getattr__(name: str) -> object:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
