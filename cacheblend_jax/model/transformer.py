"""The one definition of the decoder layer, and the pure functions over its state that everything runs.

`nnx` modules declare parameters, initialisers, names and sharding; they are split once into a static graph definition
and a state (`model.params.Params`). A layer is merged again at trace time only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.model.config import ModelConfig, ScoreOptions
from cacheblend_jax.model.embedder import Embedder
from cacheblend_jax.model.experts import Experts
from cacheblend_jax.model.kv_cache import AttendedLayer
from cacheblend_jax.model.params import JOINED, Params, is_joined, join, side_by_side, suits_by_layer
from cacheblend_jax.model.projection import linear, multiplied
from cacheblend_jax.model.rms_norm import RMSNorm, normed
from cacheblend_jax.model.rope import Angles
from pallas_kernels import apply_rope
from pallas_kernels.dispatch import current_target
from pallas_kernels.partition import constrained

NO_WINDOW = 2**30
ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def _sinks(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Param:
    """A logit for each query head."""
    drawn = nnx.initializers.normal(1.0)(rngs.params(), (config.num_heads,), jnp.dtype(config.dtype))
    return nnx.Param(drawn, out_sharding=("heads",), eager_sharding=False)


class DecoderLayer(nnx.Module):
    """A decoder layer, as the steps around attention: queries, keys and values, finish.

    What attention and MLP read is normalised (`pre_norms`), what they return (`post_norms`), or both.
    Projections of the same rows are modules of their own, or `joined` (`model.params.JOINED`).
    """

    def __init__(self, config: ModelConfig, *, joined: bool = False, rngs: nnx.Rngs):
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        projection = partial(linear, config, rngs=rngs)
        self.joined, self.has_key_bias = joined, config.has_key_bias
        self.head_dim, self.q_size, self.kv_size, self.mlp_size = head_dim, q_size, kv_size, config.intermediate_size
        self.activation = config.activation
        self.glu_alpha, self.glu_limit = config.glu_alpha, config.glu_limit
        self.attention_scale, self.residual_scale = config.attention_scale, config.residual_scale
        self.attention_soft_cap = config.attention_soft_cap
        self.input_norm = RMSNorm(config, hidden) if config.pre_norms else None
        if joined:
            self.qkv_proj = projection(hidden, q_size + 2 * kv_size, bias=config.qkv_bias, axes=(None, None))
        else:
            self.q_proj = projection(hidden, q_size, bias=config.qkv_bias, axes=(None, "heads"))
            self.k_proj = projection(hidden, kv_size, bias=config.qkv_bias, axes=(None, "kv_heads"))
            self.v_proj = projection(hidden, kv_size, bias=config.qkv_bias, axes=(None, "kv_heads"))
        self.o_proj = projection(q_size, hidden, bias=config.output_bias, axes=("heads", None))
        self.sinks = _sinks(config, rngs) if config.attention_sinks else None
        self.norms_heads_together = config.qk_norm_over_heads
        q_norm, k_norm = (q_size, kv_size) if config.qk_norm_over_heads else (head_dim, head_dim)
        self.q_norm = RMSNorm(config, q_norm) if config.qk_norm else None
        self.k_norm = RMSNorm(config, k_norm) if config.qk_norm else None
        self.attention_out_norm = RMSNorm(config, hidden) if config.post_norms else None
        self.mlp_norm = RMSNorm(config, hidden) if config.pre_norms else None
        self.has_experts = config.num_experts > 0
        if self.has_experts:
            self.router = projection(hidden, config.num_experts, bias=config.expert_bias, axes=(None, None))
            self.experts = Experts(config, rngs=rngs)
        elif joined:
            self.gate_up_proj = projection(
                hidden, 2 * config.intermediate_size, bias=config.mlp_bias, axes=(None, None)
            )
        else:
            self.gate_proj = projection(hidden, config.intermediate_size, bias=config.mlp_bias, axes=(None, "mlp"))
            self.up_proj = projection(hidden, config.intermediate_size, bias=config.mlp_bias, axes=(None, "mlp"))
        if not self.has_experts:
            self.down_proj = projection(config.intermediate_size, hidden, bias=config.mlp_bias, axes=("mlp", None))
        self.mlp_out_norm = RMSNorm(config, hidden) if config.post_norms else None

    def queries_keys_values(
        self, hidden: Float[Array, "tokens hidden"]
    ) -> tuple[
        Float[Array, "tokens heads head_dim"],
        Float[Array, "tokens kv_heads head_dim"],
        Float[Array, "tokens kv_heads head_dim"],
    ]:
        """Returns what `queries` and `keys_values` do, for the same tokens."""
        with jax.named_scope("queries_keys_values"):
            q, k, v = self._projected(normed(self.input_norm, hidden), "q_proj", "k_proj", "v_proj")
            return self._normed_heads(self.q_norm, q), self._normed_heads(self.k_norm, k), self._heads(v)

    def keys_values(
        self, hidden: Float[Array, "tokens hidden"]
    ) -> tuple[Float[Array, "tokens kv_heads head_dim"], Float[Array, "tokens kv_heads head_dim"]]:
        """Returns the tokens' keys, after qk-norm and before RoPE, and their values: what a store keeps."""
        with jax.named_scope("keys_values"):
            k, v = self._projected(normed(self.input_norm, hidden), "k_proj", "v_proj")
            return self._normed_heads(self.k_norm, k), self._heads(v)

    @property
    def key_bias(self) -> Float[Array, "kv_heads head_dim"] | None:
        """What is in the keys of all tokens alike; `None` where there is no such thing."""
        if not self.has_key_bias:
            return None
        whole = self.qkv_proj if self.joined else self.k_proj
        assert whole.bias is not None
        bias = whole.bias[...]
        return (bias[self.q_size : self.q_size + self.kv_size] if self.joined else bias).reshape(-1, self.head_dim)

    def queries(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens heads head_dim"]:
        """Returns the tokens' queries, after qk-norm and before RoPE."""
        with jax.named_scope("queries"):
            (q,) = self._projected(normed(self.input_norm, hidden), "q_proj")
            return self._normed_heads(self.q_norm, q)

    @property
    def sink_logits(self) -> Float[Array, " heads"] | None:
        """What each query head has in its softmax's denominator beside its keys; `None`: nothing."""
        return None if self.sinks is None else self.sinks[...]

    def finish(
        self,
        hidden: Float[Array, "tokens hidden"],
        attended: Float[Array, "tokens heads head_dim"],
        valid: Bool[Array, " tokens"] | None = None,
    ) -> Float[Array, "tokens hidden"]:
        """Adds the output projection of `attended`, then the MLP; what becomes of tokens not `valid` is arbitrary.

        By default all are.
        """
        with jax.named_scope("finish"):
            attended = constrained(self.o_proj(attended.reshape(attended.shape[0], -1)), "rows")
            hidden = hidden + self._scaled(normed(self.attention_out_norm, attended))
            valid = jnp.ones(hidden.shape[0], bool) if valid is None else valid
            added = constrained(self._mlp(normed(self.mlp_norm, hidden), valid), "rows")
            return hidden + self._scaled(normed(self.mlp_out_norm, added))

    def _mlp(self, rows: Float[Array, "tokens hidden"], valid: Bool[Array, " tokens"]) -> Float[Array, "tokens hidden"]:
        if self.has_experts:
            return self.experts(rows, multiplied(self.router, rows), valid, self.gated)
        gate, up = self._projected(rows, "gate_proj", "up_proj")
        return self.down_proj(self.gated(gate, up))

    def gated(self, gate: Float[Array, "*rows size"], up: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        """Returns what the MLP's last projection takes."""
        if self.glu_limit is None:
            return ACTIVATION_FUNCTIONS[self.activation](gate) * up
        gate, up = jnp.minimum(gate, self.glu_limit), jnp.clip(up, -self.glu_limit, self.glu_limit)
        return gate * jax.nn.sigmoid(self.glu_alpha * gate) * (up + 1)

    def _scaled(self, added: jax.Array) -> jax.Array:
        return added if self.residual_scale == 1 else (added * jnp.float32(self.residual_scale)).astype(added.dtype)

    def _normed_heads(self, norm: RMSNorm | None, projected: jax.Array) -> jax.Array:
        if self.norms_heads_together:
            return self._heads(normed(norm, projected))
        return normed(norm, self._heads(projected))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, self.head_dim)

    def _projected(self, rows: Float[Array, "tokens hidden"], *names: str) -> list[Float[Array, "tokens _"]]:
        """Returns the rows' products with projections: one product, where they are joined."""
        if not self.joined:
            return [multiplied(getattr(self, name), rows) for name in names]
        sizes = {"q_proj": self.q_size, "k_proj": self.kv_size, "v_proj": self.kv_size}
        sizes |= dict.fromkeys(("gate_proj", "up_proj"), self.mlp_size)
        name, parts = next((name, parts) for name, parts in JOINED.items() if names[0] in parts)
        begin = sum(sizes[part] for part in parts[: parts.index(names[0])])
        widths = [sizes[part] for part in names]
        whole = getattr(self, name)
        columns = slice(begin, begin + sum(widths))  # of some, a copy: XLA multiplies by no part of a matrix

        def product(rows: jax.Array) -> jax.Array:
            multiplied = rows @ whole.kernel[..., columns]
            return multiplied if whole.bias is None else multiplied + whole.bias[columns][None]

        return jnp.split(multiplied(product, rows), np.cumsum(widths)[:-1], axis=1)


class _Graph(NamedTuple):
    definition: Any
    abstract: dict[str, Any]  # shapes and dtypes of one module's state
    axes: dict[str, Any]  # of each leaf, its axes' names in `sharding.ShardingRules`, as a PartitionSpec


@lru_cache(maxsize=32)
def _graph(module: Callable[..., nnx.Module], config: ModelConfig, **options: bool) -> _Graph:
    definition, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), **options)))
    return _Graph(definition, nnx.to_pure_dict(state), nnx.to_pure_dict(nnx.get_partition_spec(state)))


