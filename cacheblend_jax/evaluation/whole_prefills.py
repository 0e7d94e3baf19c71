"""Whole prefills of a model's shape, compiled and ready to be timed or profiled: random weights, prompts of chunks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend.layer_step import LayerKV
from cacheblend_jax.blend.resident import prefill
from cacheblend_jax.blend.schedule import BlendConfig, Plan, full_plan, make_plan, survivor_counts
from cacheblend_jax.blend.steps import Request
from cacheblend_jax.evaluation.bench import SHAPES
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.transformer import init_params
from cacheblend_jax.programs import compiler_options
from pallas_kernels.dispatch import OVERRIDE, current_target

SUFFIX, CHUNK, RATIO = 64, 512, 0.15


def request_of(plan: Plan, length: int, vocab_size: int, ratio: float) -> Request:
    """A prompt of chunks, all of them stored, and a question of `SUFFIX` tokens."""
    positions = np.arange(plan.active, dtype=np.int32)
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
    """A prefill's plan, its compiled program, and a call of it."""

    plan: Plan
    program: Any
    run: Callable


def prefills(
    config: ModelConfig, length: int, params, names: tuple[str, ...] = ("full", "blend"), ratio: float = RATIO
) -> dict[str, Mode]:
    """The compiled modes, by name."""
    blend = BlendConfig(ratio)
    blending = make_plan(
        num_layers=config.num_layers, length=length, active=length, forced=SUFFIX, blend=blend, check_layer=1
    )
    modes = {}
    for name in names:
        plan = blending if name == "blend" else full_plan(config.num_layers, length)
        cos, sin = (jnp.asarray(x) for x in rope_tables(config, plan.cache_length))
        shape = (config.num_layers, plan.cache_length, config.num_kv_heads, config.head_dim)
        kv = None if plan.nothing_cached else LayerKV(*(0.1 * jnp.ones(shape, config.dtype) for _ in "kv"))
        arguments = (params, request_of(plan, length, config.vocab_size, ratio), kv, cos, sin)

        def traced(*arguments, plan=plan):
            return prefill(*arguments, config=config, plan=plan)

        options = compiler_options(current_target().platform)
        program = jax.jit(traced).lower(*arguments).compile(compiler_options=options)
        modes[name] = Mode(plan, program, partial(program, *arguments))
    return modes


@contextlib.contextmanager
def kernels(implementation: str) -> Iterator[None]:
    """Programs compiled in the body use this implementation of the kernels."""
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
    """Largest difference of the logits of a blend that recomputes all tokens to those of full prefill, in float32.

    Over the largest logit; full prefill is "xla".
    """
    logits = []
    for name, of, mode in ((implementation, dtype, "blend"), ("xla", "float32", "full")):
        params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), _tiny(dtype))
        params = jax.tree.map(lambda x, of=of: x.astype(of), params)  # the same weights, rounded once
        with kernels(name):
            run = prefills(_tiny(of), 256, params, (mode,), ratio=1.0)[mode].run
        logits.append(np.asarray(run().logits, np.float64))
    return float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max())
