"""Every kernel, and whole blends of Llama 3 8B's layers, compiled for an H200 and a TPU v5e without either."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import LITTLE_EFFORT, NO_SPILL, compiler

from cacheblend_jax.blend.layer_step import PromptSequence
from cacheblend_jax.blend.resident import Request, prefill
from cacheblend_jax.blend.schedule import BlendConfig, make_plan
from cacheblend_jax.blend.steps import ActiveRows, plain_layer
from cacheblend_jax.engine.entry_pages import PAGES_TOGETHER, page_rows, place_pages
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.evaluation.whole_prefills import kernels
from cacheblend_jax.model import KVCache, LayerKV, ModelConfig
from cacheblend_jax.model.decode import decode_tokens
from cacheblend_jax.model.kv_cache import GrowingCache
from cacheblend_jax.model.rope import Angles
from cacheblend_jax.model.sampling import Draw
from cacheblend_jax.model.transformer import Rows, abstract_params
from cacheblend_jax.runtime.programs import COMPILER_OPTIONS
from pallas_kernels import selective_attention, tuning
from pallas_kernels.attention.tiles import cost
from pallas_kernels.dispatch import OVERRIDE
from pallas_kernels.tuning import AttentionBlocks
from scripts.count_kernels import count_kernels

pytestmark = pytest.mark.aot
LLAMA3_8B = SHAPES["llama-3-8b"]
WEIGHTS = abstract_params(LLAMA3_8B, by_layer=True).layers
BY_CUBLAS = COMPILER_OPTIONS["gpu"] | {"xla_gpu_enable_triton_gemm": False}


def _attention(
    head_dim: int,
    dtype=jnp.bfloat16,
    num_queries: int = 1229,
    implementation: str = "pallas",
    num_keys: int = 8192,
    soft_cap: float | None = None,
):
    def shape(*sizes: int, of=dtype):
        return jax.ShapeDtypeStruct(sizes, of)

    def attend(q, k, v, positions, starts, length):
        options = {"kv_length": length, "soft_cap": soft_cap, "return_lse": True, "implementation": implementation}
        return selective_attention(q, k, v, positions, q_starts=starts, **options)

    integers = [shape(*sizes, of=jnp.int32) for sizes in ((num_queries,), (num_queries,), ())]
    keys = shape(num_keys, 8, head_dim)
    return attend, shape(num_queries, 32, head_dim), keys, keys, *integers


def test_a_kernel_that_several_layers_call_is_lowered_once():
    attend, q, *others = _attention(64)

    def layers(q, *others):
        for _ in range(3):
            q = attend(q, *others)[0]
        return q

    target = compiler("gpu")
    arguments = [target.shape(x.shape, x.dtype) for x in (q, *others)]
    with jax.sharding.use_abstract_mesh(target.abstract_mesh):
        text = jax.jit(layers).lower(*arguments).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 1


@pytest.mark.parametrize(
    ("head_dim", "num_queries", "soft_cap"),
    [*((size, 1229, None) for size in (64, 80, 96, 128, 256)), (256, 1, None), (256, 1229, 50.0)],
)
def test_attention_for_hopper_spills_no_register(head_dim, num_queries, soft_cap, capfd):
    compiled = compiler("gpu")(*_attention(head_dim, num_queries=num_queries, soft_cap=soft_cap))
    text = compiled.as_text()
    assert "selective_attention_mosaic_gpu" in text or "mosaic_gpu" in text
    printed = "".join(capfd.readouterr())
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    assert spills, "ptxas printed no account of registers"
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("num_keys", [100, 1001])
def test_attention_for_hopper_takes_any_number_of_keys(num_keys):
    compiler("gpu")(*_attention(128, num_queries=65, num_keys=num_keys, implementation="mosaic_gpu"))


def test_a_kernel_beyond_shared_memory_fails_for_hopper(monkeypatch):
    too_many = [(2, 256, AttentionBlocks(rows=128, keys=128, stages=16))]
    monkeypatch.setitem(tuning.SELECTIVE_ATTENTION, ("mosaic_gpu", ""), too_many)
    with pytest.raises(Exception, match=r"(?i)shared memory|smem|SMEM"):
        compiler("gpu")(*_attention(128))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "soft_cap"),
    [(64, "float16", None), (80, "bfloat16", None), (128, "bfloat16", 50.0), (64, "float32", None)],
)
def test_attention_by_triton_spills_no_register(head_dim, dtype, soft_cap):
    arguments = _attention(head_dim, jnp.dtype(dtype), implementation="triton", soft_cap=soft_cap)
    assert "selective_attention_triton" in compiler("gpu")(*arguments, options=NO_SPILL).as_text()


def test_a_kernel_that_spills_fails_for_hopper(monkeypatch):
    too_many = [(2, 256, AttentionBlocks(rows=128, keys=64))]
    monkeypatch.setitem(tuning.SELECTIVE_ATTENTION, ("triton", ""), too_many)
    with pytest.raises(Exception, match="register spilling"):
        compiler("gpu")(*_attention(128, implementation="triton"), options=NO_SPILL)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "soft_cap"),
    [(64, "bfloat16", None), (80, "float32", None), (128, "bfloat16", None), (256, "float32", 50.0)],
)
def test_attention_for_tpu_fits_its_memory(head_dim, dtype, soft_cap):
    arguments = _attention(head_dim, jnp.dtype(dtype), soft_cap=soft_cap)
    compiled = compiler("tpu")(*arguments)
    assert "selective_attention_tpu" in compiled.as_text()
    blocks = tuning.attention_blocks("tpu", "TPU v5 lite", jnp.dtype(dtype), head_dim)
    least = cost(*arguments[1:3], tile_rows=blocks.rows, block_keys=blocks.keys).flops
    assert least <= compiled.cost_analysis()["flops"] <= 1.1 * least
    # Scores of all queries and keys would be 1.3 GB.
    assert compiled.memory_analysis().temp_size_in_bytes < 3e8


def test_a_kernel_beyond_vmem_fails_for_tpu(monkeypatch):
    too_large = [(2, 256, AttentionBlocks(rows=1024, keys=4096))]
    monkeypatch.setitem(tuning.SELECTIVE_ATTENTION, ("tpu", ""), too_large)
    with pytest.raises(Exception, match=r"(?i)vmem|memory"):
        compiler("tpu")(*_attention(128))


def _shape(*sizes: int, of=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, of)


def _blend_arguments(config, num_stages: int, *, by_layer: bool = False, joined: bool | None = None):
    length, forced, layers = 8192, 64, config.num_layers
    blend_config = BlendConfig(selector="hkvd", num_stages=num_stages)
    plan = make_plan(num_layers=layers, length=length, active=length, forced=forced, blend=blend_config, check_layer=1)
    request = Request(
        token_ids=_shape(plan.active),
        positions=_shape(plan.active),
        length=_shape(),
        forced=_shape(plan.active, of=jnp.bool_),
        chunk_starts=_shape(plan.active),
        context_length=_shape(),
        keep=_shape(len(plan.stages) - 1),
        forced_rows=_shape(plan.forced),
        is_question=_shape(plan.forced, of=jnp.bool_),
        oracle=_shape(plan.active, of=jnp.float32),
        seed=_shape(),
    )
    cached = _shape(layers, plan.cache_length, 8, 128, of=jnp.bfloat16)
    table = _shape(1, plan.cache_length, 64, of=jnp.float32)

    def blend(params, request, cached, angles):
        sequence = PromptSequence(request.length, angles)
        return prefill(params, request, cached, sequence, config=config, plan=plan)

    params = abstract_params(config, by_layer=by_layer, joined=joined)
    return blend, params, request, KVCache(cached, cached), Angles(table, table)


def _with_layers(num_layers: int) -> ModelConfig:
    return replace(LLAMA3_8B, num_layers=num_layers, windows=(None,) * num_layers)


def _outside_fusions(text: str) -> list[str]:
    computations = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    run = [computation for computation in computations if computation.startswith(("ENTRY", "%region"))]  # and loops
    return [line for computation in run for line in computation.splitlines()]


def _copied_weights(text: str) -> list[str]:
    """Operations of their own whose result has the shape of a matrix of weights, or of some of them side by side."""
    matrices = [leaf.shape for leaf in jax.tree.leaves(WEIGHTS) if len(leaf.shape) == 2]
    rows = "|".join(str(rows) for rows in sorted({rows for rows, _ in matrices}))
    # No number of tokens is one of them.
    made = re.compile(rf"= \(?(bf16|f32)\[(1,)?({rows}),\d{{4,}}\]")
    given = re.compile(r"\b(parameter|get-tuple-element|bitcast)\(")
    return [line for line in _outside_fusions(text) if made.search(line) and not given.search(line)]


def _different_products(text: str) -> set[tuple[str, ...]]:
    """The forms of cuBLAS products: shapes and layouts of results and operands, and what is computed."""
    lines = [line for line in text.splitlines() if " = " in line]
    shapes = {line.split(" = ")[0].split()[-1]: re.split(r" [a-z-]+\(", line.split(" = ")[1])[0] for line in lines}
    products = set()
    for line in lines:
        if '"__cublas$lt$matmul"' in line:
            result, operands = re.search(r" = (.*?) custom-call\((.*?)\)", line).groups()
            of = (shapes[operand.split()[-1]] for operand in operands.split(","))
            products.add((result, *of, re.search(r"backend_config=.*", line)[0]))
    return products


def test_a_whole_blend_for_an_h200_spills_nothing_and_copies_no_weights(capfd, monkeypatch):
    monkeypatch.setenv(OVERRIDE, "pallas")
    # All kinds of layers, and more of the usual one than of others: 32 would take three times as long.
    arguments = _blend_arguments(_with_layers(8), 4, by_layer=True)
    compiled = compiler("gpu")(*arguments, options=COMPILER_OPTIONS["gpu"])
    assert "mosaic_gpu" in compiled.as_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", "".join(capfd.readouterr()))
    assert spills, "ptxas printed no account of registers"
    assert set(spills) == {("0", "0")}
    assert _copied_weights(compiled.as_text()) == []
    # Activations of 8192 tokens, never scores of tokens by tokens (8.6 GB).
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9


@cache
def blend_by_cublas(num_layers: int) -> Any:
    """A blend in two stages for an H200, its cache donated, compiled once for the tests that read it."""
    arguments = _blend_arguments(_with_layers(num_layers), 2, by_layer=True)
    with kernels("pallas"):
        return compiler("gpu")(*arguments, donate=(2,), options=BY_CUBLAS)


def test_products_by_cublas_read_weights_where_they_lie_and_are_the_same_in_all_layers():
    products = []
    for layers in (6, 8):  # each stage has a layer that is no border
        text = blend_by_cublas(layers).as_text()
        assert _copied_weights(text) == []
        products.append(_different_products(text))
    assert products[0]
    assert products[0] == products[1]


def test_products_that_xla_merges_are_seen_to_copy():
    options = BY_CUBLAS | {"xla_gpu_dot_merger_threshold_mb": "32"}  # XLA's own
    arguments = _blend_arguments(_with_layers(3), 2, by_layer=True, joined=False)  # as on a mesh
    assert _copied_weights(compiler("gpu")(*arguments, options=options).as_text())


def test_weights_that_a_loop_copies_are_seen():
    assert _copied_weights(compiler("gpu")(*_blend_arguments(_with_layers(4), 1)).as_text())


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_streamed_layer_for_an_h200_copies_no_weights_unless_they_are_stacked(by_layer):
    rows, keys, config = 1296, 8192, _with_layers(4)
    kv, table = _shape(keys, 8, 128, of=jnp.bfloat16), _shape(1, keys, 64, of=jnp.float32)
    stack = _shape(4, keys, 8, 128, of=jnp.bfloat16)
    of_rows = Angles(*[_shape(1, rows, 64, of=jnp.float32)] * 2)
    active = ActiveRows(Rows(_shape(rows, 4096, of=jnp.bfloat16), _shape(rows), of_rows), _shape(rows))
    params = abstract_params(config, by_layer=by_layer).only_layer(2)
    sequence = PromptSequence(_shape(), Angles(table, table))

    def layer(params, active, cached, blended, sequence, index):
        return plain_layer(params, active, cached, blended, sequence, index, config=config)

    arguments = params, active, LayerKV(kv, kv), KVCache(stack, stack), sequence, _shape()
    compiled = compiler("gpu")(layer, *arguments, donate=(3,), options=BY_CUBLAS)
    assert bool(_copied_weights(compiled.as_text())) != by_layer


def test_pages_for_an_h200_are_placed_in_the_cache_without_a_copy():
    stack, rows = _shape(32, 8192, 8, 128, of=jnp.bfloat16), _shape(page_rows(LLAMA3_8B), 8, 128, of=jnp.bfloat16)
    pages = ((rows, rows),) * PAGES_TOGETHER
    compiled = compiler("gpu")(place_pages, KVCache(stack, stack), pages, _shape(PAGES_TOGETHER, 4), donate=(0,))
    memory, launched = compiled.memory_analysis(), count_kernels(compiled.as_text())
    assert memory.alias_size_in_bytes == 2 * 32 * 8192 * 8 * 128 * 2
    assert memory.temp_size_in_bytes == 0
    assert launched.total() == 2 * PAGES_TOGETHER  # K's and V's rows of a page


def _decode_arguments(config, *, by_layer: bool):
    layers = config.num_layers
    cached, table = _shape(layers, 8192, 8, 128, of=jnp.bfloat16), _shape(1, 8192, 64, of=jnp.float32)

    def decode(params, cache, token_id, position, number, limit, is_stop, draw, angles):
        arguments = token_id, position, number, limit, is_stop, draw, angles
        return decode_tokens(params, cache, *arguments, config=config)

    params = abstract_params(config, by_layer=by_layer)
    draw = Draw(_shape(of=jnp.float32), _shape(), _shape(of=jnp.float32), _shape(of=jnp.uint32))
    is_stop, cache = _shape(config.vocab_size, of=bool), GrowingCache(cached, cached, "bfloat16")
    return decode, params, cache, *(_shape() for _ in range(4)), is_stop, draw, Angles(table, table)


@pytest.mark.parametrize("options", [COMPILER_OPTIONS["gpu"], BY_CUBLAS], ids=["triton", "cublas"])
def test_decoding_for_an_h200_copies_no_weights_and_no_cache(options, monkeypatch):
    monkeypatch.setenv(OVERRIDE, "triton")
    arguments = _decode_arguments(_with_layers(4), by_layer=True)
    compiled = compiler("gpu")(*arguments, donate=(1,), options=options)
    assert _copied_weights(compiled.as_text()) == []
    cache = 2 * 4 * 8192 * 8 * 128 * 2
    assert compiled.memory_analysis().alias_size_in_bytes >= cache
    assert compiled.memory_analysis().temp_size_in_bytes < cache / 8


def test_a_whole_blend_compiles_for_a_tpu(monkeypatch):
    # As many layers of Llama 3 8B as a v5e holds weights, KV and embeddings of.
    monkeypatch.setenv(OVERRIDE, "pallas")
    arguments = _blend_arguments(_with_layers(12), 1)
    compiled = compiler("tpu")(*arguments, options=LITTLE_EFFORT)
    text = compiled.as_text()
    assert "selective_attention_tpu" in text
    assert "blend_kv_tpu" in text
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes < 15.75 * 2**30
    assert memory.temp_size_in_bytes < 1.5e9