def embedder(params: Params, config: ModelConfig) -> Embedder:
    """Merges the embedder (at trace time)."""
    return nnx.merge(_graph(Embedder, config).definition, nnx.State(params.embedder))


def layer_at(params: Params, config: ModelConfig, index: Int[Array, ""] | int) -> DecoderLayer:
    """Merges layer `index`, which may be traced where weights are stacked (at trace time)."""
    weights = params.layer(index)
    return nnx.merge(_graph(DecoderLayer, config, joined=is_joined(weights)).definition, nnx.State(weights))


def scan_layers(
    params: Params, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: range
) -> tuple[Any, Any]:
    """`lax.scan` over layer indices: `carry, y = step(carry, index)` for each; returns the carry and the stacked ys.

    A single layer is not a loop: its index stays a constant. Where each layer's weights are arrays of their own, all
    layers are written out.
    """
    if not layers:  # even an empty loop would be compiled
        return carry, None
    if not params.by_layer and len(layers) > 1:
        return lax.scan(step, carry, jnp.arange(layers.start, layers.stop, dtype=jnp.int32))
    ys = []
    for index in layers:
        carry, y = step(carry, index)
        ys.append(y)
    return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *ys)


def abstract_params(config: ModelConfig, *, by_layer: bool = False, joined: bool | None = None) -> Params:
    """Returns the parameters' shapes and dtypes, as `jax.ShapeDtypeStruct`.

    Args:
        by_layer: each layer's weights as arrays of their own.
        joined: with projections of the same rows in one matrix; `None`: where `by_layer`.
    """
    joined = by_layer if joined is None else joined

    def of_layers(leaf: jax.ShapeDtypeStruct) -> Any:
        if by_layer:
            return (leaf,) * config.num_layers
        return jax.ShapeDtypeStruct((config.num_layers, *leaf.shape), leaf.dtype)

    layers = jax.tree.map(of_layers, _graph(DecoderLayer, config, joined=joined).abstract)
    return Params(embedder=_graph(Embedder, config).abstract, layers=layers)


