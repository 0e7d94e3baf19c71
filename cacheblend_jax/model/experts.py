"""Mixtures of experts: which of a layer's MLPs compute each token, and their products with no more than its rows.

Rows are sorted by expert, so that those of one are consecutive: a group. Rows of padding belong to no group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.params import OfLayer
from pallas_kernels.dispatch import current_target
from pallas_kernels.indexing import block_of, with_block
from pallas_kernels.partition import Partition, by_shares, current_partition

TILE = 16  # rows; larger ones are no faster on a CPU, and compute more than the last rows of each group
TILES = (16, 512)  # the least and the most rows, where the number of tiles is static
BLOCK_BYTES = 2**29  # of matrices, which are copied before they multiply a block of tiles
GPU_KERNEL = "jax_ragged_dot_use_gpu_pallas_triton_lowering"  # JAX's option
FEW = 4  # with so many times more experts than products, accelerators multiply by copies of those experts alone

Gated = Callable[[jax.Array, jax.Array], jax.Array]  # what becomes of gate and up


class Routing(NamedTuple):
    """Which experts compute each token, and how much each counts."""

    experts: Int[Array, "tokens chosen"]
    weights: Float[Array, "tokens chosen"]  # float32


class Groups(NamedTuple):
    """Tokens, each once per expert that computes it, sorted by expert; those of padding come last."""

    experts: Int[Array, " rows"]  # the number of experts, for padding
    tokens: Int[Array, " rows"]
    sizes: Int[Array, " experts"]
    places: Int[Array, "tokens chosen"]  # of each token's rows


class Kernels(NamedTuple):
    """The three projections of all experts, and their biases where they have any."""

    gate: OfLayer
    up: OfLayer
    down: OfLayer
    gate_bias: OfLayer | None = None
    up_bias: OfLayer | None = None
    down_bias: OfLayer | None = None

    def biases(self, experts: Int[Array, "*chosen"]) -> list[Shaped[Array, "..."] | None]:
        """Returns the biases of gate, up and down of some experts, or of one."""
        return [None if bias is None else bias.at(experts) for bias in self[3:]]


class ExpertProjection(nnx.Module):
    """One projection of all experts; a mesh may split each by its outputs or its inputs, or the experts."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, *, split: str, rngs: nnx.Rngs):
        inner = "expert_mlp"
        draw = nnx.initializers.lecun_normal(batch_axis=0)
        self.kernel = nnx.Param(
            draw(rngs.params(), (config.num_experts, inputs, outputs), jnp.dtype(config.dtype)),
            out_sharding=("experts", None, inner) if split == "outputs" else ("experts", inner, None),
            eager_sharding=False,
        )
        self.bias = _bias(config, outputs, split, rngs) if config.expert_bias else None

    @property
    def stacks(self) -> tuple[Any, Any]:
        """The matrices of all experts and their biases, each an `OfLayer`; no biases are `None`."""
        return self.kernel.get_value(), None if self.bias is None else self.bias.get_value()


def _bias(config: ModelConfig, outputs: int, split: str, rngs: nnx.Rngs) -> nnx.Param:
    drawn = nnx.initializers.normal(0.1)(rngs.params(), (config.num_experts, outputs), jnp.dtype(config.dtype))
    axes = "experts", "expert_mlp" if split == "outputs" else None
    return nnx.Param(drawn, out_sharding=axes, eager_sharding=False)


class Experts(nnx.Module):
    """A layer's experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        projection = partial(ExpertProjection, config, rngs=rngs)
        self.per_token, self.sum_to_one = config.experts_per_token, config.experts_sum_to_one
        self.gate_proj = projection(config.hidden_size, config.expert_size, split="outputs")
        self.up_proj = projection(config.hidden_size, config.expert_size, split="outputs")
        self.down_proj = projection(config.expert_size, config.hidden_size, split="inputs")

    def __call__(
        self,
        rows: Float[Array, "tokens hidden"],
        router_logits: Float[Array, "tokens experts"],
        valid: Bool[Array, " tokens"],
        gated: Gated,
    ) -> Float[Array, "tokens hidden"]:
        """Returns the weighted sum of what each token's experts make of it; of tokens that are not `valid`, zero."""
        with jax.named_scope("experts"):
            stacks = [each.stacks for each in (self.gate_proj, self.up_proj, self.down_proj)]
            kernels = Kernels(*(kernel for kernel, _ in stacks), *(bias for _, bias in stacks))
            partition = current_partition()
            choose = partial(route, per_token=self.per_token, sum_to_one=self.sum_to_one)
            if partition is not None:
                weighted = _by_shares(partition, rows, router_logits, choose, valid, kernels, gated)
            else:
                routing = choose(router_logits)
                computed = _computed(rows, routing.experts, valid, kernels, gated)
                weighted = (computed * routing.weights[..., None]).sum(axis=1)
            return jnp.where(valid[:, None], weighted, 0).astype(rows.dtype)


