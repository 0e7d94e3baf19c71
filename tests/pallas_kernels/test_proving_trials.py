"""A trial finds what is wrong with a backend and how fast it is, and its cases tell right kernels from wrong ones."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from pallas_kernels.proving import child, trial
from pallas_kernels.proving.attention_cases import ATTENTION
from pallas_kernels.proving.blending_cases import BLENDING
from pallas_kernels.proving.case import Case, Operation, Timing, Wanted, error_share, numbers
from pallas_kernels.proving.prove import CHILD, child_command
from pallas_kernels.target import target_of
from pallas_kernels.verdicts import Kind, class_of


def doubled(x, *, implementation):
    if implementation == "fails":
        raise ValueError("no such kernel\nat all")
    if implementation == "unstable":
        return (jax.pure_callback(lambda x: x * np.float32(2 + 1e-7 * next(COUNT)), x, x),)
    return (x * {"wrong": 2.1, "wrong when large": 2.0 + (x.size > 3)}.get(implementation, 2.0),)


COUNT = iter(range(1000))
SMALL, LARGE = np.arange(3, dtype=np.float32), np.arange(4, dtype=np.float32)


def operation(*names: str) -> Operation:
    def unsupported(dtype, head_dim):
        return {name: lambda: None if head_dim <= 64 else "serves no more" for name in names}

    return Operation(
        "double",
        {},
        unsupported,
        lambda dtype, head_dim: [Case("a case", "p", doubled, (SMALL,), lambda: [Wanted(2.0 * SMALL, 1e-3)])],
        lambda dtype, head_dim: [Timing("full", doubled, (LARGE,), lambda xla: [Wanted(xla[0], 1e-3)])],
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("right", None),
        ("wrong", "is wrong by 200 times what rounding explains (float32, head_dim 64, a case)"),
        ("wrong when large", "differs from XLA by 3e+03 times what rounding explains (full of many keys)"),
        ("unstable", "is not the same every time (float32, head_dim 64, a case)"),
        ("fails", "fails: ValueError: no such kernel (float32, head_dim 64, a case)"),
    ],
)
def test_a_trial_finds_what_is_wrong(name, problem, monkeypatch):
    monkeypatch.setattr(trial, "interleaved", lambda calls: [1.0, 2.0])
    said = []
    kinds = Kind("float32", 64), Kind("float32", 96)
    found = trial.try_backend(operation(name), name, kinds, say=said.append)
    assert {each.head_dim for each in found} == {64}  # the other is not served
    full = next(each for each in found if each.shapes == "full")
    assert full.problem == problem
    assert full.is_chosen == (problem is None)
    assert said[0] == "float32, head_dim 64, a case"
    assert not any(each.is_chosen for each in found if each.shapes != "full")  # which were not timed


def test_float16_is_timed_as_bfloat16(monkeypatch):
    monkeypatch.setattr(trial, "interleaved", lambda calls: [1.0, 2.0])
    found = trial.try_backend(operation("right"), "right", [Kind("float16", 64)])
    assert [each.speedup for each in found if each.shapes == "full"] == [2.0]


def test_float16_has_fewer_cases_only_beside_bfloat16(monkeypatch):
    monkeypatch.setattr(trial, "interleaved", lambda calls: [1.0, 2.0])

    def cases(dtype, head_dim):
        right = Case("masks", "p", doubled, (SMALL,), lambda: [Wanted(2.0 * SMALL, 1e-3)])
        return [right, replace(right, name="numbers", program="q")]

    tried = replace(operation("right"), cases=cases, float16_programs=("q",))
    for kinds, expected in (
        ([Kind("float16", 64)], ["masks", "numbers"]),
        ([Kind("bfloat16", 32), Kind("float16", 64)], ["masks", "numbers"]),
        ([Kind("bfloat16", 64), Kind("float16", 64)], ["numbers"]),
    ):
        said = []
        trial.try_backend(tried, "right", kinds, say=said.append)
        doing = [line.split(", ")[2] for line in said if line.startswith("float16") and "timed" not in line]
        assert doing == expected
    programs = {case.program for case in ATTENTION.cases("float16", 64)}
    assert set(ATTENTION.float16_programs) < programs
    assert programs == {case.program for case in ATTENTION.cases("bfloat16", 64)}


def test_calls_are_timed_in_turn():
    called = []
    seconds = trial.interleaved([partial(called.append, name) for name in "ab"])
    assert len(seconds) == 2
    assert min(seconds) > 0
    assert {"".join(called).rstrip("b").count("ab"), "".join(called).count("ba")} != {0}


def test_errors_are_measured_by_what_rounding_allows():
    wanted = [Wanted(np.asarray([1.0, -np.inf, 0.0]), np.asarray([0.1, 1.0, 0.0]))]
    assert error_share([np.asarray([1.05, -np.inf, 0.0])], wanted) == pytest.approx(0.5)
    for wrong in ([np.nan, -np.inf, 0.0], [1.0, 0.0, 0.0], [1.0, -np.inf, 1e-30], [1.0, np.nan, 0.0]):
        assert error_share([np.asarray(wrong)], wanted) == np.inf


def test_shapes_are_of_four_classes():
    assert [class_of(rows, 8192) for rows in (1, 2, 128, 129, 4096, 4097, 8192)] == [
        "one",
        *["few"] * 2,
        *["scattered"] * 2,
        *["full"] * 2,
    ]
    assert class_of(1, 1) == "one"


def test_numbers_are_the_same_in_every_dtype():
    drawn = [numbers(np.random.default_rng(0), dtype, 1000) for dtype in ("bfloat16", "float16", "float32")]
    assert all(np.array_equal(each.astype(np.float64), drawn[2].astype(np.float64)) for each in drawn)


@pytest.fixture(scope="module")
def attention_programs():
    """The cases of some programs, compiled for XLA."""
    names = "few keys", "full", "soft cap and sinks"
    cases = [case for case in ATTENTION.cases("bfloat16", 64) if case.program in names]
    return cases, {case.program: trial.compiled(case.call, trial.shapes_of(case), "xla") for case in cases}


def share(attention_programs, change=lambda *arrays: arrays) -> float:
    """The largest error over the cases, of a backend that takes its arguments for others."""
    cases, programs = attention_programs
    return max(error_share(programs[case.program](*change(*case.arrays)), case.wanted()) for case in cases)


def test_xla_passes_the_cases_of_attention(attention_programs):
    assert share(attention_programs) < 1


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, positions, *rest: (q, k, v, positions + 1, *rest),
        lambda q, k, v, positions, starts, length, sinks: (q, k, v, positions, starts, length + 1, sinks),
        lambda q, k, v, positions, starts, *rest: (q, k, v, positions, None if starts is None else 0 * starts, *rest),
        lambda q, k, *rest: (q, np.roll(k, 1, axis=1), *rest),
        lambda *arrays: (*arrays[:-1], None if arrays[-1] is None else arrays[-1] - 100),
    ],
    ids=["sees the future", "sees a key too many", "sees other chunks", "takes another head", "has no sinks"],
)
def test_what_sees_other_keys_fails_the_cases_of_attention(attention_programs, change):
    assert share(attention_programs, change) > 1


def test_what_caps_nothing_fails_the_cases_of_attention(attention_programs):
    case = next(case for case in attention_programs[0] if case.program == "soft cap and sinks")
    uncapped = partial(case.call, soft_cap=None)
    got = trial.compiled(uncapped, trial.shapes_of(case), "xla")(*case.arrays)
    assert error_share(got, case.wanted()) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_xla_passes_the_cases_of_blending(dtype):
    for case in BLENDING.cases(dtype, 64):
        if case.program in ("few keys", "one row"):
            got = trial.compiled(case.call, trial.shapes_of(case), "xla")(*case.arrays)
            assert error_share(got, case.wanted()) < 1
            k, v, k_stack, v_stack = (np.array(x) for x in got)
            assert error_share([np.roll(k, 1, axis=0), v, k_stack, v_stack], case.wanted()) > 1
            k_stack[0, -1] += 1  # of a layer that is not blended
            assert error_share([k, v, k_stack, v_stack], case.wanted()) == np.inf
            v[-1] += 1
            assert error_share([k, v, got[2], v_stack], case.wanted()) == np.inf


def test_the_child_process_says_what_it_does_and_finds(monkeypatch, capsys):
    monkeypatch.setattr(trial, "interleaved", lambda calls: [1.0, 2.0])
    monkeypatch.setattr(child, "OPERATIONS", {"double": operation("right")})
    monkeypatch.setattr(child, "NEEDED_BYTES", 8)
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    arguments = child_command(
        "double", "right", target_of(jax.devices()[0]), [Kind("float32", 64), Kind("float32", 32)]
    )[len(CHILD) :]
    child.try_on(*arguments)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0] == {"ready": True}
    assert "doing" in said[1]
    found = said[-1]["verdicts"]
    assert {(each["backend"], each["dtype"], each["head_dim"]) for each in found} == {
        ("right", "float32", 64),
        ("right", "float32", 32),
    }
    with pytest.raises(SystemExit, match="sees no NVIDIA A100"):
        child.try_on("double", "right", "cpu", "NVIDIA A100")
