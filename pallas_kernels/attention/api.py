"""Attention of scattered queries, each at its own position, over a whole KV cache: the one attention of the project.

Full prefill is the case `q_positions = 0 … n-1`, decoding that of one query, the blend that of a few survivors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.xla import attend_xla
from pallas_kernels.dispatch import UnsupportedReasons, choose_backend, current_target, unsupported_reasons
from pallas_kernels.indexing import entry_of
from pallas_kernels.partition import by_shares
from pallas_kernels.target import follows_its_arrays
from pallas_kernels.tuning import AttentionBlocks, attention_blocks
from pallas_kernels.verdicts import Call, class_of
from pallas_kernels.visibility import first_visible

# By backend: module and function. Imported when first used: a machine may lack the Pallas of other platforms.
BACKENDS = {
    "mosaic_gpu": ("pallas_kernels.attention.mosaic_gpu", "attend_mosaic_gpu"),
    "triton": ("pallas_kernels.attention.triton", "attend_triton"),
    "tpu": ("pallas_kernels.attention.tpu", "attend_tpu"),
}


@follows_its_arrays
def selective_attention(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "*layers keys kv_heads head_dim"],
    v: Float[Array, "*layers keys kv_heads head_dim"],
    q_positions: Int[Array, " queries"],
    *,
    layer: Int[Array, ""] | int | None = None,
    q_starts: Int[Array, " queries"] | None = None,
    kv_length: Int[Array, ""] | int | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> (
    Float[Array, "queries heads head_dim"]
    | tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]
):
    """Returns causal attention of queries at given positions: the query at position p sees keys `start … p` only.

    `q_positions` must ascend (ties are legal; not checked, since they are traced). A position of `kv_length` or more
    is padding and yields zeros, as does a query that sees no key; their log-sum-exp is `-inf`. Query head h reads KV
    head `h // (heads // kv_heads)`.

    Args:
        layer: `k` and `v` are stacks, `[layers, keys, kv_heads, head_dim]`, of which this layer is read, traced or not:
            kernels for GPUs read it in place.
        q_starts: first visible key of each query (its chunk's start, say); 0 by default.
        kv_length: number of valid keys, traced or not; all by default. Keys beyond it never reach a result, even if
            they are NaN.
        window: the query at p sees at most the `window` keys up to and including p.
        scale: factor of the scores; `head_dim ** -0.5` by default.
        soft_cap: scaled scores become `soft_cap * tanh(score / soft_cap)`; not at all by default.
        sinks: for each query head a logit of no value, which takes part in the softmax's denominator alone.
        return_lse: also return float32 `[queries, heads]`, the logarithm of the softmax's denominator: the log-sum-exp
            of the visible scores (scaled and capped), and of the sink where there are `sinks`. A key's weight is
            `exp(score - lse)`. To merge results over parts of the keys, attend to the parts without sinks.
        implementation: `None` (what was found right and fastest on this device, see `use_verdicts`; else `"xla"`),
            `"xla"` (blockwise; memory O(queries x block)), `"pallas"` (the platform's Pallas kernel; on a CPU
            interpreted, for tests), or a Pallas kernel by name: `"mosaic_gpu"`, `"triton"`, `"tpu"`.

    In a program whose heads are split over a mesh (`partition.splitting`), each device attends with its own.

    Work is proportional to the visible keys: a tile of queries starts at its first visible key block and stops at its
    last. Accumulation is in float32; the result has the dtype of `q`.

    Raises:
        ValueError: shapes, head counts, dtypes, `kv_length`, `window` or `implementation` do not fit, or the
            implementation asked for can't serve the call; the message says why.

    Source: FlashAttention (arXiv 2205.14135) for the online softmax; CacheBlend (arXiv 2405.16444) §4.2 for the use.
    """
    _validate(q, k, v, q_positions, layer, q_starts, kv_length, window)
    _validate_scores(q, soft_cap, sinks)
    num_keys, head_dim = k.shape[-3], q.shape[2]
    kv_length = jnp.minimum(jnp.asarray(num_keys if kv_length is None else kv_length, jnp.int32), num_keys)
    starts = first_visible(q_positions, q_starts, window)
    scale = head_dim**-0.5 if scale is None else scale
    attend = partial(_attend, scale=scale, soft_cap=soft_cap, implementation=implementation)
    keys = (None, "kv_heads") if layer is None else (None, None, "kv_heads")
    axes = [(None, "heads"), keys, keys, (), (), (), (), ("heads",)]
    arrays = q, k, v, q_positions, layer, starts, kv_length, sinks
    out, lse = by_shares(attend, axes, [(None, "heads"), (None, "heads")])(*arrays)
    return (out, lse) if return_lse else out


def _attend(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "*layers keys kv_heads head_dim"],
    v: Float[Array, "*layers keys kv_heads head_dim"],
    q_positions: Int[Array, " queries"],
    layer: Int[Array, ""] | int | None,
    starts: Int[Array, " queries"] | None,
    kv_length: Int[Array, ""],
    sinks: Float[Array, " heads"] | None,
    *,
    scale: float,
    soft_cap: float | None,
    implementation: str | None,
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    num_keys, head_dim = k.shape[-3], q.shape[2]
    call = Call("selective_attention", str(q.dtype), head_dim, class_of(q.shape[0], num_keys))
    backend = choose_backend(implementation, call, unsupported(q, k))
    if 0 in (q.shape[0], num_keys):
        out, lse = jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf)
    elif backend == "xla":
        if layer is not None:
            k, v = (entry_of(x, layer) for x in (k, v))
        out, lse = attend_xla(q, k, v, q_positions, starts, kv_length, scale, soft_cap)
    else:
        k, v = (k[None], v[None]) if layer is None else (k, v)
        at = jnp.asarray(0 if layer is None else layer, jnp.int32)
        out, lse = _attend_pallas(backend, q, k, v, at, q_positions, starts, kv_length, scale, soft_cap)
    return (out, lse) if sinks is None else _with_sinks(out, lse, sinks)


def _with_sinks(
    out: Float[Array, "queries heads head_dim"], lse: Float[Array, "queries heads"], sinks: Float[Array, " heads"]
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    """Adds sinks to the denominators of a softmax over keys alone; XLA fuses it with what unpacks a kernel's rows."""
    logits, sees_none = sinks.astype(jnp.float32)[None], lse == -jnp.inf
    of_keys = jnp.where(sees_none, 0.0, lse)  # finite: a sink may be -inf, too
    share = jax.nn.sigmoid(of_keys - logits)
    return (out * share[..., None]).astype(out.dtype), jnp.where(sees_none, lse, jnp.logaddexp(of_keys, logits))


def unsupported(q: jax.Array, k: jax.Array) -> UnsupportedReasons:
    """Returns why each Pallas backend can't serve arrays of these shapes and dtypes."""

    def reason_of(backend: str, module: ModuleType) -> str | None:
        target = current_target()
        reason = module.unsupported_reason(q, k, interpret=target.platform == "cpu")
        if reason is None and attention_blocks(backend, target.chip, q.dtype, q.shape[2]) is None:
            return f"has no block sizes for {q.dtype} and head_dim {q.shape[2]} (pallas_kernels/tuning.py)"
        return reason

    empty = min(q.shape[0], k.shape[-3]) == 0
    return unsupported_reasons(BACKENDS, reason_of, "needs a query and a key" if empty else None)


def _attend_pallas(
    backend: str,
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "layers keys kv_heads head_dim"],
    v: Float[Array, "layers keys kv_heads head_dim"],
    layer: Int[Array, ""],
    q_positions: Int[Array, " queries"],
    starts: Int[Array, " queries"] | None,
    kv_length: Int[Array, ""],
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Array, "queries heads head_dim"], Float[Array, "queries heads"]]:
    target = current_target()
    interpret = target.platform == "cpu"
    # What Mosaic GPU's interpreter traced once, it can't run twice: its threads wait for ever.
    attend_by: Callable[..., Any] = _attend_by if interpret else _attend_lowered_once
    attend = partial(
        attend_by,
        backend=backend,
        scale=scale,
        soft_cap=soft_cap,
        blocks=attention_blocks(backend, target.chip, q.dtype, q.shape[2]),
        interpret=interpret,
    )
    with jax.named_scope("selective_attention"):
        # A batch's members run one after another: each fills the kernel's grid, and has block bounds of its own.
        arrays = q, k, v, layer, q_positions, kv_length
        if starts is None:
            return sequential_vmap(lambda *arrays: attend(*arrays[:5], None, arrays[5]))(*arrays)
        return sequential_vmap(lambda starts, *arrays: attend(*arrays[:5], starts, arrays[5]))(starts, *arrays)


