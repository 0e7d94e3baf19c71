"""A few rounds of the faults that no other test makes, and the script that makes them for as long as asked."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
from faults import WrongAnswerError
from faults.interrupts import interrupts
from faults.prefills import fuzz, threads
from faults.reference import Reference
from faults.serving import Resources, _leaks, requests

from scripts import fault_harness

pytestmark = pytest.mark.once
FEW_PROGRAMS = {"families": ["gemma3_capped"], "blends": [(0.3, "hkvd")], "executors": ["resident"]}


def test_drawn_prefills_equal_their_reference_in_float64(tmp_path):
    assert fuzz(tmp_path, range(12), **FEW_PROGRAMS)["hits"] > 0


def test_a_window_too_wide_is_a_wrong_answer(tmp_path, monkeypatch):
    class WithoutWindows(Reference):
        def __init__(self, model):
            super().__init__(model)
            self.config = dataclasses.replace(model.config, windows=())

    monkeypatch.setattr("faults.prefills.Reference", WithoutWindows)
    with pytest.raises(WrongAnswerError, match="relative error"):
        fuzz(tmp_path, range(12), **FEW_PROGRAMS)


def test_threads_get_what_a_serial_run_does(tmp_path):
    assert threads(tmp_path, range(1))["prefills"] > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_an_interrupted_command_ends_cleanly_even_while_it_compiles(tmp_path):
    assert interrupts(tmp_path, [1, 3], quickly=True)["interrupts"] == 2


def test_a_server_leaks_nothing_and_answers_as_the_engine_alone_whatever_happens_to_it(tmp_path):
    counts = requests(tmp_path, range(24), modes=["blend"], temperatures=[0], groups=1, executor="resident")
    assert min(counts["answers"], counts["hits"], counts["left"], counts["damaged files"]) > 0
    assert counts["servers"] == 6


def test_what_a_server_leaks_is_found():
    flat = [Resources(1000, 30, 6, 26)] * 6
    assert _leaks([Resources(500, 30, 6, 20), *flat])["servers after the last program"] == 6
    for last, what in ((Resources(1060, 30, 6, 26), "rss_bytes"), (Resources(1000, 30, 9, 26), "descriptors")):
        with pytest.raises(WrongAnswerError, match=f"{what} grew from"):
            _leaks([*flat, last])


def test_the_script_sums_up_what_it_did(tmp_path, capsys, monkeypatch):
    def fail(directory, rounds, seed):
        raise WrongAnswerError(f"round {max(rounds)} of seed {seed}")

    kinds = {"fine": lambda directory, rounds, seed: {"faults": sum(1 for _ in rounds)}, "bad": fail}
    monkeypatch.setattr(fault_harness, "KINDS", kinds)
    path = tmp_path / "faults.json"
    assert fault_harness.main(["all", "--rounds", "3", "--seed", "7", "--json", str(path)]) == 1
    fine, bad = json.loads(path.read_text())
    assert (fine["kind"], fine["seed"], fine["counts"], fine["wrong"]) == ("fine", 7, {"faults": 3}, None)
    assert (bad["kind"], bad["counts"], bad["wrong"]) == ("bad", {}, "round 2 of seed 7")
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == fine
    assert fault_harness.main(["fine", "--minutes", "0"]) == 0
