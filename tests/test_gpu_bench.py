"""What of the GPU benchmark runs on a CPU: its checks, its counts, its predictions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import cacheblend_jax as cb
from cacheblend_jax.evaluation import whole_prefills
from scripts import gpu_bench
from scripts.bench_parts import models, predictions
from scripts.bench_parts.operations import visible_flops

TINY = "--keys 64 --heads 4 --kv-heads 2 --head-dim 32 --dtype float32 --repeats 1 --copy-mb 1 --matmul 64".split()
TINY += "--shapes tiny --lengths 256 --kernels xla".split()
HERE = [*TINY, "--limit", "0"]
# What this project needs and images for GPUs lack, or have in versions of their own.
MISSING = "platformdirs google_crc32c orbax transformers tensorstore safetensors huggingface_hub jinja2 tqdm etils"


@pytest.mark.once
def test_a_tiny_run_of_all_parts_checks_measures_and_writes_json(tmp_path, capsys, monkeypatch):
    # Each stage more is a fifth more to compile.
    monkeypatch.setattr(whole_prefills, "BlendConfig", partial(cb.BlendConfig, num_stages=1))
    path = tmp_path / "bench.json"
    gpu_bench.main([*HERE, "--json", str(path), "--profile", str(tmp_path / "profile")])
    report = json.loads(path.read_text())
    checked = {(row["op"], row["name"]): row for row in report["check"]}
    assert set(checked) == {("selective_attention", "xla"), ("blend_kv", "xla")}
    assert all(0 < row["error_of_allowed"] < 2 for row in checked.values())
    assert report["check model"][0]["error_to_reference"] < 1e-5
    assert {row["name"] for row in report["limits"]} == {"copy", "matmul"}
    timed = {(row["case"], row["name"]) for row in report["attention"]}
    assert timed >= {(case, "xla") for case in ("one", "few", "scattered", "full")}
    assert timed >= {("one", "dense"), ("scattered", "tokamax"), ("full", "causal"), ("full", "cudnn")}
    assert report["blend_kv"][0]["gb_s"] > 0
    modes = {row["name"]: row for row in report["model"]}
    assert list(modes) == ["full", "blend", "reuse", "decode"]
    assert all(row["compile_s"] > 0 and row["ms"] > 0 for row in modes.values())
    assert modes["reuse"]["tflops"] * modes["reuse"]["ms"] < modes["blend"]["tflops"] * modes["blend"]["ms"]
    assert {name.removesuffix(".hlo.txt") for name in os.listdir(tmp_path / "profile")} == {
        *(f"tiny-256-xla-link-{name}.json" for name in ("host", "device")),
        "tiny-256-xla",
        *(f"tiny-256-xla-{name}" for name in modes),
    }
    spent = {(row["stage"], row["kind"]): row for row in report["stages"]}
    assert {stage for stage, _ in spent} >= {"0", "1", "all"}
    assert all(spent[stage, kind]["ms"] > 0 for stage in "01" for kind in ("matmul", "attention"))
    assert sum(row["share"] for row in spent.values() if row["stage"] != "all") == pytest.approx(1)
    assert 0 < spent["all", "neither matmul nor attention"]["share"] < 1
    if find_spec("torch"):
        assert [row["name"] for row in report["torch"]] == ["torch sdpa", "torch full"]
        assert report["torch"][1]["ms"] > 0
    ways = {"device", "load", "host", "staged load", "staged", "query", "query staged", "full"}
    assert {row["name"] for row in report["link"]} == ways | {"how"}
    assert report["sweep"] == []
    assert "efficiency" in capsys.readouterr().out


def test_it_runs_where_little_is_installed(tmp_path):
    """In a process of its own, which starts another: in neither can the modules be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {MISSING.split()}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    path, script = tmp_path / "bench.json", Path(gpu_bench.__file__)
    command = [sys.executable, str(script), *TINY, "--only", "model", "limits", "--json", str(path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert [row.get("error") for row in report["model"] + report["limits"]] == [None] * 6
    absent = [sys.executable, "-c", "import platformdirs"]
    assert subprocess.run(absent, env=environment, capture_output=True).returncode


def test_a_part_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    def fail(options):
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setitem(gpu_bench.PARTS, "attention", gpu_bench.Part(fail))
    path = tmp_path / "bench.json"
    report = gpu_bench.main([*HERE, "--only", "attention", "limits", "--json", str(path)])
    assert report["attention"] == [{"name": "attention", "error": "RuntimeError: no such thing"}]
    assert report["limits"][0]["ms"] > 0
    assert json.loads(path.read_text())["attention"] == report["attention"]


SAYS_A_ROW = """
import json, os, signal, time
print(json.dumps({"device": "a card"}))
print(json.dumps({"row": {"name": "copy"}}), flush=True)
"""


@pytest.mark.parametrize(
    ("then", "limit", "how"),
    [
        ("time.sleep(60)", 3, "ran for more than 3 s"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 60, "was killed by signal 11: it said nothing"),
        ("raise SystemExit('no card')", 60, "exited with 1: no card"),
    ],
)
def test_a_part_that_does_not_end_well_leaves_the_rows_that_it_had(then, limit, how, monkeypatch, tmp_path):
    ended, path, written = gpu_bench.ended, tmp_path / "bench.json", []

    def instead(command, environment, limit_seconds, heard):
        def heard_and_written(said):
            heard(said)
            written.append(len(json.loads(path.read_text())["model"]))

        return ended([command[0], "-c", SAYS_A_ROW + then], environment, limit_seconds, heard_and_written)

    monkeypatch.setattr(gpu_bench, "ended", instead)
    report = gpu_bench.main([*TINY, "--limit", str(limit), "--only", "model", "--json", str(path)])
    assert report["device"] == "a card"
    assert written == [0, 1]  # row by row, while the process runs
    case = {"shapes": "tiny", "lengths": 256, "kernels": "xla"}
    assert report["model"] == [{"name": "copy"}, {"name": "model"} | case | {"error": how}]


def test_each_model_length_and_kind_of_kernels_has_a_limit_of_its_own():
    options = gpu_bench.parse("--shapes tiny llama-3-8b --lengths 1 2 --kernels pallas xla".split())
    assert len(list(gpu_bench.cases("model", options))) == 8
    assert next(gpu_bench.cases("model", options)) == {"shapes": ["tiny"], "lengths": [1], "kernels": ["pallas"]}
    assert list(gpu_bench.cases("limits", options)) == [{}]


def test_work_is_counted_by_what_is_visible():
    assert visible_flops(np.asarray([0, 4]), heads=2, head_dim=8) == 4 * 2 * 8 * (1 + 5)


def test_predictions_name_only_chips_and_backends_that_we_know():
    seconds = predictions.seconds_for_flops
    assert seconds(989 * 10**12, "NVIDIA H200", "mosaic_gpu full") == pytest.approx(1 / 0.5)
    assert seconds(1, "NVIDIA H200", "a rival") is None
    assert seconds(1, "cpu", "mosaic_gpu full") is None


def test_predictions_are_near_what_was_measured_on_an_h200():
    """docs/results.md: 195.9 ms for a full prefill of 8192 tokens of the Llama 3 8B shape."""
    config = models.config_of("llama-3-8b", "bfloat16")
    flops = models.prefill_flops(config, [np.arange(8192)] * config.num_layers)
    assert predictions.seconds_for_flops(flops, "NVIDIA H200", "prefill full") == pytest.approx(0.1959, rel=0.02)
    scattered = visible_flops(np.linspace(0, 8191, 1229).astype(int), 32, 128)
    found = predictions.seconds_for_flops(scattered, "NVIDIA H200", "mosaic_gpu scattered")
    assert found == pytest.approx(191e-6, rel=0.05)
