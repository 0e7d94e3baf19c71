"""What of the GPU benchmark runs on a CPU: its checks, its counts, its predictions."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

from scripts import gpu_bench

TINY = "--keys 64 --heads 4 --kv-heads 2 --head-dim 32 --dtype float32 --repeats 1 --copy-mb 1 --matmul 64".split()
TINY += "--shapes tiny --lengths 256 --kernels xla --limit 0".split()


@pytest.mark.once
def test_a_tiny_run_of_all_parts_checks_measures_and_writes_json(tmp_path, capsys):
    path = tmp_path / "bench.json"
    gpu_bench.main([*TINY, "--json", str(path), "--profile", str(tmp_path / "profile")])
    report = json.loads(path.read_text())
    errors = {(row["op"], row["name"]): row.get("error_to_reference") for row in report["check"]}
    assert errors["selective_attention", "xla"] < 1e-5
    assert errors["blend_kv", "xla"] < 1e-5
    assert errors["whole blend", "xla"] < 1e-5
    assert {row["name"] for row in report["limits"]} == {"copy", "matmul"}
    timed = {(row["case"], row["name"]) for row in report["attention"]}
    assert timed >= {(case, "xla") for case in ("one", "few", "scattered", "full")}
    assert timed >= {("one", "dense"), ("scattered", "tokamax"), ("full", "causal"), ("full", "cudnn")}
    assert report["blend_kv"][0]["gb_s"] > 0
    assert [row["name"] for row in report["model"]] == ["full", "blend"]
    assert report["model"][1]["efficiency"] > 0
    assert report["model"][1]["compile_s"] > 0
    assert any((tmp_path / "profile").rglob("*"))
    spent = {(row["stage"], row["kind"]): row for row in report["stages"]}
    assert {stage for stage, _ in spent} >= {"0", "1", "all"}
    assert all(spent[stage, kind]["ms"] > 0 for stage in "01" for kind in ("matmul", "attention"))
    assert sum(row["share"] for row in spent.values() if row["stage"] != "all") == pytest.approx(1)
    assert 0 < spent["all", "neither matmul nor attention"]["share"] < 1
    if find_spec("torch"):
        assert [row["name"] for row in report["torch"]] == ["torch sdpa", "torch full"]
        assert report["torch"][1]["ms"] > 0
    assert report["sweep"] == []
    assert "efficiency" in capsys.readouterr().out


def test_a_part_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    def fail(options):
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setitem(gpu_bench.PARTS, "attention", fail)
    path = tmp_path / "bench.json"
    report = gpu_bench.main([*TINY, "--only", "attention", "limits", "--json", str(path)])
    assert report["attention"] == [{"name": "attention", "error": "RuntimeError: no such thing"}]
    assert report["limits"][0]["ms"] > 0
    assert json.loads(path.read_text())["attention"] == report["attention"]


def test_a_part_that_does_not_end_leaves_the_rows_that_it_had(monkeypatch):
    script = (
        "import json, sys, time\n"
        "path = sys.argv[sys.argv.index('--json') + 1]\n"
        "open(path, 'w').write(json.dumps({'device': 'a card', 'limits': [{'name': 'copy', 'ms': 1.0}]}))\n"
        "time.sleep(60)\n"
    )
    run = gpu_bench.subprocess.run
    monkeypatch.setattr(
        gpu_bench.subprocess, "run", lambda command, **options: run([command[0], "-c", script, *command[2:]], **options)
    )
    report = gpu_bench.in_a_process("limits", ["--keys", "64"], 1)
    assert report["device"] == "a card"
    assert report["limits"] == [{"name": "copy", "ms": 1.0}, {"name": "limits", "error": "did not end within 1 s"}]


def test_a_part_that_dies_says_so(monkeypatch):
    died = gpu_bench.subprocess.CompletedProcess((), -11)
    monkeypatch.setattr(gpu_bench.subprocess, "run", lambda command, **options: died)
    assert gpu_bench.in_a_process("check", [], 1) == {"check": [{"name": "check", "error": "ended with status -11"}]}


def test_work_is_counted_by_what_is_visible():
    assert gpu_bench.visible_flops(np.asarray([0, 4]), heads=2, head_dim=8) == 4 * 2 * 8 * (1 + 5)


def test_predictions_name_only_chips_and_backends_that_we_know():
    assert gpu_bench.predicted_seconds(989 * 10**12, "NVIDIA H200", "mosaic_gpu") == pytest.approx(1 / 0.55)
    assert gpu_bench.predicted_seconds(1, "NVIDIA H200", "a rival") is None
    assert gpu_bench.predicted_seconds(1, "cpu", "mosaic_gpu") is None
