"""KV blending: in one pass, cached keys are rotated to their places and recomputed tokens' rows replaced."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.blending.quantised import QuantisedKV
from pallas_kernels.blending.xla import blend_xla
from pallas_kernels.dispatch import UnsupportedReasons, choose_backend, current_target, unsupported_reasons
from pallas_kernels.partition import by_shares
from pallas_kernels.target import follows_its_arrays
from pallas_kernels.tuning import BlendBlocks
from pallas_kernels.verdicts import Call, class_of

# By backend: module and function. Imported when first used: a machine may lack the Pallas of other platforms.
BACKENDS = {
    "triton": ("pallas_kernels.blending.triton", "blend_triton"),
    "tpu": ("pallas_kernels.blending.tpu", "blend_tpu"),
}


@follows_its_arrays
def blend_kv(
    k_cached: Float[Array, "*layers keys kv_heads head_dim"],
    v_cached: Float[Array, "*layers keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    *,
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    layer: Int[Array, ""] | int | None = None,
    stored: QuantisedKV | None = None,
    k_offset: Float[Array, "kv_heads head_dim"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*layers keys kv_heads head_dim"], Float[Array, "*layers keys kv_heads head_dim"]]:
    """Returns one layer's blended `(k rotated, v)`: the cached rows, with those at `indices` replaced by fresh ones.

    `k_cached` and `k_fresh` are before RoPE; `cos` and `sin` (float32) hold every key's angles. `indices` must ascend;
    an index of `keys` or more is padding and writes nothing.

    In a program whose KV heads are split over a mesh (`partition.splitting`), each device blends its own.

    The Pallas kernels work in place: where `k_cached` and `v_cached` are donated or no longer needed, the layer's keys
    pass through once and only the fresh rows of its values move; otherwise XLA copies the cached arrays first.

    Args:
        layer: `k_cached` and `v_cached` are stacks, `[layers, keys, kv_heads, head_dim]`, of which this layer is
            blended, traced or not; returns the stacks, whose other layers are as they were.
        stored: the layer's quantised KV, one layer's even where `layer` is given: it takes the place of the cached
            rows, which are only written. It is dequantised as it passes.
        k_offset: what was subtracted from every stored key before it was quantised.
        implementation: `None` (what was found right and fastest on this device, see `use_verdicts`; else `"xla"`),
            `"xla"`, `"pallas"` (the platform's Pallas kernel; on a CPU interpreted, for tests), or a Pallas kernel by
            name: `"triton"`, `"tpu"`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown or can't serve the call; the message
            says why.

    Source: CacheBlend (arXiv 2405.16444) §4.2, with keys cached before RoPE.
    """
    _validate(k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin, layer)
    if stored is not None:
        _validate_stored(k_cached, stored, k_offset)
    stacks = (k_cached, v_cached) if layer is not None else (k_cached[None], v_cached[None])
    at = jnp.asarray(0 if layer is None else layer, jnp.int32)
    arguments = *stacks, k_fresh, v_fresh, indices, cos, sin, at, stored, k_offset
    keys, rows = (None, None, "kv_heads"), (None, "kv_heads")
    axes = [keys, keys, rows, rows, (), (), (), (), rows, ("kv_heads",)]
    k, v = by_shares(partial(_blend, implementation=implementation), axes, [keys, keys])(*arguments)
    return (k[0], v[0]) if layer is None else (k, v)


def _blend(*arguments: Any, implementation: str | None) -> tuple[jax.Array, jax.Array]:
    k_cached, _, k_fresh, *_, stored, _ = arguments
    call = Call("blend_kv", _kind(k_cached, stored), k_cached.shape[-1], class_of(k_fresh.shape[0], k_cached.shape[-3]))
    backend = choose_backend(implementation, call, unsupported(k_cached, k_fresh, stored))
    with jax.named_scope("blend_kv"):
        return blend_xla(*arguments) if backend == "xla" else _blend_pallas(backend, arguments)


def _kind(k_cached: jax.Array, stored: QuantisedKV | None) -> str:
    """Returns the dtype that verdicts know calls by: what is found of a kernel says nothing of one that dequantises."""
    return str(k_cached.dtype) if stored is None else f"{k_cached.dtype} from {stored.k.dtype}"


def unsupported(k_cached: jax.Array, k_fresh: jax.Array, stored: QuantisedKV | None = None) -> UnsupportedReasons:
    """Returns why each Pallas backend can't serve arrays of these shapes and dtypes."""

    def reason_of(_: str, module: ModuleType) -> str | None:
        if stored is not None and str(stored.k.dtype) not in module.DEQUANTISES:
            return f"takes codes of {', '.join(module.DEQUANTISES)}, got {stored.k.dtype}"
        return module.unsupported_reason(k_cached, k_fresh, interpret=current_target().platform == "cpu")

    empty = 0 in (*k_cached.shape, *k_fresh.shape)
    return unsupported_reasons(BACKENDS, reason_of, "needs a key and a fresh row" if empty else None)


def _blend_pallas(backend: str, arguments: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    blocks, interpret = tuning.BLEND_KV[backend], current_target().platform == "cpu"
    blend = partial(_blend_by, backend=backend, blocks=blocks, interpret=interpret)
    # A batch's members run one after another: each fills the kernel's grid.
    return sequential_vmap(lambda *arrays: blend(*arrays))(*arguments)


# Jitted, a kernel is lowered once for all layers that call it with these shapes.
@partial(jax.jit, static_argnames=("backend", "blocks", "interpret"))
def _blend_by(*arguments: Any, backend: str, blocks: BlendBlocks, interpret: bool) -> tuple[jax.Array, jax.Array]:
    module, function = BACKENDS[backend]
    return getattr(import_module(module), function)(*arguments, blocks=blocks, interpret=interpret)


def _validate(
    k_cached: jax.Array,
    v_cached: jax.Array,
    k_fresh: jax.Array,
    v_fresh: jax.Array,
    indices: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    layer: jax.Array | int | None,
) -> None:
    forms = {3: "[tokens, kv_heads, head_dim]", 4: "[layers, tokens, kv_heads, head_dim] with a layer"}
    for name, array, rank in (("k_cached", k_cached, 3 if layer is None else 4), ("k_fresh", k_fresh, 3)):
        if array.ndim != rank:
            raise ValueError(f"blend_kv: {name} must be of rank {rank}, {forms[rank]}, got {array.shape}")
    num_keys, num_kv_heads, head_dim = k_cached.shape[-3:]
    if isinstance(layer, int) and not 0 <= layer < k_cached.shape[0]:
        raise ValueError(f"blend_kv: layer must be in [0, {k_cached.shape[0]}), got {layer}")
    if head_dim % 2:
        raise ValueError(f"blend_kv: k_cached must have an even head_dim, got {k_cached.shape}")
    for name, array, wanted in (
        ("v_cached", v_cached, k_cached.shape),
        ("k_fresh", k_fresh, (k_fresh.shape[0], num_kv_heads, head_dim)),
        ("v_fresh", v_fresh, k_fresh.shape),
        ("indices", indices, k_fresh.shape[:1]),
        ("cos", cos, (num_keys, head_dim // 2)),
        ("sin", sin, (num_keys, head_dim // 2)),
    ):
        if array.shape != wanted:
            raise ValueError(f"blend_kv: {name} must have shape {wanted}, got {array.shape}")
    for name, array, dtype in (
        ("k_cached", k_cached, jnp.floating),
        ("indices", indices, jnp.integer),
        ("cos", cos, jnp.floating),
        ("sin", sin, jnp.floating),
    ):
        if not jnp.issubdtype(array.dtype, dtype):
            raise ValueError(f"blend_kv: {name} must be {dtype.__name__}, got {array.dtype}{list(array.shape)}")
    for name, array in (("v_cached", v_cached), ("k_fresh", k_fresh), ("v_fresh", v_fresh)):
        if array.dtype != k_cached.dtype:
            raise ValueError(f"blend_kv: {name} must have k_cached's dtype {k_cached.dtype}, got {array.dtype}")


def _validate_stored(k_cached: jax.Array, stored: QuantisedKV, k_offset: jax.Array | None) -> None:
    layer = k_cached.shape[-3:]
    wanted = {"k": layer, "v": layer, "k_scales": layer[:-1], "v_scales": layer[:-1]}
    arrays = stored._asdict()
    if k_offset is not None:
        arrays["k_offset"], wanted["k_offset"] = k_offset, layer[1:]
    for name, array in arrays.items():
        if array.shape != wanted[name]:
            raise ValueError(f"blend_kv: stored {name} must have shape {wanted[name]}, got {array.shape}")
    if stored.k.dtype != stored.v.dtype or stored.k.dtype.itemsize != 1:
        dtypes = f"{stored.k.dtype} and {stored.v.dtype}"
        raise ValueError(f"blend_kv: stored k and v must be codes of one dtype and one byte, got {dtypes}")
