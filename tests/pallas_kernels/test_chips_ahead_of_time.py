"""The chips of the table in docs/kernels.md, compiled for ahead of time: which kernels they use, what those take."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import GPUS, LITTLE_EFFORT, NO_SPILL, TPUS, compiler
from jax.experimental.pallas import mosaic_gpu as plgpu
from test_ahead_of_time import _attention, _blend_arguments, _decode_arguments, _with_layers

from cacheblend_jax.runtime.programs import COMPILER_OPTIONS
from pallas_kernels import selective_attention, tuning
from pallas_kernels.attention import mosaic_gpu, mosaic_gpu_memory, triton
from pallas_kernels.attention.mosaic_gpu_memory import Exponents
from pallas_kernels.dispatch import OVERRIDE, pallas_backends, wrong_platform
from pallas_kernels.target import Target, current_target
from pallas_kernels.tuning import AttentionBlocks, attention_blocks

pytestmark = pytest.mark.aot
TABLE = Path(__file__).parents[2] / "docs" / "kernels.md"
HEAD_DIMS = (64, 128, 256)  # Triton's arrays are as wide, whatever lies between
SERVES = {"mosaic_gpu": ("bfloat16",), "triton": ("bfloat16", "float32"), "tpu": ("bfloat16", "float32")}
VMEM_MIB = {"TPU v5e": 16, "TPU v6e": 32}  # that a kernel may have
# dtype, head_dim, queries. A single query's keys are split, and it has no first key to be masked by.
ON_EVERY_CHIP = [("bfloat16", 128, 1229), ("float32", 64, 1), ("float32", 128, 1229)]
TRITON_CALLS = {
    "A100": [*((dtype, size, 1229) for dtype in ("bfloat16", "float32") for size in HEAD_DIMS), ("float32", 64, 1)],
    "L4": ON_EVERY_CHIP,
    "H100": ON_EVERY_CHIP,
    "B200": [*ON_EVERY_CHIP, ("bfloat16", 64, 1229), ("bfloat16", 256, 1229), ("float32", 256, 1229)],
}


def _rows() -> dict[tuple[str, str], list[str]]:
    """The table's rows by chip and backend: block sizes in bfloat16, those in float32, memory."""
    rows: dict[tuple[str, str], list[str]] = {}
    chips: list[str] = []
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if re.match(r"\| (.*(sm_|TPU )|\|)", line) and len(cells) == 5:
            chips = cells[0].split(" (")[0].split(", ") if cells[0] else chips
            rows |= {(chip, cells[1]): cells[2:] for chip in chips}
    return rows


