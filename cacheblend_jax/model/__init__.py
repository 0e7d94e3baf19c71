"""One decoder for all families: each is a configuration of it (`model.families`)."""

from typing import TYPE_CHECKING

from cacheblend_jax.runtime.lazy_names import imported

if TYPE_CHECKING:
    from cacheblend_jax.model.config import ModelConfig
    from cacheblend_jax.model.kv_cache import KVCache, LayerKV
    from cacheblend_jax.model.model import Model, random_model, split_model
    from cacheblend_jax.model.rope_config import RopeConfig
    from cacheblend_jax.model.sampling import Sampling
    from cacheblend_jax.model.sharding import ShardingRules
    from cacheblend_jax.model.weights import load_model, save_check_layer

__all__ = [
    "KVCache",
    "LayerKV",
    "Model",
    "ModelConfig",
    "RopeConfig",
    "Sampling",
    "ShardingRules",
    "load_model",
    "random_model",
    "save_check_layer",
    "split_model",
]
_HOMES = ("rope_config", "config", "kv_cache", "sampling", "sharding", "model", "weights")  # as in the package above


def __getattr__(name: str) -> object:
    return imported(__name__, name, __all__, _HOMES)