def axis_names(config: ModelConfig) -> Params:
    """Returns the names of each stacked parameter's axes in `sharding.ShardingRules`, as a `PartitionSpec`."""
    stacked = jax.tree.map(
        lambda spec: jax.P(None, *spec),
        _graph(DecoderLayer, config).axes,
        is_leaf=lambda leaf: isinstance(leaf, jax.P),
    )
    return Params(embedder=_graph(Embedder, config).axes, layers=stacked)


def init_params(key: jax.Array, config: ModelConfig) -> Params:
    """Draws random parameters, stacked (traceable)."""
    embedder_key, layers_key = jax.random.split(key)
    draw_layer = partial(_draw, module=DecoderLayer, config=config)
    return Params(
        embedder=_draw(embedder_key, module=Embedder, config=config),
        layers=jax.vmap(draw_layer)(jax.random.split(layers_key, config.num_layers)),
    )


def random_params(key: jax.Array, config: ModelConfig, *, by_layer: bool | None = None) -> Params:
    """Draws the parameters of `init_params` on the default device.

    Args:
        by_layer: each layer's weights as arrays of their own, projections of the same rows joined; `None`: on a GPU.
    """
    if by_layer is None:
        by_layer = suits_by_layer(current_target().platform)
    if not by_layer:
        return jax.jit(init_params, static_argnames="config")(key, config)
    embedder_key, layers_key = jax.random.split(key)
    draw_layer = jax.jit(lambda key: join(_draw(key, module=DecoderLayer, config=config), side_by_side))
    drawn = [draw_layer(each) for each in jax.random.split(layers_key, config.num_layers)]
    return Params(
        embedder=jax.jit(partial(_draw, module=Embedder, config=config))(embedder_key),
        layers=jax.tree.map(lambda *layers: layers, *drawn),
    )