def _target(chip: str) -> Target:
    if chip in GPUS:
        return Target("gpu", GPUS[chip].name, GPUS[chip].capability)
    return Target("tpu", {"TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}[chip])


def _blocks(backend: str, chip: str, dtype: str) -> str:
    if dtype not in SERVES[backend]:
        return ""
    blocks = [attention_blocks(backend, _target(chip).chip, jnp.dtype(dtype), size) for size in HEAD_DIMS]
    return ", ".join(f"{each.rows} × {each.keys}" for each in blocks)


@pytest.mark.parametrize("chip", [*GPUS, *TPUS])
def test_the_table_has_what_serves_each_chip_and_its_block_sizes(chip):
    target = _target(chip)
    backends = [name for name in pallas_backends(target) if wrong_platform(name, target) is None]
    rows = {backend: cells[:2] for (of, backend), cells in _rows().items() if of == chip}
    assert rows == {name: [_blocks(name, chip, dtype) for dtype in ("bfloat16", "float32")] for name in backends} or (
        rows == {"xla": ["", ""]} and not backends
    )


@pytest.mark.parametrize("chip", [*GPUS, *TPUS])
def test_ahead_of_time_a_chip_is_known_by_its_name(chip):
    with jax.sharding.use_abstract_mesh(compiler(chip).abstract_mesh):
        assert current_target() == _target(chip)


def _calls(of: list[tuple[str, int, int]], implementation: str):
    """One program of several calls, and its arguments."""
    arguments = [_attention(size, jnp.dtype(dtype), queries)[1:] for dtype, size, queries in of]

    def run(arguments):
        return [
            selective_attention(
                q, k, v, at, q_starts=starts if at.size > 1 else None, kv_length=n, implementation=implementation
            )
            for q, k, v, at, starts, n in arguments
        ]

    return run, arguments


@pytest.mark.parametrize("chip", TRITON_CALLS)
def test_attention_by_triton_spills_nothing_and_takes_the_memory_that_the_table_says(chip):
    shared = compiler(chip).shared_kib(*_calls(TRITON_CALLS[chip], "triton"), options=NO_SPILL)
    used = shared["selective_attention_triton"]
    assert _rows()[chip, "triton"][2] == f"{used:.0f} of {GPUS[chip].block_kib} KiB"


@pytest.mark.parametrize("chip", ["A100", "B200"])
def test_a_kernel_that_spills_fails(chip, monkeypatch):
    monkeypatch.setitem(tuning.SELECTIVE_ATTENTION, ("triton", ""), [(2, 256, AttentionBlocks(rows=128, keys=64))])
    with pytest.raises(Exception, match="register spilling"):
        compiler(chip)(*_calls([("bfloat16", 128, 1229)], "triton"), options=NO_SPILL)


def test_a_kernel_beyond_the_shared_memory_of_an_l4_fails(monkeypatch):
    fits_a100 = AttentionBlocks(rows=64, keys=64, stages=4)
    monkeypatch.setitem(tuning.SELECTIVE_ATTENTION, ("triton", ""), [(2, 256, fits_a100)])
    calls = _calls([("bfloat16", 128, 1229)], "triton")
    assert compiler("A100").shared_kib(*calls)["selective_attention_triton"] > GPUS["L4"].block_kib
    with pytest.raises(Exception, match=r"(?i)shared memory"):
        compiler("L4")(*calls)


def test_the_memory_of_the_kernel_for_hopper_is_what_the_table_says():
    taken = []
    for size in HEAD_DIMS:
        blocks = attention_blocks("mosaic_gpu", "NVIDIA H100", jnp.dtype("bfloat16"), size)
        rows, computing = blocks.rows // mosaic_gpu.COMPUTING, mosaic_gpu.COMPUTING
        of = (computing, rows, blocks.keys, blocks.stages, size, jnp.dtype("bfloat16"), Exponents(1.0), True, False)
        scratch = mosaic_gpu_memory.scratch(mosaic_gpu_memory.Shape(*of))
        shared = [each for each in scratch if not isinstance(each, plgpu.Barrier)]
        taken.append(sum(math.prod(each.shape) * jnp.dtype(each.dtype).itemsize for each in shared) / 1024)
    assert _rows()["H100", "mosaic_gpu"][2] == f"{max(taken):.0f} of {GPUS['H100'].block_kib} KiB"


def _by_force(module, **sizes):
    _, q, k, v, *others = _attention(128)
    stacks = [jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in (k, v)]
    arguments = q, *stacks, jax.ShapeDtypeStruct((), jnp.int32), *others
    function = {triton: triton.attend_triton, mosaic_gpu: mosaic_gpu.attend_mosaic_gpu}[module]
    options = {"scale": 0.1, "soft_cap": None, "blocks": AttentionBlocks(**sizes), "interpret": False}
    return partial(function, **options), *arguments


FOR_A_B200 = """
from test_chips_ahead_of_time import _by_force, compiler, mosaic_gpu

compiler("B200")(*_by_force(mosaic_gpu, rows=128, keys=128))
"""


def test_no_other_gpu_runs_the_kernel_for_hopper():
    """As dispatch says before XLA does. In a process of its own: Mosaic GPU compiles for its first GPU ever after."""
    compiler("B200")  # or skips
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", FOR_A_B200], cwd=here, capture_output=True, text=True)
    assert done.returncode != 0
    assert "'nvvm.wgmma.fence.aligned' op is not supported on sm_100a" in done.stderr


def test_a_t4_has_no_triton():
    with pytest.raises(Exception, match="Triton support is only enabled for Ampere"):
        compiler("T4")(*_by_force(triton, rows=64, keys=64))
    compiler("T4")(*_attention(128, implementation="xla"))


@pytest.mark.parametrize("chip", TPUS)
def test_attention_for_a_tpu_takes_the_memory_that_the_table_says(chip):
    assert _rows()[chip, "tpu"][2] == f"within {VMEM_MIB[chip]} MiB"
    calls = [("bfloat16", 128, 1229), *([("float32", 256, 1229)] if "v6e" in chip else [])]  # v5e: test_ahead_of_time
    assert "selective_attention_tpu" in compiler(chip)(*_calls(calls, "tpu")).as_text()


def test_a_kernel_beyond_the_vmem_of_a_tpu_v6e_fails(monkeypatch):
    monkeypatch.setitem(tuning.SELECTIVE_ATTENTION, ("tpu", "v6"), [(2, 256, AttentionBlocks(rows=1024, keys=8192))])
    limit = VMEM_MIB["TPU v6e"]
    with pytest.raises(Exception, match=rf"(?i)vmem[\s\S]* limit {limit}\.00M"):
        compiler("TPU v6e")(*_calls([("bfloat16", 128, 1229)], "tpu"))


@pytest.mark.parametrize(("chip", "kernel"), [("A100", "triton"), ("TPU v6e", "tpu")])
def test_a_blend_and_a_decode_step_of_llama_3_8b_compile(chip, kernel, monkeypatch):
    """All kinds of layers at the real sizes: before the check layer, at it, at a stage's border, after it, the last."""
    monkeypatch.setenv(OVERRIDE, "pallas")
    by_layer, config = chip in GPUS, _with_layers(4)
    options = COMPILER_OPTIONS["gpu"] | NO_SPILL if chip in GPUS else None
    blend = compiler(chip)(*_blend_arguments(config, 1, by_layer=by_layer), options=options or LITTLE_EFFORT)
    decode = compiler(chip)(*_decode_arguments(config, by_layer=by_layer), donate=(1,), options=options)
    assert f"blend_kv_{kernel}" in blend.as_text()
    for program in (blend, decode):
        assert f"selective_attention_{kernel}" in program.as_text()
    assert blend.memory_analysis().temp_size_in_bytes < 2e9  # scores of tokens by tokens: 8.6 GB
    cache = 2 * 4 * 8192 * 8 * 128 * 2
    assert decode.memory_analysis().alias_size_in_bytes >= cache
    # A layer's slices are copied for the kernel, and for a TPU's turned round.
    assert decode.memory_analysis().temp_size_in_bytes < cache * 2 / 3
