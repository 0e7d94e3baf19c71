"""The runner: compiles for arrays, or for shapes alone; counts, keeps and drops programs."""

from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheblend_jax.runtime import programs
from cacheblend_jax.runtime.programs import (
    COMPILER_OPTIONS,
    REGIONS_FILE,
    Runner,
    _warn_of_drops,
    compiler_options,
    mapped_share,
)
from pallas_kernels import use_verdicts
from pallas_kernels.dispatch import OVERRIDE, kernels_in_force
from pallas_kernels.target import Target, current_target, target_of
from pallas_kernels.verdicts import Verdict, Verdicts


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


def scaled_sum(x: dict, y: jax.Array, *, factor: int) -> dict:
    return {"sum": factor * x["x"] + y, "last": y[-1]}


def test_what_is_run_over_shapes_is_compiled_and_what_is_run_over_arrays_is_computed():
    runner = Runner("cpu")
    abstract = runner(scaled_sum, {"x": shape(3)}, shape(3), factor=2)
    assert runner.count == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), abstract) == {
        "sum": ((3,), "float32"),
        "last": ((), "float32"),
    }
    out = runner(scaled_sum, {"x": np.ones(3, np.float32)}, np.ones(3, np.float32), factor=2)
    assert out["sum"].tolist() == [3.0, 3.0, 3.0]
    assert runner.count == 1  # shapes without a placement stand for arrays on the host


def test_an_array_where_another_was_is_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(programs, "id", lambda leaf: 0, raising=False)  # as if each were made where the last was freed
    runner = Runner("cpu")
    for size in (2, 3, 3):
        assert runner(jnp.negative, jnp.ones(size)).tolist() == [-1.0] * size
    assert runner.count == 2


def test_shapes_are_remembered_of_few_arrays(monkeypatch):
    monkeypatch.setattr(programs, "REMEMBERED_ARRAYS", 8)
    arrays = [jnp.ones(2) for _ in range(20)]
    runner = Runner("cpu")
    for array in arrays:
        runner(jnp.negative, array)
    assert len(programs._array_shapes) <= 8


@pytest.mark.parametrize(
    ("arguments", "static"),
    [
        (({"x": shape(4)}, shape(4)), {"factor": 2}),
        (({"x": shape(3)}, shape(3)), {"factor": 3}),
        (({"x": jax.ShapeDtypeStruct((3,), np.float16)}, shape(3)), {"factor": 2}),
    ],
    ids=["shape", "static argument", "dtype"],
)
def test_other_shapes_dtypes_and_static_arguments_are_other_programs(arguments, static):
    runner = Runner("cpu")
    runner(scaled_sum, {"x": shape(3)}, shape(3), factor=2)
    runner(scaled_sum, *arguments, **static)
    assert runner.count == 2


def test_results_lead_to_the_next_programs_whether_they_are_shapes_or_arrays():
    """Warm-up is the loop itself, run over shapes: what it compiles is all that the loop needs."""
    runner, placement = Runner("cpu"), jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def add(x, step):
        return x + step

    def loop(run, x):
        for step in range(4):
            x = run(add, x, np.int32(step), donate=("x",))
        return run(scaled_sum, {"x": x}, x, factor=1)

    loop(runner, jax.ShapeDtypeStruct((5,), np.float32, sharding=placement))
    count = runner.count
    out = loop(runner, jax.device_put(np.zeros(5, np.float32), placement))
    assert runner.count == count == 2
    assert out["sum"].tolist() == [12.0] * 5


def test_a_donated_buffer_is_overwritten():
    runner, x = Runner("cpu"), jnp.arange(4.0)
    runner(lambda x: x + 1, x, donate=("x",))
    assert x.is_deleted()


def test_a_loop_is_prepared_once_and_again_when_programs_were_dropped(monkeypatch):
    runner, runs = Runner("cpu"), []

    def loop(run):
        runs.append(run(jnp.negative, shape(7)))

    first, again = runner.prepare("loop", loop), runner.prepare("loop", loop)
    assert (len(runs), again.compile_s) == (1, 0.0)
    assert first.compile_s > 0
    assert first.peak_memory_bytes == again.peak_memory_bytes >= 2 * 7 * 4
    assert runner.is_prepared("loop")
    assert not runner.is_prepared("another")
    monkeypatch.setattr(programs, "_drops", programs._drops + 1)
    assert not runner.is_prepared("loop")
    assert runner.prepare("loop", loop).compile_s == 0.0  # its program is there still
    assert len(runs) == 2


def test_what_fails_to_compile_is_tried_again():
    runner, fails = Runner("cpu"), [True]

    def function(x):
        if fails.pop():
            raise ValueError("not this time")
        return x

    with pytest.raises(ValueError, match="not this time"):
        runner(function, shape(2))
    fails.append(False)
    assert runner(function, np.ones(2, np.float32)).tolist() == [1.0, 1.0]


def test_an_interrupted_compilation_interrupts_no_other_thread():
    runner, x = Runner("cpu"), np.ones(3, np.float32)
    results = []

    def interrupted_at_first(x):
        if not waiting.ident:
            (entry,) = runner._entries.values()
            used = entry.used
            waiting.start()
            while entry.used == used:  # until the other thread waits for this program
                time.sleep(0.001)
            raise KeyboardInterrupt
        return x + 1

    waiting = threading.Thread(target=lambda: results.append(runner(interrupted_at_first, x)))
    with pytest.raises(KeyboardInterrupt):
        runner(interrupted_at_first, x)
    waiting.join()
    assert results[0].tolist() == [2.0, 2.0, 2.0]
    assert runner.count == 1


