"""What of the GPU benchmark runs on a CPU: its checks, its counts, its predictions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scripts import gpu_bench


def test_a_tiny_run_checks_against_float64_and_writes_json(tmp_path):
    path = tmp_path / "bench.json"
    options = "--keys 64 --heads 4 --kv-heads 2 --head-dim 32 --dtype float32 --repeats 1 --json".split()
    gpu_bench.main([*options, str(path)])
    report = json.loads(path.read_text())
    assert report["errors"]["xla"] < 1e-5
    assert {row["name"] for row in report["attention"]} == {"xla", "dense", "causal", "cudnn"}
    assert report["sweep"] == []


def test_work_is_counted_by_what_is_visible():
    assert gpu_bench.visible_flops(np.asarray([0, 4]), heads=2, head_dim=8) == 4 * 2 * 8 * (1 + 5)


def test_predictions_name_only_chips_and_backends_that_we_know():
    assert gpu_bench.predicted_seconds(989 * 10**12, "NVIDIA H200", "mosaic_gpu") == pytest.approx(1 / 0.55)
    assert gpu_bench.predicted_seconds(1, "NVIDIA H200", "xla") is None
    assert gpu_bench.predicted_seconds(1, "cpu", "mosaic_gpu") is None
