"""Programs split over meshes, compiled for TPUs and GPUs without any: kernels run on each device's share."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ahead_of_time import ALL_PASSES, AUTO, GPUS, LITTLE_EFFORT, compiler, no_compilation_cache
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh
from mesh_cases import collectives
from test_ahead_of_time import LLAMA3_8B, _blend_arguments

from cacheblend_jax.model import KVCache
from cacheblend_jax.model.sharding import CACHE_AXES, partition_of
from cacheblend_jax.model.transformer import axis_names
from pallas_kernels import selective_attention
from pallas_kernels.dispatch import OVERRIDE
from pallas_kernels.partition import Partition, splitting

pytestmark = pytest.mark.aot


def test_a_blend_on_eight_tpus_splits_weights_and_kv_and_runs_kernels_on_each_share(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "pallas")
    compiler("tpu")  # skips where there is no compiler
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 8), ("data", "model"), axis_types=AUTO * 2)
    partition = partition_of(mesh, LLAMA3_8B)
    blend, params, request, cached, angles = _blend_arguments(LLAMA3_8B, 1)

    def placed(leaf, *names):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=partition.sharding(*names))

    params = jax.tree.map(lambda leaf, names: placed(leaf, *names), params, axis_names(LLAMA3_8B))
    cached = KVCache(*(placed(x, *CACHE_AXES) for x in (cached.k, cached.v)))
    request, angles = jax.tree.map(placed, (request, angles))
    with jax.sharding.use_abstract_mesh(partition.mesh.abstract_mesh), splitting(partition), no_compilation_cache():
        lowered = jax.jit(blend, donate_argnums=2).lower(params, request, cached, angles)
        compiled = lowered.compile(compiler_options=LITTLE_EFFORT | ALL_PASSES)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "selective_attention_tpu" in text
    assert "blend_kv_tpu" in text
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, cached)))
    assert memory.argument_size_in_bytes < 1.02 * held / 8  # norms and angles are on each
    assert memory.temp_size_in_bytes < 1e9
    of_kv = [
        shape for _, shape in collectives(text) if not re.fullmatch(r"bf16\[\d+,4096\]|f32\[(128256|4,\d+)\]", shape)
    ]
    assert of_kv == []  # hidden states, logits, and what a selection compares


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_attention_on_two_gpus_reads_each_ones_heads(implementation):
    device = GPUS["H200"]
    compiler("gpu")
    devices = topologies.get_topology_desc(platform="cuda", topology="1x1x2", target_config=device.config).devices
    mesh = jax.sharding.Mesh(np.array(devices), ("model",), axis_types=AUTO)
    partition = Partition(mesh, (("heads", ("model",)), ("kv_heads", ("model",))))
    gpu = AbstractDevice(device_kind=device.name, num_cores=device.multiprocessors, platform="gpu")

    def shape(*sizes, names=(), of=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, of, sharding=partition.sharding(*names))

    def attend(q, k, v, positions):
        return selective_attention(q, k, v, positions, return_lse=True, implementation=implementation)

    keys = shape(8192, 8, 128, names=(None, "kv_heads"))
    queries, positions = shape(1229, 32, 128, names=(None, "heads")), shape(1229, of=jnp.int32)
    abstract = AbstractMesh((2,), ("model",), axis_types=AUTO, abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(abstract), splitting(partition), no_compilation_cache():
        compiled = jax.jit(attend).lower(queries, keys, keys, positions).compile(compiler_options=ALL_PASSES)
    assert implementation in compiled.as_text()
    assert collectives(compiled.as_text()) == []
    assert compiled.memory_analysis().argument_size_in_bytes == (1229 * 32 + 2 * 8192 * 8) // 2 * 128 * 2 + 1229 * 4
