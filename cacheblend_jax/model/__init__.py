"""One config-driven decoder for the Llama form: Llama 2/3.x, Mistral, Qwen2/2.5, Qwen3, Gemma 3 and what shares it."""

from typing import TYPE_CHECKING

from cacheblend_jax.runtime.lazy_names import imported

if TYPE_CHECKING:
    from cacheblend_jax.model.config import ModelConfig, RopeConfig
    from cacheblend_jax.model.kv_cache import KVCache, LayerKV
    from cacheblend_jax.model.model import Model, random_model
    from cacheblend_jax.model.sampling import Sampling
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
_HOMES = ("config", "kv_cache", "sampling", "model", "weights")  # as in the package above


def __getattr__(name: str) -> object:
    return imported(__name__, name, __all__, _HOMES)
