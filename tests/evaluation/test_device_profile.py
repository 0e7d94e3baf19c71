"""A profile's time is assigned to stages and kinds of work, whatever names XLA left to the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cacheblend_jax.evaluation.device_profile import rows_of

# Of the program of a blend on an H200 (jax 0.11.2): its lines, without what is not read.
FUSED = """
%fused_convert.2 (param_0: bf16[8,4]) -> bf16[8,4] {
  %param_0 = bf16[8,4]{1,0} parameter(0)
  ROOT %convert.1 = bf16[8,4]{1,0} convert(%param_0), metadata={op_name="jit(traced)/stage_0/queries/convert"}
}

%gemm_fusion_dot_general.225_computation (a: bf16[8,4], b: bf16[4,1]) -> bf16[8,1] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,1]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,1]{1,0} dot(%a, %b), metadata={op_name="jit(traced)/stage_1/keys_values/dot_general"}
}

ENTRY %main.1 (p: bf16[8,4], w: bf16[4,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0), metadata={op_name="hidden"}
  %w = bf16[4,4]{1,0} parameter(1), metadata={op_name="weights"}
"""
# Instruction, opcode, its other attributes, and what follows `jit(traced)/` in its name.
RUN = [
    ("loop_convert_fusion.2", "fusion", "calls=%fused_convert.2", "stage_0/queries/convert"),
    ("custom-call.127", "custom-call", 'custom_call_target="__cublas$lt$matmul"', "stage_0/queries/dot_general"),
    ("mpmd_map.96", "custom-call", 'custom_call_target="mosaic_gpu_v2"', "stage_0/selective_attention/mpmd_map"),
    ("gemm_fusion_dot_general.225", "fusion", "calls=%gemm_fusion_dot_general.225_computation", None),
    ("custom-call.128", "custom-call", 'custom_call_target="__cublas$gemm"', "stage_1/finish/dot_general"),
]


def _text(*, names_products: bool) -> str:
    """The program's text; older releases leave calls of cuBLAS no name of their own."""
    lines = []
    for name, opcode, attributes, source in RUN:
        keeps_name = source is not None and (names_products or "cublas" not in attributes)
        metadata = f', metadata={{op_name="jit(traced)/{source}" stack_frame_id=1}}' if keeps_name else ""
        lines.append(f"  %{name} = bf16[8,4]{{1,0}} {opcode}(%p, %w), {attributes}{metadata}")
    return FUSED + "\n".join(lines) + "\n}\n"


def _profile(device: dict[str, tuple[str | None, float]]):
    """A profile of one GPU: by kernel, the instruction that it belongs to and its milliseconds; and of its host."""

    def events(of):
        return [
            SimpleNamespace(name=name, duration_ns=1e6 * ms, stats=[] if op is None else [("hlo_op", op)])
            for name, (op, ms) in of.items()
        ]

    def plane(name, line, of):
        return SimpleNamespace(name=name, lines=[SimpleNamespace(name=line, events=events(of))])

    launches = {"launch": ("custom-call.127", 50.0)}
    return SimpleNamespace(
        planes=[plane("/host:CPU", "python", launches), plane("/device:GPU:0", "Stream #13(Compute)", device)]
    )


KERNELS = {
    "loop_convert_fusion_2": ("loop_convert_fusion.2", 1.0),
    "nvjet_sm90_tst_128x160": ("custom-call.127", 4.0),
    "selective_attention_mosaic_gpu_kernel": ("mpmd_map.96", 3.0),
    "gemm_fusion_dot_general_225": ("gemm_fusion_dot_general.225", 2.0),
    "nvjet_sm90_tst_256x128": ("custom-call.128", 5.0),
}


@pytest.mark.parametrize("names_products", [True, False])
def test_products_are_products_of_their_stage_whatever_is_left_of_their_names(names_products):
    rows = rows_of(_profile(KERNELS), _text(names_products=names_products))
    found = {(row["stage"], row["kind"]): row["ms"] for row in rows}
    assert found == {("0", "attention"): 3, ("0", "matmul"): 4, ("0", "other"): 1, ("1", "matmul"): 7}


def test_a_librarys_kernels_without_an_instruction_are_known_by_their_own_names():
    kernels = {name: (None if "nvjet" in name else op, ms) for name, (op, ms) in KERNELS.items()}
    rows = rows_of(_profile(kernels), _text(names_products=True))
    assert sum(row["ms"] for row in rows if row["kind"] == "matmul") == 4 + 2 + 5
    assert sum(row["share"] for row in rows) == pytest.approx(1)
