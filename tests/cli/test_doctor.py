"""The command `doctor`, and `--kernels` of the others."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from cacheblend_jax.cli.main import main
from cacheblend_jax.evaluation import doctor
from pallas_kernels.proving.identity import Place
from pallas_kernels.proving.prove import Outcome, UnprovenError
from pallas_kernels.proving.remembered import recall, remember
from pallas_kernels.verdicts import Trial, Verdict, Verdicts

GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0", local_hardware_id=0)
FOUND = Verdict("selective_attention", "triton", "bfloat16", 128, "full", 0.25, 1e-3, 2e-3)
SLOW = Verdict("selective_attention", "triton", "bfloat16", 128, "one", 0.25, 4e-3, 2e-3)
TRIED = Trial("selective_attention", "triton", "bfloat16", 128)
FAILED = Trial("blend_kv", "triton", "bfloat16", 128, "ran for more than 300 s (a case)")


def verdicts() -> Verdicts:
    place = Place.of(GPU)
    return Verdicts(place.target, place.identity, (FOUND, SLOW), (TRIED, FAILED))


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [GPU, GPU])
    monkeypatch.setattr(doctor, "describe_first_device", lambda: Place.of(GPU))


def test_doctor_shows_versions_and_devices(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"jax {jax.__version__}" in printed
    assert "kernels: XLA's" in printed


def test_doctor_shows_what_is_remembered_of_a_gpu(on_a_gpu, capsys):
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.count("kernels: not proven yet") == 1
    remember(verdicts())
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "gpu (NVIDIA A100), compute capability 8.0"
    assert printed[2].endswith("error 0.25 of what rounding allows; full 2.00x (1 ms); one 0.50x (4 ms, not used)")
    assert printed[3].endswith("not used: ran for more than 300 s (a case); tried: bfloat16 128")


def test_doctor_proves_again_and_remembers(on_a_gpu, monkeypatch, capsys):
    def prove(place, progress):
        progress("selective_attention", "triton", Outcome(True, (FOUND, SLOW)))
        progress("blend_kv", "triton", Outcome(True, (), FAILED.failure))
        return verdicts()

    monkeypatch.setattr(doctor, "prove", prove)
    assert main(["doctor", "--prove", "--json", "-"]) == 0
    printed = capsys.readouterr()
    (device,) = json.loads(printed.out)["devices"]
    assert device["kernels"]["verdicts"][0]["speedup"] == 2.0
    assert device["identity"]["chip"] == "NVIDIA A100"
    assert "full 2.00x" in printed.err
    assert recall(Place.of(GPU).identity).verdicts == (FOUND, SLOW)


def test_what_no_kernel_serves_is_xlas(on_a_gpu, capsys):
    remember(replace(verdicts(), verdicts=(), trials=(TRIED,)))
    assert main(["doctor"]) == 0
    assert "kernels: XLA's; no other serves what was tried" in capsys.readouterr().out


def test_a_gpu_that_cannot_be_proven_now_is_one_line(on_a_gpu, monkeypatch, capsys):
    def prove(place, progress):
        raise UnprovenError("the card is full")

    monkeypatch.setattr(doctor, "prove", prove)
    assert main(["doctor", "--prove"]) == 2
    assert "the kernels can't be proven now: the card is full; end what else uses the device" in capsys.readouterr().err


def test_verdicts_that_cannot_be_written_are_one_line(on_a_gpu, monkeypatch, capsys, own_user_cache):
    monkeypatch.setattr(doctor, "prove", lambda place, progress: verdicts())
    own_user_cache.mkdir()
    (own_user_cache / "kernels").write_text("a file")
    assert main(["doctor", "--prove"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the verdicts can't be remembered: " in line
    assert line.endswith("set XDG_CACHE_HOME")


def test_there_is_nothing_to_prove_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "describe_first_device", lambda: Place.of(jax.devices()[0]))
    assert main(["doctor", "--prove"]) == 2
    assert "--prove needs a device with Pallas kernels, and this is cpu" in capsys.readouterr().err


def test_commands_take_kernels(tmp_path, monkeypatch, capsys):
    from conftest import HF

    asked = []

    def engine(*arguments, kernels, **options):
        asked.append(kernels)
        raise KeyboardInterrupt

    monkeypatch.setattr("cacheblend_jax.engine.engine.Engine", engine)
    (tmp_path / "notes.md").write_text("The sky is blue.")
    common = ["ask", "--no-compile-cache", "--model", str(HF / "llama3"), "--docs", str(tmp_path)]
    assert main([*common, "--kernels", "xla", "Why?"]) == 130
    assert asked == ["xla"]
    with pytest.raises(SystemExit):
        main([*common, "--kernels", "cuda", "Why?"])
    assert "choose from auto, xla, mosaic_gpu" in capsys.readouterr().err.replace("'", "")