def _draw(key: jax.Array, *, module: Callable[..., nnx.Module], config: ModelConfig) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.split(module(config, rngs=nnx.Rngs(key)))[1])


@struct.dataclass
class Rows:
    """The tokens that a layer step computes: their hidden states, places, and the angles that rotate them.

    `positions` ascend; a position of the cache's length or more marks a padding row.
    """

    hidden: Float[Array, "rows hidden"]
    positions: Int[Array, " rows"]
    angles: Angles

    def take(self, indices: Int[Array, " kept"], valid: Array, padding_position: int) -> Rows:
        """Keeps the rows at `indices`; those not `valid` become padding."""
        positions = jnp.where(valid, self.positions[indices], padding_position)
        return Rows(self.hidden[indices], positions, self.angles.take(indices))


def rows_at(hidden: jax.Array, positions: jax.Array, angles: Angles) -> Rows:
    """Builds `Rows` whose angles are gathered from those of all positions (padding reads the last)."""
    return Rows(hidden, positions, angles.take(jnp.minimum(positions, angles.num_tokens - 1)))


def layer_starts(config: ModelConfig, index: Int[Array, ""] | int, positions: Int[Array, " rows"]) -> jax.Array | None:
    """Returns the first key that the layer's sliding window lets each query see; `None` where no layer has one."""
    if all(window is None for window in config.windows):
        return None
    windows = jnp.asarray([NO_WINDOW if window is None else window for window in config.windows], jnp.int32)
    return jnp.maximum(positions - (windows[index] - 1), 0)


class Attended(NamedTuple):
    """What the second half of a layer step computes: the rows after it, and what describes its attention."""

    rows: Rows
    q: Float[Array, "rows heads head_dim"]  # rotated
    lse: Float[Array, "rows heads"]  # log-sum-exp of each query's visible scores and of its sink, float32


def attend(
    layer: DecoderLayer,
    rows: Rows,
    q: Float[Array, "rows heads head_dim"],
    kv: AttendedLayer,
    *,
    angles: tuple[Float[Array, "rows half"], Float[Array, "rows half"]],
    starts: Int[Array, " rows"] | None,
    kv_length: Int[Array, "*of"] | int,
) -> Attended:
    """The second half of every layer step: attention over the rotated keys, output projection, MLP.

    Rows at `kv_length` or beyond are padding.

    Args:
        q: the rows' queries, before RoPE.
        angles: the rows' own, of this layer.
    """
    q = apply_rope(q, *angles)
    scores: ScoreOptions = {"scale": layer.attention_scale, "soft_cap": layer.attention_soft_cap}
    masks: dict[str, Any] = {"starts": starts, "kv_length": kv_length, "sinks": layer.sink_logits}
    attended, lse = kv.attended(q, rows.positions, scores=scores, **masks)
    return Attended(replace(rows, hidden=layer.finish(rows.hidden, attended, rows.positions < kv_length)), q, lse)
