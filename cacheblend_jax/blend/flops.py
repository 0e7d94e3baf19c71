"""Floating-point operations of a prefill, counted from the tokens that each layer computed, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cacheblend_jax.model.config import ModelConfig


class LayerFlops(NamedTuple):
    """What one layer costs: FLOPs of each thing that it does once for every row, or pair of a row and a key.

    Attributes:
        projected: a row whose K, V are computed.
        attending: a row that goes on: its queries, output projection and MLP.
        visible: a query's product with a key, over all heads, that it sees; its attention takes two.
    """

    projected: int
    attending: int
    visible: int


def layer_flops(config: ModelConfig) -> LayerFlops:
    """Returns what a layer of the model costs."""
    hidden, q_size = config.hidden_size, config.num_heads * config.head_dim
    projected = 2 * hidden * 2 * config.num_kv_heads * config.head_dim
    return LayerFlops(projected, 2 * (2 * hidden * q_size + config.weights_per_token), 2 * q_size)


def prefill_flops(
    config: ModelConfig, layer_positions: Sequence[np.ndarray], question_pass: np.ndarray | None = None
) -> int:
    """Returns FLOPs (a multiply-add counts two), given the positions whose K, V each layer computed afresh.

    A layer computes queries, attention and the MLP for the tokens that go on to the *next* layer (of the others only
    K, V are needed), and the last layer for the prompt's last token. Matrix products and attention
    are counted; norms, rotations, embedding and the scoring of tokens are not.

    Args:
        question_pass: positions of the forced tokens, where a selector makes them pass all layers over cached KV first;
            the attention that they pay is computed once more there, to be summed.
    """
    total = 2 * config.hidden_size * config.vocab_size
    for layer, positions in enumerate(layer_positions):
        last = layer == config.num_layers - 1
        attending = np.asarray(positions[-1:] if last else layer_positions[layer + 1], np.int64)
        total += _layer_flops(config, layer, len(positions), attending)
    if question_pass is not None:
        forced = np.asarray(question_pass, np.int64)
        for layer in range(config.num_layers):
            total += _layer_flops(config, layer, len(forced), forced, products=3)
    return total


def _layer_flops(
    config: ModelConfig, layer: int, num_projected: int, attending: np.ndarray, *, products: int = 2
) -> int:
    """Returns a layer's FLOPs; attention is `products` products of queries with all keys that they see."""
    window = config.windows[layer]
    visible = attending + 1 if window is None else np.minimum(attending + 1, window)
    of = layer_flops(config)
    return num_projected * of.projected + len(attending) * of.attending + products * int(visible.sum()) * of.visible
