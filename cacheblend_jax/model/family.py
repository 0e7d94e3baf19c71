"""What a model family is: how its configurations are to be read, and how its layer differs from Llama's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cacheblend_jax.model.config_fields import Fields

Windows = tuple[int | None, ...]


@dataclass(frozen=True)
class Family:
    """How the configurations of a family are to be read, and how its layer differs from Llama's.

    Attributes:
        model_type: transformers' name of the family.
        defaults: what transformers takes for absent keys, where families differ. Shapes are among them only where
            published checkpoints leave them out; any other checkpoint that doesn't state them is refused.
        windows: each layer's sliding window, given the number of layers.
        biases: those of the keys `attention_bias` and `mlp_bias` that the family's layers read.
        unsupported: keys which, unless null or false, ask for what no layer here computes.
        activation_key: under which key the activation stands.
        qkv_bias: whether the projections to queries, keys and values always have a bias.
        qk_norm: whether queries and keys are normalised.
        norm_offset: what norms add to their weight.
        pre_norms: whether what attention and MLP read is normalised.
        post_norms: whether what attention and MLP return is normalised.
        qk_norm_over_heads: whether queries, and keys, of all heads are normalised together.
        ropes_by_type: whether layers with a window have a RoPE of their own.
        states_scaled_positions: whether `max_position_embeddings` counts RoPE scaling of any type.
        partial_rotary: whether RoPE may turn a part of each head alone.
        rope_types: other names of types of RoPE.
        rotated: whether each layer has RoPE, given the number of layers; an empty tuple: all have.
        attention_scale: the factor of attention's scores; `None` for `head_dim ** -0.5`.
        attention_soft_cap, logits_soft_cap, attention_sinks: as in `ModelConfig`.
        embedding_scale, residual_scale, logits_scale: as in `ModelConfig`.
        experts: what `ModelConfig` is told of experts, given the number of layers.
        own_keys: what `ModelConfig.to_hugging_face` writes that other families' configurations do not have.
    """

    model_type: str
    defaults: Mapping[str, Any]
    windows: Callable[[Fields, int], Windows]
    biases: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    activation_key: str = "hidden_act"
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    ropes_by_type: bool = False
    states_scaled_positions: bool = False
    partial_rotary: bool = False
    rope_types: Mapping[str, str] | None = None
    rotated: Callable[[Fields, int], tuple[bool, ...]] = lambda fields, num_layers: ()
    attention_scale: Callable[[Fields], float | None] = lambda fields: None
    attention_soft_cap: Callable[[Fields], float | None] = lambda fields: None
    logits_soft_cap: Callable[[Fields], float | None] = lambda fields: None
    attention_sinks: bool = False
    embedding_scale: Callable[[Fields], float] = lambda fields: 1.0
    residual_scale: Callable[[Fields], float] = lambda fields: 1.0
    logits_scale: Callable[[Fields], float] = lambda fields: 1.0
    experts: Callable[[Fields, int], dict[str, Any]] = lambda fields, num_layers: {}
    own_keys: Callable[[Any], dict[str, Any]] = lambda config: {}
