"""A blended prefill in float64 and plain numpy, that knows nothing of the package's programs: what is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

import cacheblend_jax as cb
from cacheblend_jax.model.rope import rope_tables

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def _capped(scores: np.ndarray, cap: float | None) -> np.ndarray:
    return scores if cap is None else cap * np.tanh(scores / cap)


class Reference:
    """Computes prefills of a model, given which tokens' KV each layer computes afresh."""

    def __init__(self, model: cb.Model) -> None:
        self.config = model.config
        self._params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)

    def blend(
        self, token_ids: np.ndarray, recomputed: np.ndarray, k: np.ndarray, v: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the last token's logits, and the keys (before RoPE) and values of all layers.

        Args:
            recomputed: `[layers, tokens]`: tokens whose KV is computed afresh; no layer has one that the last had not.
            k, v: stand-alone KV `[layers, tokens, kv_heads, head_dim]`, which all other tokens keep.
        """
        k, v = k.copy(), v.copy()
        hidden = self._params.embedder["embedding"][token_ids] * self.config.embedding_scale
        for index, rows in enumerate(recomputed):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], self._params.layers)
            normed = self._norm(layer.get("input_norm"), hidden[rows])
            q, fresh_k, fresh_v = (self._heads(layer, name, normed) for name in "qkv")
            k[index, rows], v[index, rows] = fresh_k, fresh_v
            attended = self._attend(index, q, np.flatnonzero(rows), k[index], v[index])
            hidden[rows] = self._finish(layer, hidden[rows], attended)
        embedder = self._params.embedder
        kernel = embedder["lm_head"]["kernel"] if "lm_head" in embedder else embedder["embedding"].T
        logits = self._norm(embedder["final_norm"], hidden[-1]) @ kernel * self.config.logits_scale
        return _capped(logits, self.config.logits_soft_cap), k, v

    def standalone(self, context: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns a chunk's keys (before RoPE) and values, computed after its context alone."""
        token_ids = np.concatenate([context, ids])
        config = self.config
        empty = np.zeros((config.num_layers, token_ids.size, config.num_kv_heads, config.head_dim))
        _, k, v = self.blend(token_ids, np.ones(empty.shape[:2], bool), empty, empty)
        return k[:, context.size :], v[:, context.size :]

    def prefill(
        self, prompt: cb.Prompt, recomputed: np.ndarray, context_tokens: int = 4
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns logits and cache (keys rotated) of a prompt of token ids, whose other tokens come from a store."""
        context = prompt.prefix[:context_tokens]
        nothing = prompt.prefix[:0]
        parts: Sequence[tuple[np.ndarray, np.ndarray]] = [
            (nothing, prompt.prefix),
            *((context, chunk) for chunk in prompt.chunks),
            (nothing, prompt.suffix),  # never stored: overwritten
        ]
        stored = [self.standalone(before, ids) for before, ids in parts if len(ids)]
        k, v = (np.concatenate(each, axis=1) for each in zip(*stored, strict=True))
        token_ids = np.concatenate([ids for _, ids in parts])
        logits, k, v = self.blend(token_ids, recomputed, k, v)
        positions = np.arange(token_ids.size)
        return logits, np.stack([self._rotated(index, keys, positions) for index, keys in enumerate(k)]), v

    def _heads(self, layer: dict, name: str, normed: np.ndarray) -> np.ndarray:
        projected, norm = self._linear(layer[f"{name}_proj"], normed), layer.get(f"{name}_norm")
        if self.config.qk_norm_over_heads:
            projected, norm = self._norm(norm, projected), None
        return self._norm(norm, projected.reshape(len(normed), -1, self.config.head_dim))

    def _attend(self, index: int, q: np.ndarray, positions: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        group = self.config.num_heads // self.config.num_kv_heads
        keys = np.arange(len(k))
        seen = keys <= positions[:, None]
        if self.config.windows and self.config.windows[index] is not None:
            seen &= keys > positions[:, None] - self.config.windows[index]
        k, v = np.repeat(self._rotated(index, k, keys), group, axis=1), np.repeat(v, group, axis=1)
        scale = self.config.attention_scale or self.config.head_dim**-0.5
        scores = np.einsum("qhd,khd->hqk", self._rotated(index, q, positions), k) * scale
        weights = np.exp(np.where(seen, _capped(scores, self.config.attention_soft_cap), -np.inf))
        total = weights.sum(axis=-1, keepdims=True)
        if self.config.attention_sinks:
            total += np.exp(self._params.layers["sinks"][index])[:, None, None]
        attended = np.einsum("hqk,khd->qhd", weights / total, v)
        return attended.reshape(len(q), -1)

    def _finish(self, layer: dict, hidden: np.ndarray, attended: np.ndarray) -> np.ndarray:
        scale, out = self.config.residual_scale, self._linear(layer["o_proj"], attended)
        hidden = hidden + scale * self._norm(layer.get("attention_out_norm"), out)
        normed = self._norm(layer.get("mlp_norm"), hidden)
        out = self._mixed(layer, normed) if self.config.num_experts else self._mlp(layer, normed)
        return hidden + scale * self._norm(layer.get("mlp_out_norm"), out)

    def _mlp(self, layer: dict, x: np.ndarray) -> np.ndarray:
        gate, up = (self._linear(layer[name], x) for name in ("gate_proj", "up_proj"))
        if (limit := self.config.glu_limit) is None:
            return self._linear(layer["down_proj"], ACTIVATIONS[self.config.activation](gate) * up)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return self._linear(layer["down_proj"], gate / (1 + np.exp(-self.config.glu_alpha * gate)) * (up + 1))

    def _mixed(self, layer: dict, x: np.ndarray) -> np.ndarray:
        logits, out = self._linear(layer["router"], x), np.zeros_like(x)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        chosen = np.argsort(-weights, axis=-1)[:, : self.config.experts_per_token]
        weights = np.take_along_axis(weights, chosen, axis=-1)
        if self.config.experts_sum_to_one:
            weights /= weights.sum(axis=-1, keepdims=True)
        for token, place in np.ndindex(chosen.shape):
            expert = jax.tree.map(lambda leaf, number=chosen[token, place]: leaf[number], layer["experts"])
            out[token] += weights[token, place] * self._mlp(expert, x[token])
        return out

    def _linear(self, params: dict, x: np.ndarray) -> np.ndarray:
        return x @ params["kernel"] + params.get("bias", 0.0)

    def _norm(self, params: dict | None, x: np.ndarray) -> np.ndarray:
        if params is None:
            return x
        scale = params["scale"] + self.config.norm_offset
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.config.rms_norm_eps) * scale

    def _rotated(self, index: int, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        tables = rope_tables(self.config, int(positions.max(initial=0)) + 1).of_layer(self.config, index)
        cos, sin = (np.asarray(table, np.float64)[positions][:, None] for table in tables)
        one, other = np.split(x, 2, axis=-1)
        return np.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
