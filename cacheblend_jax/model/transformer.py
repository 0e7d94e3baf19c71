"""The one definition of the decoder layer, and the pure functions over its state that everything runs.

`nnx` modules declare parameters, initialisers, names and sharding; they are split once into a static graph definition
and a state (`model.params.Params`). A layer is merged again at trace time only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import lru_cache, partial
from itertools import groupby
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
from cacheblend_jax.model.params import (
    JOINED,
    Params,
    as_tuples,
    join,
    joined_in,
    queries_apart,
    side_by_side,
    suits_by_layer,
)
from cacheblend_jax.model.projection import linear, multiplied
from cacheblend_jax.model.rms_norm import RMSNorm, normed
from cacheblend_jax.model.rope import Angles
from pallas_kernels import apply_rope
from pallas_kernels.dispatch import current_target
from pallas_kernels.indexing import at_each, entry_of
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
    Projections of the same rows are modules of their own, or in those of `model.params.JOINED` that are `joined`.
    """

    def __init__(self, config: ModelConfig, *, joined: Collection[str] = (), rngs: nnx.Rngs):
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        projection = partial(linear, config, rngs=rngs)
        self.joined, self.has_key_bias = frozenset(joined), config.has_key_bias
        self.head_dim, self.q_size, self.kv_size, self.mlp_size = head_dim, q_size, kv_size, config.intermediate_size
        self.activation = config.activation
        self.glu_alpha, self.glu_limit = config.glu_alpha, config.glu_limit
        self.attention_scale, self.residual_scale = config.attention_scale, config.residual_scale
        self.attention_soft_cap = config.attention_soft_cap
        self.input_norm = RMSNorm(config, hidden) if config.pre_norms else None
        of_attention = {"q_proj": "heads", "k_proj": "kv_heads", "v_proj": "kv_heads"}
        self._add_projections(of_attention, partial(projection, bias=config.qkv_bias), hidden)
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
        else:
            of_mlp = {"gate_proj": "mlp", "up_proj": "mlp"}
            self._add_projections(of_mlp, partial(projection, bias=config.mlp_bias), hidden)
            self.down_proj = projection(config.intermediate_size, hidden, bias=config.mlp_bias, axes=("mlp", None))
        self.mlp_out_norm = RMSNorm(config, hidden) if config.post_norms else None

    def _add_projections(self, axes: dict[str, str], projection: Callable[..., nnx.Linear], hidden: int) -> None:
        """Adds projections of the same rows, whose outputs' axes are `axes`, or the joined ones that hold them."""
        for name in dict.fromkeys(self._holder(part) for part in axes):
            size = sum(self._size(part) for part in JOINED.get(name, (name,)))
            setattr(self, name, projection(hidden, size, axes=(None, axes.get(name))))

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
        bias = getattr(self, self._holder("k_proj")).bias[...]
        return bias[self._columns("k_proj")].reshape(-1, self.head_dim)

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

    @property
    def has_queries_joined(self) -> bool:
        """Whether queries are part of a product with keys and values."""
        return self._holder("q_proj") != "q_proj"

    def _projected(self, rows: Float[Array, "tokens hidden"], *names: str) -> list[Float[Array, "tokens _"]]:
        """Returns the rows' products with projections: one product for those that are joined."""
        products: list[jax.Array] = []
        for holder, together in groupby(names, self._holder):
            whole, parts = getattr(self, holder), list(together)
            if holder in names:
                products.append(multiplied(whole, rows))
                continue
            # Of some of its projections a copy: XLA multiplies by no part of a matrix.
            columns = slice(self._columns(parts[0]).start, self._columns(parts[-1]).stop)

            def product(rows: jax.Array, whole: nnx.Linear = whole, columns: slice = columns) -> jax.Array:
                multiplied = rows @ whole.kernel[..., columns]
                return multiplied if whole.bias is None else multiplied + whole.bias[columns][None]

            widths = [self._size(part) for part in parts]
            products += jnp.split(multiplied(product, rows), np.cumsum(widths)[:-1], axis=1)
        return products

    def _holder(self, name: str) -> str:
        """Returns the module that holds a projection: it itself, unless it is joined."""
        return next((joined for joined in self.joined if name in JOINED[joined]), name)

    def _columns(self, name: str) -> slice:
        """Returns where a projection is in the module that holds it."""
        parts = JOINED.get(self._holder(name), (name,))
        begin = sum(self._size(part) for part in parts[: parts.index(name)])
        return slice(begin, begin + self._size(name))

    def _size(self, name: str) -> int:
        sizes = {"q_proj": self.q_size, "k_proj": self.kv_size, "v_proj": self.kv_size}
        return sizes.get(name, self.mlp_size)


