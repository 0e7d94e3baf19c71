"""Whole prefills of a model's shape, compiled and ready to be timed or profiled: random weights, random chunks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend.config import BlendConfig
from cacheblend_jax.blend.layer_step import PromptSequence, blends_in_place
from cacheblend_jax.blend.resident import prefill
from cacheblend_jax.blend.schedule import Plan, full_plan, make_plan, survivor_counts
from cacheblend_jax.blend.steps import Prefilled, Request
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.decode import decode_tokens
from cacheblend_jax.model.kv_cache import KVCache, cache_shape, with_room
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.sampling import Draw, Sampling
from cacheblend_jax.model.transformer import random_params
from cacheblend_jax.runtime.programs import compiler_options
from pallas_kernels.dispatch import OVERRIDE, current_target

SUFFIX, CHUNK, RATIO = 64, 512, 0.15
DECODED = 16  # tokens in a call of `Decoding.run`
MODES = ("full", "blend", "reuse")


def request_of(plan: Plan, length: int, vocab_size: int, ratio: float) -> Request:
    """Returns the request for a prompt of chunks, all of them stored, and a question of `SUFFIX` tokens."""
    # Full KV reuse computes the question alone.
    positions = np.arange(plan.active, dtype=np.int32) + (length - SUFFIX if plan.active < length else 0)
    forced = (positions >= length - SUFFIX) & (positions < length) if plan.forced else positions < length
    rows = np.flatnonzero(forced)[: plan.forced]
    padded = np.full(plan.forced, plan.active, np.int32)
    padded[: rows.size] = rows
    return Request(
        token_ids=jnp.asarray(np.random.default_rng(0).integers(0, vocab_size, plan.active), jnp.int32),
        positions=jnp.asarray(np.where(positions < length, positions, plan.cache_length)),
        length=jnp.int32(length),
        forced=jnp.asarray(forced),
        chunk_starts=jnp.asarray(positions // CHUNK * CHUNK),
        context_length=jnp.int32(0),
        keep=jnp.asarray(survivor_counts(plan, ratio, length - SUFFIX, SUFFIX), jnp.int32),
        forced_rows=jnp.asarray(padded),
        is_question=jnp.asarray(padded < plan.active),
        oracle=jnp.zeros(plan.active, jnp.float32),
        seed=jnp.int32(0),
    )


class Mode(NamedTuple):
    """A prefill's plan, its tokens' positions, its compiled program, a call of it, and the seconds of compiling."""

    plan: Plan
    positions: np.ndarray
    program: Any
    run: Callable
    compile_s: float


class Decoding(NamedTuple):
    """The compiled program that decodes `DECODED` tokens, a call of it, and the seconds that compiling took."""

    program: Any
    run: Callable
    compile_s: float


def plan_of(name: str, config: ModelConfig, length: int, ratio: float) -> Plan:
    """Returns the plan of a mode, one of `MODES`; the blend is that of `hkvd`."""
    if name == "full":
        return full_plan(config.num_layers, length)
    active, blend = (length, BlendConfig(ratio, "hkvd")) if name == "blend" else (SUFFIX, None)
    return make_plan(
        num_layers=config.num_layers, length=length, active=active, forced=SUFFIX, blend=blend, check_layer=1
    )


def prefills(
    config: ModelConfig,
    length: int,
    params: Params,
    names: Sequence[str] = ("full", "blend"),
    ratio: float = RATIO,
    options: Mapping[str, str | bool] | None = None,
) -> dict[str, Mode]:
    """Compiles the named of `MODES`, all at the same time; returns them by name.

    Args:
        options: the compiler's, beside those of the runner.
    """
    of_compiler = dict(compiler_options(current_target().platform)) | dict(options or {})

    def compiled(name: str) -> Mode:
        plan = plan_of(name, config, length, ratio)
        request = request_of(plan, length, config.vocab_size, ratio)
        shape = cache_shape(config, plan.cache_length)
        kv = None if plan.nothing_cached else KVCache(*(0.1 * jnp.ones(shape, config.dtype) for _ in "kv"))
        arguments = (params, request, kv, PromptSequence(request.length, rope_tables(config, plan.cache_length)))
        in_place = kv is not None and blends_in_place(current_target().platform)
        begin = time.perf_counter()
        jitted = jax.jit(partial(prefill, config=config, plan=plan), donate_argnames="cached" if in_place else ())
        program = jitted.lower(*arguments).compile(compiler_options=of_compiler)
        run = _rerun(program, *arguments) if in_place else partial(program, *arguments)
        return Mode(plan, np.asarray(request.positions), program, run, time.perf_counter() - begin)

    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(compiled, names), strict=True))


def decoding(config: ModelConfig, length: int, params: Params) -> Decoding:
    """Compiles the decoding of `DECODED` tokens, the last of `length`, in place: every call overwrites their rows."""
    platform, draw = current_target().platform, Draw.by(Sampling())
    stored = KVCache(*(0.1 * jnp.ones(cache_shape(config, length), config.dtype) for _ in "kv"))
    cache = jax.jit(with_room, static_argnames="num_keys")(stored, num_keys=length)
    scalars = (jnp.int32(each) for each in (1, length - DECODED, 1, DECODED))
    arguments = (*scalars, jnp.zeros(config.vocab_size, bool), draw, rope_tables(config, length))
    begin = time.perf_counter()
    lowered = jax.jit(partial(decode_tokens, config=config), donate_argnums=1).lower(params, cache, *arguments)
    program = lowered.compile(compiler_options=compiler_options(platform))
    compile_s = time.perf_counter() - begin

    def run() -> jax.Array:
        nonlocal cache
        token_ids, _, cache = program(params, cache, *arguments)
        return token_ids

    return Decoding(program, run, compile_s)


def _rerun(program: Any, params: Params, request: Request, kv: KVCache | None, sequence: PromptSequence) -> Callable:
    """Returns calls of a prefill that blends in place: each takes the cache of the one before for its stored KV."""
    stored = [kv]

    def run() -> Prefilled:
        out = program(params, request, stored.pop(), sequence)
        stored.append(out.cache)
        return out

    return run


@contextlib.contextmanager
def kernels(implementation: str) -> Iterator[None]:
    """Makes programs that are compiled in its body use this implementation of the kernels."""
    before = os.environ.get(OVERRIDE)
    os.environ[OVERRIDE] = implementation
    try:
        yield
    finally:
        os.environ.pop(OVERRIDE) if before is None else os.environ.update({OVERRIDE: before})


def _tiny(dtype: str) -> ModelConfig:
    small: dict[str, Any] = {
        "vocab_size": 512,
        "num_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_heads": 4,
    }
    small |= {"num_kv_heads": 2, "head_dim": 64, "windows": (None,) * 4, "dtype": dtype}
    return replace(SHAPES["bench-16l"], **small)


def config_of(shape: str, dtype: str) -> ModelConfig:
    """Returns a named shape, or a `"tiny"` one of that dtype."""
    return _tiny(dtype) if shape == "tiny" else SHAPES[shape]


def whole_blend_error(implementation: str, dtype: str) -> float:
    """Returns how far a small blend that recomputes all tokens is from `exact_logits`.

    The largest difference of the logits over the largest logit. The weights are the same numbers, rounded once.
    """
    config, length = _tiny(dtype), 256
    params = random_params(jax.random.key(0), config)
    with kernels(implementation):
        blend = prefills(config, length, params, ("blend",), ratio=1.0)["blend"]
    token_ids = np.asarray(request_of(blend.plan, length, config.vocab_size, 1.0).token_ids)[:length]
    logits, wanted = np.asarray(blend.run().logits, np.float64), exact_logits(config, params, token_ids)
    return float(np.abs(logits - wanted).max() / np.abs(wanted).max())


def exact_logits(config: ModelConfig, params: Params, token_ids: np.ndarray) -> np.ndarray:
    """Returns the reference: logits after the last token, float64 `[vocab]`, by numpy, all scores in memory.

    Only of the plain Llama form: no bias, no norm of queries and keys, no window, one RoPE, embeddings not tied.
    """
    separated = params.separated()
    embedder, layers = (
        jax.tree.map(lambda x: np.asarray(x).astype(np.float64), of) for of in (separated.embedder, separated.layers)
    )
    cos, sin = (np.asarray(x, np.float64)[0, :, None] for x in jax.tree.leaves(rope_tables(config, token_ids.size)))

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    def rotated(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    hidden = embedder["embedding"][token_ids]
    for index in range(config.num_layers):
        layer = {name: next(iter(leaf.values()))[index] for name, leaf in layers.items()}
        normed = norm(hidden, layer["input_norm"])
        q, k, v = (
            (normed @ layer[name]).reshape(token_ids.size, -1, config.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = (np.repeat(x, config.num_heads // config.num_kv_heads, axis=1) for x in (rotated(k), v))
        scores = np.einsum("qhd,khd->hqk", rotated(q), k) * config.head_dim**-0.5
        scores = np.where(np.tri(token_ids.size, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        hidden = hidden + attended.reshape(token_ids.size, -1) @ layer["o_proj"]
        normed = norm(hidden, layer["mlp_norm"])
        gate = normed @ layer["gate_proj"]
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (normed @ layer["up_proj"])) @ layer["down_proj"]
    return norm(hidden[-1], embedder["final_norm"]["scale"]) @ embedder["lm_head"]["kernel"]
