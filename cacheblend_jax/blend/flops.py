"""Floating-point operations of a prefill, counted from the tokens that each layer computed, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cacheblend_jax.model.config import ModelConfig


def prefill_flops(config: ModelConfig, layer_positions: Sequence[np.ndarray]) -> int:
    """Returns FLOPs (a multiply-add counts two), given the positions whose K, V each layer computed afresh.

    A layer computes queries, attention and the MLP for the tokens that go on to the *next* layer (of the others only
    K, V are needed), and the last layer for the prompt's last token. Matrix products and attention
    are counted; norms, rotations, embedding and the selectors' own work are not.
    """
    hidden, q_size = config.hidden_size, config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    total = 2 * hidden * config.vocab_size
    for layer, positions in enumerate(layer_positions):
        last = layer == config.num_layers - 1
        attending = np.asarray(positions[-1:] if last else layer_positions[layer + 1], np.int64)
        window = config.windows[layer]
        visible = attending + 1 if window is None else np.minimum(attending + 1, window)
        total += 2 * len(positions) * hidden * 2 * kv_size
        total += 2 * len(attending) * hidden * (2 * q_size + 3 * config.intermediate_size)
        total += 4 * q_size * int(visible.sum())
    return total
