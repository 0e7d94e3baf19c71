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
from flax import nnx, struct
from jax import lax
from jaxtyping import Array, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import LayerKV
from cacheblend_jax.model.params import Params, suits_by_layer
from cacheblend_jax.model.rope import Angles
from pallas_kernels import apply_rope, selective_attention
from pallas_kernels.dispatch import current_target

NO_WINDOW = 2**30
ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def _linear(config: ModelConfig, inputs: int, outputs: int, *, bias: bool, split: str, rngs: nnx.Rngs) -> nnx.Linear:
    """A projection that a mesh with the axis `model` splits by its `outputs` or its `inputs`."""
    by_outputs = split == "outputs"
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.dtype),
        kernel_metadata={"out_sharding": (None, "model") if by_outputs else ("model", None), "eager_sharding": False},
        bias_metadata={"out_sharding": ("model",) if by_outputs else (None,), "eager_sharding": False},
        rngs=rngs,
    )


def _multiplied(by: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """Returns `by(rows)`, the product with a matrix; on a GPU a single row is multiplied twice.

    XLA for GPUs makes the product of a single row and a small matrix a multiplication and a sum, with all that is to be
    summed in memory in between (as it did with a decoded token's keys and values); and before cuBLAS multiplies a
    single row into float32 (logits) it converts the whole matrix.
    """
    if rows.shape[0] > 1 or current_target().platform != "gpu":
        return by(rows)
    return by(jnp.concatenate([rows, rows]))[:1]


class RMSNorm(nnx.Module):
    """Divides by the root mean square and multiplies by `offset + scale`, in float32; rounds once.

    `nnx.RMSNorm` has no offset. It cannot be added to the stored scale: in bfloat16, 1 + scale would lose digits.
    """

    def __init__(self, config: ModelConfig, size: int):
        self.dtype, self.epsilon, self.offset = jnp.dtype(config.dtype), config.rms_norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full(size, 1 - self.offset, self.dtype))

    def __call__(self, x: Float[Array, "*axes size"]) -> Float[Array, "*axes size"]:
        """Normalises the last axis."""
        x = x.astype(jnp.float32)
        scale = jnp.expand_dims(self.offset + self.scale[...].astype(jnp.float32), range(x.ndim - 1))
        factor = lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (x * (factor * scale)).astype(self.dtype)


class DecoderLayer(nnx.Module):
    """A pre-norm decoder layer, as the steps around attention: keys and values, queries, finish.

    Where the configuration has `post_norms`, what attention and MLP return is normalised, too, before it is added.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        linear = partial(_linear, config, rngs=rngs)
        self.head_dim = head_dim
        self.activation = config.activation
        self.attention_scale = config.attention_scale
        self.input_norm = RMSNorm(config, hidden)
        self.q_proj = linear(hidden, q_size, bias=config.qkv_bias, split="outputs")
        self.k_proj = linear(hidden, kv_size, bias=config.qkv_bias, split="outputs")
        self.v_proj = linear(hidden, kv_size, bias=config.qkv_bias, split="outputs")
        self.o_proj = linear(q_size, hidden, bias=config.output_bias, split="inputs")
        self.q_norm = RMSNorm(config, head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config, head_dim) if config.qk_norm else None
        self.attention_out_norm = RMSNorm(config, hidden) if config.post_norms else None
        self.mlp_norm = RMSNorm(config, hidden)
        self.gate_proj = linear(hidden, config.intermediate_size, bias=config.mlp_bias, split="outputs")
        self.up_proj = linear(hidden, config.intermediate_size, bias=config.mlp_bias, split="outputs")
        self.down_proj = linear(config.intermediate_size, hidden, bias=config.mlp_bias, split="inputs")
        self.mlp_out_norm = RMSNorm(config, hidden) if config.post_norms else None

    def keys_values(
        self, hidden: Float[Array, "tokens hidden"]
    ) -> tuple[Float[Array, "tokens kv_heads head_dim"], Float[Array, "tokens kv_heads head_dim"]]:
        """Returns the tokens' keys, after qk-norm and before RoPE, and their values: what a store keeps."""
        with jax.named_scope("keys_values"):
            normed = self.input_norm(hidden)
            k = self._heads(_multiplied(self.k_proj, normed))
            k = k if self.k_norm is None else self.k_norm(k)
            return k, self._heads(_multiplied(self.v_proj, normed))

    def queries(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens heads head_dim"]:
        """Returns the tokens' queries, after qk-norm and before RoPE."""
        with jax.named_scope("queries"):
            q = self._heads(self.q_proj(self.input_norm(hidden)))
            return q if self.q_norm is None else self.q_norm(q)

    def finish(
        self, hidden: Float[Array, "tokens hidden"], attended: Float[Array, "tokens heads head_dim"]
    ) -> Float[Array, "tokens hidden"]:
        """Adds the output projection of `attended`, then the MLP."""
        with jax.named_scope("finish"):
            added = self.o_proj(attended.reshape(attended.shape[0], -1))
            hidden = hidden + (added if self.attention_out_norm is None else self.attention_out_norm(added))
            normed = self.mlp_norm(hidden)
            gate = ACTIVATION_FUNCTIONS[self.activation](self.gate_proj(normed))
            added = self.down_proj(gate * self.up_proj(normed))
            return hidden + (added if self.mlp_out_norm is None else self.mlp_out_norm(added))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, self.head_dim)


