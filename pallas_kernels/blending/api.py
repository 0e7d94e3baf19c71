"""KV blending: in one pass, cached keys are rotated to their places and recomputed tokens' rows replaced."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from pallas_kernels import tuning
from pallas_kernels.blending.xla import blend_xla
from pallas_kernels.dispatch import UnsupportedReasons, choose_backend, current_target, unsupported_reasons
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
    k_cached: Float[Array, "keys kv_heads head_dim"],
    v_cached: Float[Array, "keys kv_heads head_dim"],
    k_fresh: Float[Array, "tokens kv_heads head_dim"],
    v_fresh: Float[Array, "tokens kv_heads head_dim"],
    indices: Int[Array, " tokens"],
    *,
    cos: Float[Array, "keys half"],
    sin: Float[Array, "keys half"],
    return_deviation: bool = False,
    implementation: str | None = None,
) -> (
    tuple[Float[Array, "keys kv_heads head_dim"], Float[Array, "keys kv_heads head_dim"]]
    | tuple[Float[Array, "keys kv_heads head_dim"], Float[Array, "keys kv_heads head_dim"], Float[Array, "tokens 2"]]
):
    """Returns one layer's blended `(k rotated, v)`: the cached rows, with those at `indices` replaced by fresh ones.

    `k_cached` and `k_fresh` are before RoPE; `cos` and `sin` (float32) hold every key's angles. `indices` must ascend;
    an index of `keys` or more is padding and writes nothing.

    The Pallas kernels work in place: where `k_cached` and `v_cached` are donated or no longer needed, keys pass through
    once and only the fresh rows of the values move; otherwise XLA copies the cached arrays first.

    Args:
        return_deviation: also return how far each fresh row is from the one that it replaces; see below.
        implementation: `None` (what was found right and fastest on this device, see `use_verdicts`; else `"xla"`),
            `"xla"`, `"pallas"` (the platform's Pallas kernel; on a CPU interpreted, for tests), or a Pallas kernel by
            name: `"triton"`, `"tpu"`.

    With `return_deviation` a third result, float32 `[tokens, 2]`: how far each fresh row is from the cached one that
    it replaces, `[Σ (k_fresh - k_cached)², Σ (v_fresh - v_cached)²]` over heads and dims, before RoPE, not divided by
    the layer's norms; zeros for padding.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation is unknown or can't serve the call; the message
            says why.

    Source: CacheBlend (arXiv 2405.16444) §4.2, with keys cached before RoPE.
    """
    _validate(k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin)
    shapes = class_of(k_fresh.shape[0], k_cached.shape[0])
    call = Call("blend_kv", str(k_cached.dtype), k_cached.shape[2], shapes)
    backend = choose_backend(implementation, call, unsupported(k_cached, k_fresh))
    arguments = k_cached, v_cached, k_fresh, v_fresh, indices, cos, sin
    with jax.named_scope("blend_kv"):
        if backend == "xla":
            k, v, deviation = blend_xla(*arguments, with_deviation=return_deviation)
        else:
            k, v, deviation = _blend_pallas(backend, arguments, return_deviation)
    return (k, v) if deviation is None else (k, v, deviation)


def unsupported(k_cached: jax.Array, k_fresh: jax.Array) -> UnsupportedReasons:
    """Returns why each Pallas backend can't serve arrays of these shapes and dtypes."""

    def reason_of(_: str, module: ModuleType) -> str | None:
        return module.unsupported_reason(k_cached, k_fresh, interpret=current_target().platform == "cpu")

    empty = 0 in (*k_cached.shape, *k_fresh.shape)
    return unsupported_reasons(BACKENDS, reason_of, "needs a key and a fresh row" if empty else None)


def _blend_pallas(
    backend: str, arguments: tuple[jax.Array, ...], with_deviation: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    blend = partial(
        _blend_by,
        backend=backend,
        with_deviation=with_deviation,
        blocks=tuning.BLEND_KV[backend],
        interpret=current_target().platform == "cpu",
    )
    # A batch's members run one after another: each fills the kernel's grid.
    return sequential_vmap(lambda *arrays: blend(*arrays))(*arguments)


# Jitted, a kernel is lowered once for all layers that call it with these shapes.
@partial(jax.jit, static_argnames=("backend", "with_deviation", "blocks", "interpret"))
def _blend_by(
    *arguments: jax.Array, backend: str, with_deviation: bool, blocks: BlendBlocks, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    module, function = BACKENDS[backend]
    blend = getattr(import_module(module), function)
    return blend(*arguments, with_deviation=with_deviation, blocks=blocks, interpret=interpret)


def _validate(
    k_cached: jax.Array,
    v_cached: jax.Array,
    k_fresh: jax.Array,
    v_fresh: jax.Array,
    indices: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> None:
    for name, array in (("k_cached", k_cached), ("k_fresh", k_fresh)):
        if array.ndim != 3:
            raise ValueError(f"blend_kv: {name} must be of rank 3, [tokens, kv_heads, head_dim], got {array.shape}")
    if k_cached.shape[2] % 2:
        raise ValueError(f"blend_kv: k_cached must have an even head_dim, got {k_cached.shape}")
    for name, array, wanted in (
        ("v_cached", v_cached, k_cached.shape),
        ("k_fresh", k_fresh, (*k_fresh.shape[:1], *k_cached.shape[1:])),
        ("v_fresh", v_fresh, k_fresh.shape),
        ("indices", indices, k_fresh.shape[:1]),
        ("cos", cos, (k_cached.shape[0], k_cached.shape[2] // 2)),
        ("sin", sin, (k_cached.shape[0], k_cached.shape[2] // 2)),
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