def _computed(
    rows: Float[Array, "tokens hidden"],
    experts: Int[Array, "tokens chosen"],
    valid: Bool[Array, " tokens"],
    kernels: Kernels,
    gated: Gated,
) -> Float[Array, "tokens chosen hidden"]:
    groups = sorted_by_expert(experts, valid, num_experts=kernels.gate.stack.shape[1])
    return _product(groups)(rows[groups.tokens], groups, kernels, gated)[groups.places]


def _by_shares(
    partition: Partition,
    rows: Float[Array, "tokens hidden"],
    router_logits: Float[Array, "tokens experts"],
    choose: Callable[[jax.Array], Routing],
    valid: Bool[Array, " tokens"],
    kernels: Kernels,
    gated: Gated,
) -> Float[Array, "tokens hidden"]:
    """Returns the weighted sums, to which each device adds what its experts make of tokens, or its share of each."""

    def of_share(rows: jax.Array, logits: jax.Array, valid: jax.Array, *stacks: Any) -> jax.Array:
        *arrays, down_bias, layer = stacks
        routing = choose(logits)
        if down_bias is not None:  # one share of each expert adds it
            down_bias = jnp.where(partition.share("expert_mlp") == 0, down_bias, 0)
        own: list[Any] = [None if each is None else OfLayer(each, layer) for each in (*arrays, down_bias)]
        here = Kernels(*own)
        count = here.gate.stack.shape[1]
        number = routing.experts - partition.share("experts") * count
        is_here = (number >= 0) & (number < count)
        # An expert that is elsewhere stands for padding, of which products may be anything.
        computed = _computed(rows, jnp.where(is_here, number, count), valid, here, gated)
        weighted = jnp.where(is_here[..., None], computed * routing.weights[..., None], 0).sum(axis=1)
        return partition.summed(weighted, "expert_mlp", "experts")

    inner = (None, "experts", None, "expert_mlp")
    axes = [inner, inner, (None, "experts", "expert_mlp"), (*inner[:2], inner[3]), (*inner[:2], inner[3]), inner[:2]]
    stacks = [None if kernel is None else kernel.stack for kernel in kernels]
    call = by_shares(of_share, [("rows",), ("rows",), ("rows",), *axes, ()], ("rows",))
    return call(rows, router_logits, valid, *stacks, jnp.asarray(kernels.gate.layer, jnp.int32))


def route(router_logits: Float[Array, "tokens experts"], per_token: int, sum_to_one: bool) -> Routing:
    """Chooses each token's experts: the most probable by a softmax over all of them, in float32."""
    weights, experts = lax.top_k(jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1), per_token)
    return Routing(experts, weights / weights.sum(axis=-1, keepdims=True) if sum_to_one else weights)


