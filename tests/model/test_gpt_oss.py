"""gpt-oss's checkpoints: experts in tensors of all of a layer, in bfloat16 or in MXFP4."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import HF, refusal
from safetensors.numpy import load_file, save_file

import cacheblend_jax as cb

pytestmark = pytest.mark.once
LAYERS, EXPERTS, SIZES = 3, 4, {"gate_up_proj": (64, 32), "down_proj": (32, 32)}  # [out, in]
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
QUANTISED = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}
Tensors = dict[str, np.ndarray]


def quantised(directory: Path, change: Callable[[Tensors], object] = lambda tensors: None) -> dict[str, np.ndarray]:
    """Writes a checkpoint with drawn experts in MXFP4, its scales in a file of their own; returns the experts."""
    shutil.copytree(HF / "gpt_oss", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | QUANTISED))
    rng, wanted, scales = np.random.default_rng(0), {}, {}
    tensors = load_file(directory / "model.safetensors")
    for layer in range(LAYERS):
        for name, (outputs, inputs) in SIZES.items():
            at = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[at]
            codes = rng.integers(0, 16, (EXPERTS, outputs, inputs))
            exponents = rng.integers(120, 130, (EXPERTS, outputs, inputs // 32))
            wanted[at] = np.take(FP4, codes) * 2.0 ** np.repeat(exponents - 127, 32, axis=-1)
            packed = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
            tensors[f"{at}_blocks"] = packed.reshape(EXPERTS, outputs, inputs // 32, 16)
            scales[f"{at}_scales"] = exponents.astype(np.uint8)
    change(tensors)
    save_file(tensors, directory / "model-00001-of-00002.safetensors")
    save_file(scales, directory / "model-00002-of-00002.safetensors")
    (directory / "model.safetensors").unlink()
    files = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    files |= dict.fromkeys(scales, "model-00002-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return wanted


def test_experts_in_mxfp4_are_dequantised(tmp_path):
    wanted = quantised(tmp_path / "mx")
    model, original = cb.load_model(tmp_path / "mx", dtype="float32"), cb.load_model(HF / "gpt_oss", dtype="float32")
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp.experts."
        ours = model.params.layers["experts"]
        matrices = wanted[f"{at}gate_up_proj"].swapaxes(1, 2)
        np.testing.assert_array_equal(ours["gate_proj"]["kernel"][layer], matrices[..., 0::2])
        np.testing.assert_array_equal(ours["up_proj"]["kernel"][layer], matrices[..., 1::2])
        np.testing.assert_array_equal(ours["down_proj"]["kernel"][layer], wanted[f"{at}down_proj"].swapaxes(1, 2))
    theirs = original.params.layers["experts"]
    np.testing.assert_array_equal(ours["up_proj"]["bias"], theirs["up_proj"]["bias"])
    assert model.fingerprint != original.fingerprint


FIRST = "model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{FIRST}gate_up_proj_blocks"), f"among them {FIRST}0.gate_proj.weight"),
        (
            lambda tensors: tensors.pop(f"{FIRST}down_proj_bias"),
            f"4 tensors are missing, among them {FIRST}0.down_proj",
        ),
        (
            lambda tensors: tensors.update({f"{FIRST}down_proj_bias": np.zeros((3, 32), np.float32)}),
            f"{FIRST}down_proj_bias has shape [3, 32], which is none of 2 dimensions with expert 3 among the first",
        ),
        (
            lambda tensors: tensors.update({f"{FIRST}down_proj_blocks": np.zeros((4, 32, 1, 8), np.uint8)}),
            f"{FIRST}down_proj is U8 of shape [4, 32, 1, 8], which is no MXFP4: that is U8, the last dimension 16",
        ),
        (
            lambda tensors: tensors.update({f"{FIRST}down_proj_blocks": np.zeros((4, 30, 1, 16), np.uint8)}),
            f"{FIRST}0.down_proj.weight has shape [30, 32], the configuration asks for [32, 32]",
        ),
    ],
    ids=["no blocks", "no bias", "an expert too few", "blocks too small", "outputs too few"],
)
def test_experts_that_are_incomplete_are_named(change, message, tmp_path):
    quantised(tmp_path / "mx", change)
    assert message in refusal(tmp_path / "mx")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\), which is not supported"),
        (QUANTISED | {"architectures": ["MixtralForCausalLM"]}, r"quantised \(mxfp4\), which is not supported"),
        ({"swiglu_limit": 0}, "swiglu_limit must be a number in"),
    ],
)
def test_what_is_not_read_is_named(changes, message, tmp_path):
    shutil.copytree(HF / "gpt_oss", tmp_path / "it")
    path = tmp_path / "it" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert re.search(message, refusal(tmp_path / "it"))
