"""Compilation for an H200 and a TPU v5e on a machine that has neither; what it needs is in docs/kernels.md."""

from __future__ import annotations

import os
from contextlib import contextmanager
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")  # registers and spills, read by the tests
INSTALL = "pip install --no-deps jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0} nvidia-cuda-nvcc nvidia-nvvm libtpu"
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class Compiler:
    """Compiles functions of shapes for one device that is not there."""

    def __init__(self, platform: str):
        if platform == "gpu":
            topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
            device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
        else:
            topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
            device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
        self.mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
        self.abstract_mesh = self.mesh.abstract_mesh
        if self.abstract_mesh.abstract_device is None or jax.__version_info__ >= (0, 12):
            self.abstract_mesh = AbstractMesh((1,), ("x",), abstract_device=device)

    def shape(self, shape, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def __call__(self, function, *arguments, donate: tuple[int, ...] = (), options: dict | None = None):
        """The compiled program; `donate`: positions of arguments, `options`: the compiler's, by the names of flags."""
        arguments = jax.tree.map(lambda x: self.shape(x.shape, x.dtype), arguments)
        as_users_compile = {"xla_backend_optimization_level": 3} | (options or {})  # other tests compile for speed
        with jax.sharding.use_abstract_mesh(self.abstract_mesh), no_compilation_cache():
            lowered = jax.jit(function, donate_argnums=donate).trace(*arguments).lower()
            return lowered.compile(compiler_options=as_users_compile)


@contextmanager
def no_compilation_cache():
    # A program from the cache was not compiled: it would print no registers.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def compiler(platform: str) -> Compiler:
    """The compiler for `"gpu"` or `"tpu"`; skips the test, naming the install command, where a wheel is missing."""
    needed = ("jax_cuda13_plugin", "nvidia") if platform == "gpu" else ("libtpu",)
    if any(find_spec(name) is None for name in needed):
        pytest.skip(f"needs compiler wheels: {INSTALL.format(jax.__version__)}")
    return Compiler(platform)
