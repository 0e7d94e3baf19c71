"""Programs that tests share: equal ones are compiled once, each runner counts its own, none is taken for another."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import shared_programs
from conftest import unchecked

from cacheblend_jax.model import params
from cacheblend_jax.model.params import side_by_side
from cacheblend_jax.runtime.programs import Runner

PARTS = [np.ones((2, 3), np.float32)] * 2


def program_of(runner: Runner):
    """The program with which a runner joins the parts."""
    assert np.asarray(runner(side_by_side, PARTS)).shape == (2, 6)
    assert runner.count == 1
    (entry,) = runner._entries.values()
    return entry.program.result()


def test_equal_programs_are_compiled_once_and_counted_by_each_runner():
    one = program_of(Runner("cpu"))
    assert program_of(Runner("cpu")) is one
    assert Runner("cpu").count == 0
    shared_programs.forget()
    assert program_of(Runner("cpu")) is not one


def test_what_programs_depend_on_makes_others(monkeypatch):
    one, second = program_of(Runner("cpu")), jax.sharding.SingleDeviceSharding(jax.devices()[1])
    assert program_of(Runner("cpu", second)) is not one
    assert program_of(Runner("cpu", kernels="xla")) is not one
    with unchecked():
        assert program_of(Runner("cpu")) is not one
    with jax.default_matmul_precision("highest"):
        assert program_of(Runner("cpu")) is not one
    assert program_of(Runner("cpu")) is one
    monkeypatch.setattr(params, "JOINED", params.JOINED)  # whatever it is: programs may be traced from it
    assert program_of(Runner("cpu")) is not one


def test_a_test_that_replaced_something_leaves_nothing_to_others(monkeypatch):
    shared_programs.forget()
    monkeypatch.setattr("cacheblend_jax.model.params.JOINED", params.JOINED)
    replaced = program_of(Runner("cpu"))
    shared_programs.nothing_is_replaced()  # as the next test begins
    assert program_of(Runner("cpu")) is not replaced


def test_what_fails_to_compile_is_tried_again():
    runner, parts = Runner("cpu"), [np.ones((2, 3), np.float32), np.ones((3, 3), np.float32)]
    for _ in range(2):
        with pytest.raises(TypeError, match="concatenate"):
            runner(side_by_side, parts)
    assert runner.count == 0
