"""How families read their own keys: windows, layers without RoPE, soft caps, experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config_fields import Fields
from cacheblend_jax.model.family import Windows

LAYER_TYPES = ("full_attention", "sliding_attention")


def no_windows(_: Fields, num_layers: int) -> Windows:
    """No layer has a window, whatever the configuration says."""
    return (None,) * num_layers


def same_windows(fields: Fields, num_layers: int) -> Windows:
    """One window for all layers, whatever `layer_types` says; an explicit null means none."""
    return ((fields.integer("sliding_window") if "sliding_window" in fields else None),) * num_layers


def qwen_windows(fields: Fields, num_layers: int) -> Windows:
    """Where windows are used, the layers from `max_window_layers` on have them."""
    return _windows_if_used(fields, num_layers, lambda layer: layer >= fields.integer("max_window_layers", 28))


def all_windows_but(every: int, key: str | None = None) -> Callable[[Fields, int], Windows]:
    """All layers have the window but every so many-th, unless `layer_types` or the key says otherwise."""

    def windows(fields: Fields, num_layers: int) -> Windows:
        pattern = every if key is None else fields.integer(key, every)
        return _windows_by_type(fields, num_layers, lambda layer: (layer + 1) % pattern)

    return windows


def soft_cap(key: str) -> Callable[[Fields], float | None]:
    """What stands under the key; `None` for null, or where it is absent."""
    return lambda fields: fields.number(key, 0.0) if key in fields else None


def _windows_if_used(fields: Fields, num_layers: int, slides: Callable[[int], int]) -> Windows:
    """As `_windows_by_type`, where the configuration says that windows are used."""
    if not fields.flag("use_sliding_window") or "sliding_window" not in fields:
        return (None,) * num_layers
    return _windows_by_type(fields, num_layers, slides)


def _windows_by_type(fields: Fields, num_layers: int, slides: Callable[[int], int]) -> Windows:
    """Reads `layer_types`; where there are none, the layers for which `slides` is true have the window."""
    kinds = fields.texts("layer_types") or [LAYER_TYPES[bool(slides(layer))] for layer in range(num_layers)]
    if unknown := set(kinds) - set(LAYER_TYPES):
        raise CheckpointError(f"layer type {min(unknown)!r} is not supported; supported: {', '.join(LAYER_TYPES)}")
    is_read = "sliding_window" in fields or "sliding_attention" in kinds
    window = fields.integer("sliding_window") if is_read else None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def smollm3_rotated(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """All layers have RoPE but every fourth, unless the configuration says otherwise."""
    if (switches := fields.switches("no_rope_layers")) is not None:  # 1 where a layer has RoPE, whatever the name says
        return tuple(switches[:num_layers])
    interval = fields.integer("no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))


def smollm3_windows(fields: Fields, num_layers: int) -> Windows:
    """Where windows are used, the layers without RoPE have them."""
    rotated = smollm3_rotated(fields, num_layers)
    return _windows_if_used(fields, num_layers, lambda layer: not rotated[layer])


def window_if_used(fields: Fields, num_layers: int) -> Windows:
    """Where windows are used, all layers have them, whatever `layer_types` says."""
    return _windows_if_used(Fields({**fields.content, "layer_types": None}), num_layers, lambda layer: True)


def _num_experts(fields: Fields, default: int) -> int:
    """Reads one of the key's two names: transformers 5 writes the second, whatever the family."""
    return fields.integer("num_experts" if "num_experts" in fields else "num_local_experts", default)


def qwen_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Experts in all layers, or in none."""
    num_experts, step = _num_experts(fields, 128), fields.integer("decoder_sparse_step", 1)
    dense = set(fields.layers("mlp_only_layers"))
    sparse = [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0]
    if not num_experts or not sparse:
        return {}
    if len(sparse) < num_layers:
        key = "mlp_only_layers" if dense else "decoder_sparse_step"
        raise fields.wrong(key, "such that all layers have experts, or none", fields.content[key])
    return {
        "num_experts": num_experts,
        "experts_per_token": fields.integer("num_experts_per_tok", 8),
        "expert_size": fields.integer("moe_intermediate_size", 768),
        "experts_sum_to_one": fields.flag("norm_topk_prob"),
    }


def mixtral_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Experts of the size that other families' one MLP has."""
    return {
        "num_experts": _num_experts(fields, 8),
        "experts_per_token": fields.integer("num_experts_per_tok", 2),
        "expert_size": fields.integer("intermediate_size"),
        "experts_sum_to_one": True,
    }


def gpt_oss_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Experts with biases and an activation of their own."""
    return {
        "num_experts": _num_experts(fields, 128),
        "experts_per_token": fields.integer("num_experts_per_tok", 4),
        "expert_size": fields.integer("intermediate_size"),
        "experts_sum_to_one": True,  # a softmax over the chosen ones alone
        "expert_bias": True,
        "glu_alpha": fields.number("swiglu_alpha", 1.702),
        "glu_limit": fields.number("swiglu_limit", 7.0),
    }