def _attend_by(
    *arguments: jax.Array | None, backend: str, blocks: AttentionBlocks, interpret: bool, **scores: float | None
) -> tuple[jax.Array, jax.Array]:
    module, function = BACKENDS[backend]
    attend = getattr(import_module(module), function)
    return attend(*arguments, blocks=blocks, interpret=interpret, **scores)


# Lowering a kernel takes JAX up to a second. Jitted, it is lowered once for all layers that call it with these shapes.
_attend_lowered_once = jax.jit(_attend_by, static_argnames=("backend", "scale", "soft_cap", "blocks", "interpret"))


def _validate(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    layer: jax.Array | int | None,
    q_starts: jax.Array | None,
    kv_length: jax.Array | int | None,
    window: int | None,
) -> None:
    def complain(name: str, got: object, expected: str) -> None:
        raise ValueError(f"selective_attention: {name} must be {expected}, got {got}")

    stacked = 3 if layer is None else 4
    for name, array, rank in (("q", q, 3), ("k", k, stacked), ("v", v, stacked)):
        if array.ndim != rank:
            form = "[tokens, heads, head_dim]" if rank == 3 else "[layers, tokens, heads, head_dim] with a layer"
            complain(name, array.shape, f"of rank {rank}, {form}")
    if isinstance(layer, int) and not 0 <= layer < k.shape[0]:
        complain("layer", layer, f"in [0, {k.shape[0]})")
    if v.shape != k.shape:
        complain("v", v.shape, f"of k's shape {k.shape}")
    num_keys, num_kv_heads, head_dim = k.shape[-3:]
    if q.shape[2] != head_dim:
        complain("q", q.shape, f"of k's head_dim {head_dim}")
    if num_kv_heads == 0 or q.shape[1] % num_kv_heads:
        complain("q's heads", q.shape[1], f"a multiple of k's {num_kv_heads} kv_heads")
    if not q.dtype == k.dtype == v.dtype:
        complain("q, k and v", f"{q.dtype}, {k.dtype}, {v.dtype}", "of one dtype")
    for name, keys in (("q_positions", q_positions), ("q_starts", q_starts)):
        if keys is not None and (keys.shape != q.shape[:1] or not jnp.issubdtype(keys.dtype, jnp.integer)):
            complain(name, f"{keys.dtype}{list(keys.shape)}", f"integers of shape [{q.shape[0]}]")
    if isinstance(kv_length, int) and not 0 <= kv_length <= num_keys:
        complain("kv_length", kv_length, f"in [0, {num_keys}]")
    if window is not None and window < 1:
        complain("window", window, "at least 1")


def _validate_scores(q: jax.Array, soft_cap: float | None, sinks: jax.Array | None) -> None:
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"selective_attention: soft_cap must be a positive number, got {soft_cap}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        got = f"{sinks.dtype}{list(sinks.shape)}"
        raise ValueError(f"selective_attention: sinks must be floats of shape [{q.shape[1]}], got {got}")
