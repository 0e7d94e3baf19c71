"""The layer step of every prefill: project, blend into the cached KV, (score and select,) attend, finish.

Both executors, stand-alone chunks and full prefill run this one step over the model's one layer definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import LayerInCache, LayerKV
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import Angles
from cacheblend_jax.model.transformer import DecoderLayer, Rows, attend, layer_at, layer_starts
from pallas_kernels import QuantisedKV, apply_rope, blend_kv
from pallas_kernels.dispatch import current_target
from pallas_kernels.indexing import at_each

HostOrDevice = Any  # a JAX array, or a NumPy array on the host


@struct.dataclass
class PromptSequence:
    """The prompt as all layers see it: its true length, and the angles of every position of the cache."""

    length: Int[HostOrDevice, ""]
    angles: Angles

    @property
    def num_keys(self) -> int:
        """Keys of the cache, padding included."""
        return self.angles.num_tokens


def blend_layer(
    config: ModelConfig,
    index: Int[Array, ""] | int,
    rows: Rows,
    fresh: LayerKV,
    cached: LayerKV | LayerInCache | QuantisedKV | None,
    sequence: PromptSequence,
    key_bias: Float[Array, "kv_heads head_dim"] | None = None,
) -> LayerKV | LayerInCache:
    """Writes the rows' fresh K, V (before RoPE) into those of layer `index`; in a cache, in place.

    Returns the whole layer's, keys rotated. Where nothing is cached the rows are all keys. From quantised keys the
    `key_bias` was subtracted; it is added again.
    """
    if cached is None or (isinstance(cached, LayerInCache) and cached.is_empty):
        turned = LayerKV(apply_rope(fresh.k, *rows.angles.of_layer(config, index)), fresh.v)
        return turned if cached is None else cached.cache.with_layer(index, turned).in_place(index)
    cos, sin = sequence.angles.of_layer(config, index)
    at = index if isinstance(cached, LayerInCache) else None
    stored = cached.stored if isinstance(cached, LayerInCache) else None
    into = cached.k, cached.v
    if isinstance(cached, QuantisedKV):
        stored, into = cached, (jnp.zeros(cached.k.shape, fresh.k.dtype),) * 2
    k, v = blend_kv(
        *into,
        fresh.k,
        fresh.v,
        rows.positions,
        cos=cos,
        sin=sin,
        layer=at,
        stored=stored,
        k_offset=None if stored is None else key_bias,
    )
    return LayerKV(k, v) if at is None else LayerInCache(k, v, index)


@struct.dataclass
class Survivors:
    """Indices, ascending, of the rows that go on, and which of them are real."""

    indices: Int[Array, " kept"]
    valid: Bool[Array, " kept"]


class Selection(NamedTuple):
    """How a border shrinks the set of rows: `choose` returns survivors, `most` of them, given all rows' fresh KV."""

    most: int
    choose: Callable[[LayerKV], Survivors]


class LayerStep(NamedTuple):
    """What a layer step computed.

    Attributes:
        rows: the rows that go on, after the layer.
        kept: their indices among the incoming rows.
        blended: the layer's whole KV, keys rotated.
        fresh: K (before RoPE) and V of the incoming rows.
        q: the rotated queries of the rows that go on.
        lse: the log-sum-exp of each query's visible scores, and of its sink.
        sinks: those of the layer, where it has any.
    """

    rows: Rows
    kept: Int[Array, " kept"]
    blended: LayerKV | LayerInCache
    fresh: LayerKV
    q: Float[Array, "kept heads head_dim"]
    lse: Float[Array, "kept heads"]
    sinks: Float[Array, " heads"] | None


def layer_step(
    params: Params,
    config: ModelConfig,
    index: Int[Array, ""] | int,
    rows: Rows,
    cached: LayerKV | LayerInCache | QuantisedKV | None,
    sequence: PromptSequence,
    selection: Selection | None = None,
) -> LayerStep:
    """Runs one layer for one set of rows. At a stage's border a selection shrinks it between K, V and attention.

    The fresh K, V of all rows enter the layer's; only the rows that are selected attend and go on.
    """
    layer, num_rows = layer_at(params, config, index), rows.positions.shape[0]
    q, fresh = _projections(layer, rows, num_rows if selection is None else selection.most)
    to_blend = rows, fresh, cached, sequence, layer.key_bias
    if selection is None:
        kept, blended = jnp.arange(num_rows, dtype=jnp.int32), blend_layer(config, index, *to_blend)
    else:
        survivors = selection.choose(fresh)
        kept = survivors.indices
        # The selection reads stored KV that the blend overwrites.
        at = once_known(index, kept[0].astype(jnp.float32))
        blended = blend_layer(config, at, *to_blend)
        rows = rows.take(kept, survivors.valid, sequence.num_keys)
        q = None if q is None else at_each(q, kept)
    angles, starts = rows.angles.of_layer(config, index), layer_starts(config, index, rows.positions)
    q = layer.queries(rows.hidden) if q is None else q
    attended = attend(layer, rows, q, blended, angles=angles, starts=starts, kv_length=sequence.length)
    return LayerStep(attended.rows, kept, blended, fresh, attended.q, attended.lse, layer.sink_logits)