def test_another_kernel_implementation_is_another_program(monkeypatch):
    runner = Runner("cpu")
    runner(jnp.negative, shape(3))
    runner.prepare("loop", lambda run: run(jnp.negative, shape(3)))
    monkeypatch.setenv(OVERRIDE, "xla")
    assert not runner.is_prepared("loop")
    runner(jnp.negative, shape(3))
    assert runner.count == 2


def test_programs_are_traced_for_the_runners_device_and_kernels(monkeypatch):
    found, placement = [], jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def function(x):
        found.append((current_target(), kernels_in_force()))
        return x

    a100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    elsewhere, here = Runner("cpu", placement, kernels="triton"), Runner("cpu", placement)
    monkeypatch.setattr(elsewhere, "_device", a100)
    for runner in (elsewhere, here):
        runner(function, shape(3))
    assert found[0] == (Target("gpu", "NVIDIA A100", (8, 0)), "triton")
    assert found[1] == (target_of(jax.devices()[0]), kernels_in_force())


def test_other_verdicts_are_other_programs_unless_kernels_were_asked_for():
    verdict = Verdict("selective_attention", "triton", "bfloat16", 128, "full", 0.5, 1.0, 2.0)
    best, xla = Runner("cpu"), Runner("cpu", kernels="xla")
    for verdicts in ([], [Verdicts(Target("gpu", "NVIDIA A100", (8, 0)), {}, (verdict,))]):
        use_verdicts(*verdicts)
        for runner in (best, xla):
            runner(jnp.negative, shape(3))
    assert (best.count, xla.count) == (2, 1)


def compile_s(runner: Runner, number: int) -> float:
    recorder = programs._Recorder(runner)
    recorder(jnp.negative, shape(number))
    return recorder.compile_s


def test_programs_used_least_recently_make_room(monkeypatch, caplog):
    """A process may map a limited number of memory regions; a compiler that finds none left kills it."""
    share = 0.0
    monkeypatch.setattr(programs, "mapped_share", lambda: share)
    monkeypatch.setattr(programs, "MIN_KEPT", 2)
    monkeypatch.setattr(programs, "_cpu_runners", weakref.WeakSet())  # other tests' programs stay
    _warn_of_drops.cache_clear()
    idle, busy = Runner("cpu"), Runner("cpu")
    assert all(compile_s(busy, number) > 0 for number in (1, 2, 3))
    assert all(compile_s(idle, number) > 0 for number in (1, 2))
    assert compile_s(busy, 1) == compile_s(busy, 3) == 0  # used again: 2 is the oldest now, then what is idle
    share = 0.99
    monkeypatch.setattr(programs, "_programs_with_room", 1)
    assert compile_s(busy, 4) > 0
    assert caplog.text.count("least recently used compiled programs are dropped") == 1
    assert compile_s(busy, 1) == compile_s(busy, 3) == compile_s(busy, 4) == 0
    share = 0.0
    assert all(compile_s(*dropped) > 0 for dropped in ((busy, 2), (idle, 1), (idle, 2)))
    assert (busy.count, idle.count) == (5, 4)


def test_no_more_programs_are_dropped_than_needed(monkeypatch):
    """A dropped program's regions are unmapped before the runner checks whether more programs must go."""
    monkeypatch.setattr(programs, "_cpu_runners", weakref.WeakSet())
    monkeypatch.setattr(programs, "MIN_KEPT", 1)
    monkeypatch.setattr(programs, "EVICTED_AT_ONCE", 2)
    runner, alive = Runner("cpu"), []

    def compile_one(number: int) -> None:
        runner(jnp.negative, shape(number))
        (*_, entry) = runner._entries.values()
        alive.append(weakref.ref(entry.program.result().run))

    for number in range(6):
        compile_one(number)
    monkeypatch.setattr(programs, "mapped_share", lambda: sum(program() is not None for program in alive) / 6)
    monkeypatch.setattr(programs, "_programs_with_room", 1)
    compile_one(6)  # full
    assert sum(program() is not None for program in alive) == 5  # four are few enough


def test_regions_are_counted_before_programs_may_find_none(monkeypatch):
    """Each program maps as many as a large one."""
    number, counted, each = 0, [], programs.SHARE_OF_A_PROGRAM

    def mapped_by_now() -> float:
        counted.append(number)
        return number * each

    monkeypatch.setattr(programs, "mapped_share", mapped_by_now)
    monkeypatch.setattr(programs, "_drop_oldest", lambda: 0)
    monkeypatch.setattr(programs, "_programs_with_room", 0)
    runner = Runner("cpu")
    most = int(programs.MAX_MAPPED_SHARE / each)
    for number in range(most + 3):
        runner(jnp.negative, shape(number + 1))
    assert counted == [*range(0, most, programs.EVICTED_AT_ONCE), most, most + 1, most + 2]


def test_what_a_process_has_mapped_is_counted(monkeypatch):
    assert 0 <= mapped_share() < 1
    assert mapped_share() > 0 or not REGIONS_FILE.exists()
    monkeypatch.setattr(programs, "REGIONS_FILE", Path("/nowhere"))  # as on systems other than Linux
    assert mapped_share() == 0


def test_a_compiler_that_dropped_an_option_is_told_of_and_used_without(monkeypatch, caplog):
    monkeypatch.setitem(COMPILER_OPTIONS, "cpu", {"xla_cpu_was_dropped": "1"})
    compiler_options.cache_clear()
    try:
        assert compiler_options("cpu") == {}
        assert "compiled without xla_cpu_was_dropped" in caplog.text
        assert compile_s(Runner("cpu"), 2) > 0
    finally:
        compiler_options.cache_clear()
