"""The command `plan`."""

from __future__ import annotations

import json

import pytest
from conftest import unchecked

from cacheblend_jax.cli.main import main

WORKLOAD = ["plan", "--shape", "gemma-2-9b", "--context", "4096", "--devices", "2", "--requests-per-s", "3"]


@pytest.fixture(autouse=True)
def _quickly():
    with unchecked():
        yield


def test_plan_prints_tables_and_writes_json(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main([*WORKLOAD, "--tier", "raid:2GB:0.0001:0.5", "--stored-chunks", "1000", "--json", str(out)]) == 0
    printed, plan = capsys.readouterr().out, json.loads(out.read_text())
    chunk = 2 * 42 * 8 * 256 * 512 * 2
    assert plan["chunk_bytes"]["bfloat16"] == chunk
    assert plan["stored_bytes"] == 1000 * chunk
    assert plan["storage_cost"] == pytest.approx(1000 * chunk / 1e9 * 0.5)
    assert plan["tier"] == {"name": "raid", "bytes_per_s": 2e9, "latency_s": 0.0001, "price_per_gb_month": 0.5}
    for mode in ("full", "prefix", "reuse", "blend"):
        line = next(line for line in printed.splitlines() if line.startswith(f"{mode} "))
        assert line.endswith(f"  {plan['modes'][mode]['binds']}")
        assert f"{plan['modes'][mode]['ttft_s']:.3f}" in printed
    assert "2 x NVIDIA H100 SXM a replica; 3 requests/s of 4,096 tokens: 7 chunks of 512, 6 of them stored" in printed


def test_plan_prices_nothing_that_does_not_fit_and_warns_of_devices_that_repeat_work(capsys):
    assert main(["plan", "--shape", "llama-3-70b", "--context", "4096", "--ratio", "0.15", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert "no costs, for a blend does not fit" in printed.err + printed.out
    assert main([*WORKLOAD, "--devices", "3"]) == 0
    assert "warning: 3 devices split a layer's products into 1 parts alone" in capsys.readouterr().out


def test_plan_takes_prices(capsys):
    prices = ["--price-per-device-hour", "0", "--price-per-gb-month", "0", "--ratio", "0.15", "--json", "-"]
    assert main([*WORKLOAD, *prices]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["device_cost"], plan["storage_cost"]) == (0, 0)
    assert plan["modes"]["blend"]["ratio"] == 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tier", "tape"], "unknown tier 'tape'; expected one of device, host, nvme, network, object, or NAME:"),
        (["--tier", "raid:fast"], "--tier 'raid:fast' is not NAME:BYTES_PER_S[:LATENCY_S[:USD]], such as raid:12GB:"),
        (["--tier", "raid:1GB:1:2:3"], "--tier 'raid:1GB:1:2:3' is not NAME:BYTES_PER_S[:LATENCY_S[:USD]]"),
        (["--price-per-device-hour", "nan"], "price_per_device_hour must be at least 0 and finite, got nan"),
        (
            ["--tier", "host"],
            "100,000 stored chunks take 17616.1 GB, and tier 'host' has 0.0; keep fewer, give it more",
        ),
        (["--ratio", "half"], "--ratio must be auto or a number in [0, 1], got 'half'"),
        (["--device", "H900"], "unknown device 'H900'; expected one of H100, H200, A100, L4, T4, v5e, v6e"),
        (["--context", "100"], "context must hold a chunk and the question, 512 + 64 tokens, got 100"),
        (["--context", "9000"], "context must be at most 8192 tokens, which the model takes, got 9000: --context N"),
        (["--answer-s", "1e308"], "answer_s must be at most 1e+18"),
        (["--stored-chunks", "1" * 400], "stored_chunks must be at most 1e+18"),
        (["--tier", "raid:" + "1" * 400], f"--tier 'raid:{'1' * 400}' is not NAME:BYTES_PER_S"),
        (["--devices", "1" * 400], "num_devices must be at most 1e+18"),
        (["--price-per-device-hour", "1e200"], "price_per_device_hour must be at most 1e+18"),
        (["--profile", "missing.json"], "cannot read the profile missing.json: "),
        (["--price-per-gb-month", "-1"], "tier 'nvme': price_per_gb_month must be at least 0 and finite, got -1.0"),
    ],
)
def test_plan_names_what_makes_no_sense(capsys, options, message):
    assert main([*WORKLOAD, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cacheblend-jax: error: {message}")
    assert error.count("\n") == 1