class Embedder(nnx.Module):
    """What surrounds the layers: token embedding, final norm, and the projection to logits (tied or not)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.embedding = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (config.vocab_size, config.hidden_size), dtype),
            out_sharding=("model", None),
            eager_sharding=False,
        )
        self.embedding_scale = config.embedding_scale
        self.final_norm = RMSNorm(config, config.hidden_size)
        if config.tied_embeddings:
            self.lm_head = None
        else:
            self.lm_head = _linear(
                config, config.hidden_size, config.vocab_size, bias=False, split="outputs", rngs=rngs
            )

    def embed(self, token_ids: Int[Array, " tokens"]) -> Float[Array, "tokens hidden"]:
        """Looks up the tokens' embeddings, and scales them."""
        embedded = self.embedding[...][token_ids]
        return embedded * jnp.asarray(self.embedding_scale, embedded.dtype)  # rounded first, as in transformers

    def logits(self, hidden: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """Returns float32 next-token logits."""
        with jax.named_scope("logits"):
            normed = self.final_norm(hidden)
            kernel = self.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
            return _multiplied(lambda x: jnp.matmul(x, kernel, preferred_element_type=jnp.float32), normed)


class _Graph(NamedTuple):
    definition: Any
    abstract: dict[str, Any]  # shapes and dtypes of one module's state
    partitions: dict[str, Any]  # PartitionSpec of each leaf, over the mesh axis "model"


@lru_cache(maxsize=32)
def _graph(module: Callable[..., nnx.Module], config: ModelConfig) -> _Graph:
    definition, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    return _Graph(definition, nnx.to_pure_dict(state), nnx.to_pure_dict(nnx.get_partition_spec(state)))


def embedder(params: Params, config: ModelConfig) -> Embedder:
    """Merges the embedder (at trace time)."""
    return nnx.merge(_graph(Embedder, config).definition, nnx.State(params.embedder))


def layer_at(params: Params, config: ModelConfig, index: Int[Array, ""] | int) -> DecoderLayer:
    """Merges layer `index`, which may be traced where weights are stacked (at trace time)."""
    return nnx.merge(_graph(DecoderLayer, config).definition, nnx.State(params.layer(index)))


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


def abstract_params(config: ModelConfig, *, by_layer: bool = False) -> Params:
    """Returns the parameters' shapes and dtypes, as `jax.ShapeDtypeStruct`."""

    def of_layers(leaf: jax.ShapeDtypeStruct) -> Any:
        if by_layer:
            return (leaf,) * config.num_layers
        return jax.ShapeDtypeStruct((config.num_layers, *leaf.shape), leaf.dtype)

    layers = jax.tree.map(of_layers, _graph(DecoderLayer, config).abstract)
    return Params(embedder=_graph(Embedder, config).abstract, layers=layers)


def partition_specs(config: ModelConfig) -> Params:
    """Returns each stacked parameter's `PartitionSpec` for tensor parallelism over a mesh axis named `model`."""
    stacked = jax.tree.map(
        lambda spec: jax.P(None, *spec),
        _graph(DecoderLayer, config).partitions,
        is_leaf=lambda leaf: isinstance(leaf, jax.P),
    )
    return Params(embedder=_graph(Embedder, config).partitions, layers=stacked)


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
        by_layer: each layer's weights as arrays of their own; `None`: on a GPU.
    """
    if by_layer is None:
        by_layer = suits_by_layer(current_target().platform)
    if not by_layer:
        return jax.jit(init_params, static_argnames="config")(key, config)
    embedder_key, layers_key = jax.random.split(key)
    draw = jax.jit(_draw, static_argnames=("module", "config"))
    drawn = [draw(each, module=DecoderLayer, config=config) for each in jax.random.split(layers_key, config.num_layers)]
    return Params(
        embedder=draw(embedder_key, module=Embedder, config=config),
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
    lse: Float[Array, "rows heads"]  # log-sum-exp of each query's visible scores, float32


def attend(
    layer: DecoderLayer,
    rows: Rows,
    kv: LayerKV,
    *,
    angles: tuple[Float[Array, "rows half"], Float[Array, "rows half"]],
    starts: Int[Array, " rows"] | None,
    kv_length: Int[Array, ""] | int,
) -> Attended:
    """The second half of every layer step: attention over the rotated keys, output projection, MLP.

    Args:
        angles: the rows' own, of this layer.
    """
    q = apply_rope(layer.queries(rows.hidden), *angles)
    attended, lse = selective_attention(
        q,
        kv.k,
        kv.v,
        rows.positions,
        q_starts=starts,
        kv_length=kv_length,
        scale=layer.attention_scale,
        return_lse=True,
    )
    return Attended(replace(rows, hidden=layer.finish(rows.hidden, attended)), q, lse)
