"""Compilation for GPUs and TPUs on a machine that has neither; what it needs is in docs/kernels.md."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")  # registers and spills, read by the tests
INSTALL = "pip install --no-deps jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0} nvidia-cuda-nvcc nvidia-nvvm libtpu"
AUTO = (AxisType.Auto,)  # from jax 0.12 on meshes are explicit by default
NO_SPILL = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
# For blends of whole models on a TPU: a quarter of the time. Programs then have the same kernels, and 6 % more memory.
LITTLE_EFFORT = {"exec_time_optimization_effort": -1.0}
ALL_PASSES = {"xla_disable_hlo_passes": ""}  # other tests compile without some (tests/conftest.py)


class Gpu(NamedTuple):
    """What XLA asks of a GPU, as NVIDIA's data sheets and CUDA's tables of compute capabilities have it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    fpus: int  # float32, of a multiprocessor
    threads: int  # resident, of a multiprocessor
    shared_kib: int  # of a multiprocessor
    l2_mib: int
    memory_gb: int
    gb_s: int
    ghz: float

    @property
    def block_kib(self) -> int:
        """Shared memory that a block may have: from Ampere on the system keeps 1 KiB of each block's."""
        return self.shared_kib - (self.capability >= (8, 0))

    @property
    def config(self) -> str:
        """XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_kib * 1024} shared_memory_per_block_optin: {self.block_kib * 1024}
  threads_per_core_limit: {self.threads} core_count: {self.multiprocessors} fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.gb_s}000000000 l2_cache_size: {self.l2_mib * 2**20} clock_rate_ghz: {self.ghz}
  device_memory_size: {self.memory_gb}000000000 cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{self.name}"
"""


GPUS = {
    "T4": Gpu("Tesla T4", (7, 5), 40, 64, 1024, 64, 4, 16, 320, 1.59),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164, 40, 85, 2039, 1.41),
    "L4": Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 100, 48, 24, 300, 2.04),
    "H100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 50, 85, 3352, 1.98),
    "H200": Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 228, 60, 150, 4800, 1.98),
    "B200": Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 228, 126, 191, 7672, 1.965),
}
TPUS = {"TPU v5e": "v5e:2x2", "TPU v6e": "v6e:2x2"}  # CI finds the tests that need libtpu by `tpu` in their names


class Compiler:
    """Compiles functions of shapes for one device that is not there: one of `GPUS` or `TPUS`."""

    def __init__(self, chip: str):
        if chip in GPUS:
            gpu = GPUS[chip]
            topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=gpu.config)
            device = AbstractDevice(device_kind=gpu.name, num_cores=gpu.multiprocessors, platform="gpu")
        else:
            topology = topologies.get_topology_desc(TPUS[chip], platform="tpu")
            device = AbstractDevice(device_kind=topology.devices[0].device_kind, num_cores=1, platform="tpu")
        self.device_kind = device.device_kind
        self.mesh = Mesh(np.array(topology.devices[:1]), ("x",), axis_types=AUTO)
        self.abstract_mesh = AbstractMesh((1,), ("x",), axis_types=AUTO, abstract_device=device)

    def shape(self, shape, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec()))

    def __call__(self, function, *arguments, donate: tuple[int, ...] = (), options: dict | None = None):
        """The compiled program; `donate`: positions of arguments, `options`: the compiler's, by the names of flags."""
        arguments = jax.tree.map(lambda x: self.shape(x.shape, x.dtype), arguments)
        as_users_compile = {"xla_backend_optimization_level": 3} | ALL_PASSES | (options or {})
        with jax.sharding.use_abstract_mesh(self.abstract_mesh), no_compilation_cache():
            lowered = jax.jit(function, donate_argnums=donate).trace(*arguments).lower()
            return lowered.compile(compiler_options=as_users_compile)

    def shared_kib(self, function, *arguments, options: dict | None = None) -> dict[str, float]:
        """Compiles for a GPU; the shared memory of a block, by kernel: the most of any of that name."""
        with tempfile.TemporaryDirectory() as directory:
            self(function, *arguments, options={"xla_dump_to": directory} | (options or {}))
            text = next(Path(directory).glob("*.thunk_sequence.txt")).read_text()
        found: dict[str, float] = {}
        for name, size in re.findall(r"\] (\S+) grid:.*shared_memory: (\d+) bytes", text):
            name = re.sub(r"_*\d*$", "", name)
            found[name] = max(found.get(name, 0), int(size) / 1024)
        return found


@contextmanager
def no_compilation_cache():
    # A program from the cache was not compiled: it would print no registers.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def compiler(chip: str) -> Compiler:
    """The compiler for a chip of `GPUS` or `TPUS`; `"gpu"` is an H200, `"tpu"` a v5e.

    Skips the test, naming the install command, where a wheel is missing.
    """
    chip = {"gpu": "H200", "tpu": "TPU v5e"}.get(chip, chip)
    needed = ("jax_cuda13_plugin", "nvidia") if chip in GPUS else ("libtpu",)
    if any(find_spec(name) is None for name in needed):
        pytest.skip(f"needs compiler wheels: {INSTALL.format(jax.__version__)}")
    return Compiler(chip)