def sorted_by_expert(chosen: Int[Array, "tokens chosen"], valid: Bool[Array, " tokens"], *, num_experts: int) -> Groups:
    """Sorts tokens by the experts chosen for them."""
    per_token = chosen.shape[1]
    experts = jnp.where(valid[:, None], chosen, num_experts).reshape(-1)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    sizes = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
    return Groups(experts[order], order // per_token, sizes, places.reshape(chosen.shape))


def _product(groups: Groups) -> Callable[[jax.Array, Groups, Kernels, Gated], jax.Array]:
    """Chooses how rows are multiplied by their experts' matrices.

    `lax.ragged_dot` computes what it should on a TPU. For a CPU it is compiled to a product of all rows with all
    experts' matrices, and so it is for a GPU, unless JAX is asked for its kernel: with the rows once more for each
    expert in memory.
    """
    platform = current_target().platform
    if platform == "cpu":
        return tile_by_tile
    if FEW * groups.experts.size <= groups.sizes.size:
        return by_copies
    return by_ragged_dot if platform == "tpu" or getattr(jax.config, GPU_KERNEL, False) else block_by_block


def tile_by_tile(
    rows: Float[Array, "rows hidden"], groups: Groups, kernels: Kernels, gated: Gated
) -> Float[Array, "rows hidden"]:
    """Multiplies expert by expert, `TILE` rows at a time: what is computed grows with the rows that have an expert."""
    tile = min(TILE, groups.places.shape[0])  # no group has more rows than there are tokens
    begins = jnp.cumsum(groups.sizes) - groups.sizes
    busy = jnp.argsort(groups.sizes == 0, stable=True).astype(jnp.int32)
    padded = jnp.pad(rows, ((0, tile), (0, 0)))

    def of_expert(turn: Int[Array, ""] | int, out: jax.Array) -> jax.Array:
        expert = busy[turn]
        gate, up, down = (kernel.at(expert) for kernel in kernels[:3])
        gate_bias, up_bias, down_bias = kernels.biases(expert)

        def of_tile(number: Int[Array, ""] | int, out: jax.Array) -> jax.Array:
            # What the last tile of a group has of the next is computed again there.
            at = (begins[expert] + number * tile, jnp.int32(0))  # one dtype, jax_enable_x64 or not
            x = block_of(padded, at, (tile, rows.shape[1]))
            inner = gated(_added(x @ gate, gate_bias), _added(x @ up, up_bias))
            return with_block(out, _added(inner @ down, down_bias), at)

        return lax.fori_loop(0, num_tiles(groups.sizes[expert], tile), of_tile, out)

    out = lax.fori_loop(0, jnp.count_nonzero(groups.sizes), of_expert, jnp.zeros_like(padded))
    return out[: rows.shape[0]]


def num_tiles(rows: Int[Array, "*of"], tile: int) -> Int[Array, "*of"]:
    """Returns in how many tiles a group's rows are computed."""
    return -(-rows // tile)


def block_by_block(
    rows: Float[Array, "rows hidden"], groups: Groups, kernels: Kernels, gated: Gated
) -> Float[Array, "rows hidden"]:
    """Multiplies blocks of tiles by copies of their experts' matrices: no loop whose length a GPU's host must ask for.

    There are as many tiles as there may have to be, each of half a mean group: half as much again is computed.
    """
    num_rows, num_experts = rows.shape[0], groups.sizes.size
    tile = min(max(num_rows // num_experts // 2, TILES[0]), TILES[1])
    count = num_rows // tile + num_experts  # at most: each group has one tile that is not full
    tiles, begins = num_tiles(groups.sizes, tile), jnp.cumsum(groups.sizes) - groups.sizes
    ends = jnp.cumsum(tiles)
    at_once = min(count, max(1, BLOCK_BYTES // (kernels.gate.stack[0, 0].size * rows.dtype.itemsize)))
    numbers = jnp.arange(-(-count // at_once) * at_once, dtype=jnp.int32).reshape(-1, at_once)

    def of_block(numbers: Int[Array, " block"]) -> Float[Array, "block tile hidden"]:
        experts = jnp.minimum(jnp.searchsorted(ends, numbers, side="right"), num_experts - 1)
        first = begins[experts] + (numbers - (ends - tiles)[experts]) * tile
        x = rows[jnp.minimum(first[:, None] + jnp.arange(tile)[None], num_rows - 1)]
        gate, up, down = (kernel.at(experts) for kernel in kernels[:3])
        gate_bias, up_bias, down_bias = kernels.biases(experts)
        product = partial(jnp.einsum, "bti,bio->bto")
        inner = gated(_added(product(x, gate), gate_bias), _added(product(x, up), up_bias))
        return _added(product(inner, down), down_bias)

    computed = lax.map(of_block, numbers).reshape(-1, rows.shape[1])
    experts = jnp.minimum(groups.experts, num_experts - 1)
    # Tiles of a group follow each other, so that its rows do; what there is of padding is arbitrary.
    places = (ends - tiles)[experts] * tile + jnp.arange(num_rows) - begins[experts]
    return computed[jnp.minimum(places, computed.shape[0] - 1)]


def by_ragged_dot(
    rows: Float[Array, "rows hidden"], groups: Groups, kernels: Kernels, gated: Gated
) -> Float[Array, "rows hidden"]:
    """Multiplies by `lax.ragged_dot`."""
    gate, up, down = (kernel.whole() for kernel in kernels[:3])
    gate_bias, up_bias, down_bias = kernels.biases(_real(groups))
    product = partial(lax.ragged_dot, group_sizes=groups.sizes)
    inner = gated(_added(product(rows, gate), gate_bias), _added(product(rows, up), up_bias))
    return _added(product(inner, down), down_bias)


def by_copies(
    rows: Float[Array, "rows hidden"], groups: Groups, kernels: Kernels, gated: Gated
) -> Float[Array, "rows hidden"]:
    """Multiplies each row by a copy of its expert's matrices: of few rows, a decoded token's say."""
    experts = _real(groups)
    gate, up, down = (kernel.at(experts) for kernel in kernels[:3])
    gate_bias, up_bias, down_bias = kernels.biases(experts)
    product = partial(jnp.einsum, "ri,rio->ro")
    inner = gated(_added(product(rows, gate), gate_bias), _added(product(rows, up), up_bias))
    return _added(product(inner, down), down_bias)


def _real(groups: Groups) -> Int[Array, " rows"]:
    """Returns each row's expert; of padding, some expert."""
    return jnp.minimum(groups.experts, groups.sizes.size - 1)


def _added(product: Float[Array, "..."], bias: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """Adds a bias to a product `[…, rows, outputs]`: one for all rows, or one for each."""
    return product if bias is None else product + jnp.expand_dims(bias, range(bias.ndim - 1, product.ndim - 1))