def _projections(layer: DecoderLayer, rows: Rows, kept: int) -> tuple[jax.Array | None, LayerKV]:
    """Returns the queries and the fresh K, V of all rows; no queries where only those of `kept` rows are worthwhile.

    Part of a joined matrix is copied before it multiplies: where most rows go on, all of their queries cost less.
    """
    num_rows = rows.positions.shape[0]
    if kept == num_rows or (layer.has_queries_joined and 2 * kept >= num_rows):
        q, k, v = layer.queries_keys_values(rows.hidden)
        return q, LayerKV(k, v)
    return None, LayerKV(*layer.keys_values(rows.hidden))


def blends_in_place(platform: str) -> bool:
    """Returns whether stored KV becomes blended KV where it lies in the cache, on a platform.

    Not on a TPU: attention reads keys in another order there, and XLA would lay the whole cache out anew for that.
    """
    return platform != "tpu"


def once_known(value: Any, known: Float[Array, ""]) -> Any:
    """Returns `value`; on a CPU, it depends on `known`.

    XLA for CPUs may do things in any order that data allow. It copies a whole cache to be able to overwrite it before a
    read that nothing else waits for, and, at the start, slices whose index is a constant out of their stacks.
    """
    if current_target().platform != "cpu":
        return value
    return jnp.where(known > jnp.inf, jnp.zeros_like(value), value)  # never true, but XLA cannot know


def highest(
    scores: Float[Array, " rows"],
    forced: Bool[Array, " rows"],
    valid: Bool[Array, " rows"],
    keep: Int[Array, ""],
    room: int,
) -> Survivors:
    """Returns the `keep` (traced) rows of highest score in `room` (static) places, forced ones first.

    Of equal scores, the earlier row comes first.
    """
    with jax.named_scope("select"):
        scores = jnp.nan_to_num(scores, nan=0.0, posinf=jnp.finfo(jnp.float32).max)
        scores = jnp.where(forced, jnp.inf, scores)
        scores = jnp.where(valid, scores, -jnp.inf)
        _, order = lax.top_k(scores, room)
        chosen = jnp.arange(room, dtype=jnp.int32) < jnp.minimum(keep, valid.sum(dtype=jnp.int32))
        beyond = scores.shape[0]
        indices = jnp.sort(jnp.where(chosen, order, beyond))
        return Survivors(jnp.minimum(indices, beyond - 1), indices < beyond)


def last_row(rows: Rows, sequence: PromptSequence) -> Survivors:
    """Returns the row of the prompt's last token, the only one whose output of the last layer is needed."""
    is_last = rows.positions == sequence.length - 1
    return Survivors(jnp.argmax(is_last)[None].astype(jnp.int32), is_last.any()[None])


def cross_mass(
    step: LayerStep,
    chunk_starts: Int[Array, " kept"],
    context_length: Int[Array, ""],
    sequence: PromptSequence,
    window_starts: Int[Array, " kept"] | None,
    config: ModelConfig,
) -> Float[Array, " kept"]:
    """Returns the attention that each row paid, in this step, to what its stand-alone KV has not seen: other chunks.

    1 − (exp(lse_own) + exp(lse_context) + exp(sink)) / exp(lse_all), mean over heads, from three log-sum-exps; no
    scores are kept. The context is the tokens that each chunk was precomputed after.
    """
    with jax.named_scope("cross_mass"):
        positions = step.rows.positions
        is_row = positions < sequence.length

        def log_sum_exp(last_visible: Int[Array, " kept"], starts: Int[Array, " kept"] | None) -> jax.Array:
            of_all = {"kv_length": sequence.length, "scores": config.score_options}
            return step.blended.attended(step.q, last_visible, starts=starts, **of_all)[1]

        own_starts = chunk_starts if window_starts is None else jnp.maximum(chunk_starts, window_starts)
        own = log_sum_exp(positions, own_starts)
        context = log_sum_exp(jnp.where(is_row, context_length - 1, positions), window_starts)
        seen = jnp.exp(own - step.lse) + jnp.exp(context - step.lse)
        if step.sinks is not None:
            seen += jnp.exp(step.sinks.astype(jnp.float32)[None] - step.lse)
        return jnp.where(is_row, 1.0 - seen.mean(axis=1), 0.0)