class _Graph(NamedTuple):
    definition: Any
    abstract: dict[str, Any]  # shapes and dtypes of one module's state
    axes: dict[str, Any]  # of each leaf, its axes' names in `sharding.ShardingRules`, as a PartitionSpec


@lru_cache(maxsize=32)
def _graph(module: Callable[..., nnx.Module], config: ModelConfig, **joined: frozenset[str]) -> _Graph:
    definition, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), **joined)))
    return _Graph(definition, nnx.to_pure_dict(state), nnx.to_pure_dict(nnx.get_partition_spec(state)))


def embedder(params: Params, config: ModelConfig) -> Embedder:
    """Merges the embedder (at trace time)."""
    return nnx.merge(_graph(Embedder, config).definition, nnx.State(params.embedder))


def layer_at(params: Params, config: ModelConfig, index: Int[Array, ""] | int) -> DecoderLayer:
    """Merges layer `index`, which may be traced where weights are stacked (at trace time)."""
    weights = params.layer(index)
    return nnx.merge(_graph(DecoderLayer, config, joined=joined_in(weights)).definition, nnx.State(weights))


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


def joined_by_layer(config: ModelConfig) -> list[frozenset[str]]:
    """Returns which of `model.params.JOINED` each layer has, where layers have any."""
    of_mlp = frozenset() if config.num_experts else frozenset({"gate_up_proj"})
    apart = queries_apart(config)
    return [of_mlp | {"kv_proj" if index in apart else "qkv_proj"} for index in range(config.num_layers)]


def abstract_params(config: ModelConfig, *, by_layer: bool = False, joined: bool | None = None) -> Params:
    """Returns the parameters' shapes and dtypes, as `jax.ShapeDtypeStruct`.

    Args:
        by_layer: each layer's weights as arrays of their own.
        joined: with projections of the same rows in one matrix; `None`: where `by_layer`, which that needs.
    """
    joined = by_layer if joined is None else joined
    names = joined_by_layer(config) if joined else [frozenset[str]()] * config.num_layers
    layers = [_graph(DecoderLayer, config, joined=of_layer).abstract for of_layer in names]

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.num_layers, *leaf.shape), leaf.dtype)

    return Params(_graph(Embedder, config).abstract, as_tuples(layers) if by_layer else jax.tree.map(stack, layers[0]))


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
    keys = jax.random.split(layers_key, config.num_layers)
    drawn = [_draw_layer(key, config, joined) for key, joined in zip(keys, joined_by_layer(config), strict=True)]
    return Params(_draw_compiled(embedder_key, module=Embedder, config=config), as_tuples(drawn))


@partial(jax.jit, static_argnums=(1, 2))
def _draw_layer(key: jax.Array, config: ModelConfig, joined: frozenset[str]) -> dict[str, Any]:
    modules = _graph(DecoderLayer, config, joined=joined).abstract
    return join(_draw(key, module=DecoderLayer, config=config), modules, side_by_side)


def _draw(key: jax.Array, *, module: Callable[..., nnx.Module], config: ModelConfig) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.split(module(config, rngs=nnx.Rngs(key)))[1])


_draw_compiled = jax.jit(_draw, static_argnames=("module", "config"))


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
        positions = jnp.where(valid, at_each(self.positions, indices), padding_position)
        return Rows(at_each(self.hidden, indices), positions, self.angles.take(indices))


def rows_at(hidden: jax.Array, positions: jax.Array, angles: Angles) -> Rows:
    """Builds `Rows` whose angles are gathered from those of all positions (padding reads the last)."""
    return Rows(hidden, positions, angles.take(jnp.minimum(positions, angles.num_tokens - 1)))


def layer_starts(config: ModelConfig, index: Int[Array, ""] | int, positions: Int[Array, " rows"]) -> jax.Array | None:
    """Returns the first key that the layer's sliding window lets each query see; `None` where no layer has one."""
    if all(window is None for window in config.windows):
        return None
    windows = jnp.asarray([NO_WINDOW if window is None else window for window in config.windows], jnp.int32)
    return jnp.maximum(positions - (entry_of(windows, index) - 1), 0)


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
