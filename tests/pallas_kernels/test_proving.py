"""Kernels are tried in processes of their own, and chosen where they are right and faster: with fake ones, on a CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pallas_kernels.dispatch import choose_backend, kernels_in_force
from pallas_kernels.proving import __main__ as command_line
from pallas_kernels.proving import child, remembered, trial
from pallas_kernels.proving.attention_cases import ATTENTION
from pallas_kernels.proving.blending_cases import BLENDING
from pallas_kernels.proving.case import KINDS, Case, Operation, Timing, Wanted, error_share, numbers
from pallas_kernels.proving.first_use import use_verdicts_on
from pallas_kernels.proving.identity import Place
from pallas_kernels.proving.prove import (
    CHILD,
    Outcome,
    UnprovenError,
    backends_to_try,
    child_command,
    describe_first_device,
    prove,
    trials_on,
)
from pallas_kernels.proving.report import report_lines
from pallas_kernels.target import Target, compiling, target_of
from pallas_kernels.verdicts import Call, Kind, Trial, Verdict, Verdicts, class_of, use_verdicts, verdicts_on

GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0", local_hardware_id=0)
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0", local_hardware_id=0)
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
CALL = Call("selective_attention", "bfloat16", 128, "full")
KIND, OTHER = Kind("bfloat16", 128), Kind("bfloat16", 112)


def verdict(seconds=1.0, backend="triton", operation="selective_attention", **changed) -> Verdict:
    """XLA takes two seconds."""
    return replace(Verdict(operation, backend, "bfloat16", 128, "full", 0.5, seconds, 2.0), **changed)


# --- child processes -----------------------------------------------------------------------------------------------

READY = "import json, os, signal, time; print(json.dumps({'ready': True}), flush=True);"


def saying(*verdicts: Verdict) -> str:
    """The code of a process that comes to these verdicts."""
    return f"{READY} print('noise'); print({json.dumps({'verdicts': [vars(each) for each in verdicts]})!r})"


HANGS = READY + "print(json.dumps({'doing': 'a case'}), flush=True); time.sleep(60)"
CRASHES = READY + "print(json.dumps({'doing': 'a case'}), flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
RAISES = READY + "raise ValueError('no such thing')"


def proven(device=GPU, limit_seconds=30.0, **code: str) -> Verdicts:
    """Proves with processes that run this code, by backend; `blend_kv`'s all come to nothing."""

    def command(operation, backend, target, kinds):
        chosen = code[backend] if operation == "selective_attention" else saying()
        return [sys.executable, "-I", "-S", "-c", chosen]

    trials = trials_on(target_of(device), [KIND])
    return prove(Place.of(device), trials, limit_seconds=limit_seconds, command=command)


def failures(verdicts: Verdicts) -> list[Trial]:
    return [trial for trial in verdicts.trials if trial.failure is not None]


def chosen_on(device, verdicts: Verdicts) -> str:
    use_verdicts(verdicts)
    serves = {name: lambda: None for name in ("triton", "mosaic_gpu")}
    with compiling(device, None):
        return choose_backend(None, CALL, serves)


def test_what_is_right_and_faster_is_chosen():
    assert chosen_on(GPU, proven(triton=saying(verdict(1.0)))) == "triton"


@pytest.mark.parametrize(
    "found", [verdict(2.0), verdict(3.0), verdict(problem="is wrong"), verdict(seconds=None)], ids=repr
)
def test_what_is_wrong_or_slow_is_not_chosen(found):
    verdicts = proven(triton=saying(found))
    assert chosen_on(GPU, verdicts) == "xla"
    assert verdicts.verdicts == (found,)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (CRASHES, "was killed by signal 11: it said nothing (a case)"),
        (RAISES, "exited with 1: ValueError: no such thing (starting)"),
        (READY, "ended without results (starting)"),
    ],
    ids=["crash", "exception", "silence"],
)
def test_a_backend_that_does_not_come_to_its_end_says_nothing_of_the_others(code, reason):
    verdicts = proven(H100, mosaic_gpu=code, triton=saying(verdict()))
    assert failures(verdicts) == [Trial("selective_attention", "mosaic_gpu", *KIND, reason)]
    assert not verdicts.lacking(trials_on(verdicts.target, [KIND]))
    assert chosen_on(H100, verdicts) == "triton"
    assert f"not used: {reason}" in report_lines(verdicts)[-1]


def test_a_backend_that_hangs_is_killed():
    verdicts = proven(limit_seconds=0.5, triton=HANGS)
    assert failures(verdicts)[0].failure == "ran for more than 0.5 s (a case)"
    assert chosen_on(GPU, verdicts) == "xla"


NO_MEMORY = "fails: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 268435456 bytes"


@pytest.mark.parametrize(
    "code",
    ["raise MemoryError('the card is full')", saying(verdict(problem=NO_MEMORY)), RAISES.replace("no such", NO_MEMORY)],
    ids=["at the start", "in a case", "at the end"],
)
def test_a_device_without_free_memory_proves_nothing(code):
    with pytest.raises(UnprovenError, match=r"the card is full|Out of memory while"):
        proven(triton=code)


def test_only_what_can_run_on_a_device_is_tried():
    names = {device.device_kind: backends_to_try(target_of(device)) for device in (GPU, H100, TPU)}
    assert names == {
        "NVIDIA A100": [("selective_attention", "triton"), ("blend_kv", "triton")],
        "NVIDIA H100": [
            *((("selective_attention", name)) for name in ("mosaic_gpu", "triton")),
            ("blend_kv", "triton"),
        ],
        "TPU v5 lite": [("selective_attention", "tpu"), ("blend_kv", "tpu")],
    }
    assert backends_to_try(Target("gpu", "Tesla T4", (7, 5))) == []


def test_each_backend_has_one_process_for_all_that_it_is_tried_for():
    started = []

    def command(operation, backend, target, kinds):
        started.append((operation, backend, kinds))
        return [sys.executable, "-I", "-S", "-c", saying()]

    place = Place.of(H100)
    found = prove(place, [Trial("blend_kv", "triton", *KIND), Trial("blend_kv", "triton", *OTHER)], command=command)
    assert started == [("blend_kv", "triton", [KIND, OTHER])]
    assert [trial.kind for trial in found.trials] == [KIND, OTHER]
    started.clear()
    assert prove(place, command=command).trials == tuple(trials_on(place.target))
    assert started == [(*backend, list(KINDS)) for backend in backends_to_try(place.target)]


def test_a_process_sees_the_one_gpu_that_is_meant(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert Place.of(SimpleNamespace(**vars(GPU) | {"local_hardware_id": 1})).visible_gpu == "6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert Place.of(SimpleNamespace(**vars(GPU) | {"local_hardware_id": 1})).visible_gpu == "1"
    says = f"{READY} print(json.dumps({{'verdicts': []}}) if os.environ['CUDA_VISIBLE_DEVICES'] == '0' else 'no')"
    assert failures(proven(triton=says)) == []


def test_another_process_describes_the_device():
    place = Place.of(GPU)
    said = {"place": {"target": vars(place.target), "identity": place.identity, "visible_gpu": "0"}}
    command = [sys.executable, "-I", "-S", "-c", f"print({json.dumps(said)!r})"]
    assert describe_first_device(command) == place
    with pytest.raises(UnprovenError, match="exited with 1: ValueError: no such thing"):
        describe_first_device([sys.executable, "-I", "-S", "-c", RAISES])


def test_the_child_process_describes_a_device_as_this_process_does():
    assert describe_first_device().identity == Place.of(jax.devices()[0]).identity


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


# --- trials --------------------------------------------------------------------------------------------------------


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
    """The cases of two programs, compiled for XLA."""
    cases = [case for case in ATTENTION.cases("bfloat16", 64) if case.program in ("few keys", "full")]
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
        lambda q, k, v, positions, starts, length: (q, k, v, positions + 1, starts, length),
        lambda q, k, v, positions, starts, length: (q, k, v, positions, starts, length + 1),
        lambda q, k, v, positions, starts, length: (q, k, v, positions, None if starts is None else 0 * starts, length),
        lambda q, k, v, positions, starts, length: (q, np.roll(k, 1, axis=1), v, positions, starts, length),
    ],
    ids=["sees the future", "sees a key too many", "sees other chunks", "takes another head"],
)
def test_what_sees_other_keys_fails_the_cases_of_attention(attention_programs, change):
    assert share(attention_programs, change) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_xla_passes_the_cases_of_blending(dtype):
    for case in BLENDING.cases(dtype, 64):
        if case.program in ("few keys", "one row"):
            got = trial.compiled(case.call, trial.shapes_of(case), "xla")(*case.arrays)
            assert error_share(got, case.wanted()) < 1
            k, v, deviation = (np.array(x) for x in got)
            assert error_share([np.roll(k, 1, axis=0), v, deviation], case.wanted()) > 1
            v[-1] += 1
            assert error_share([k, v, deviation], case.wanted()) == np.inf


# --- what is remembered --------------------------------------------------------------------------------------------


def found_on(device=GPU, kind=KIND) -> Verdicts:
    place = Place.of(device)
    verdicts = tuple(replace(each, head_dim=kind.head_dim) for each in (verdict(), verdict(3.0, shapes="one")))
    trials = (
        replace(trial, failure="ran for more than 300 s (a case)" if trial.operation == "blend_kv" else None)
        for trial in trials_on(place.target, [kind])
    )
    return Verdicts(place.target, place.identity, verdicts, tuple(trials))


def test_what_is_remembered_is_recalled(own_user_cache):
    found = found_on()
    assert remembered.recall(found.identity) is None
    path = remembered.remember(found)
    assert path.parent == own_user_cache / "kernels"
    assert remembered.recall(found.identity).record() == found.record()
    for name in ("chip", "driver", "jax", "jaxlib", "sources", "compute_capability"):
        assert remembered.recall(found.identity | {name: "another"}) is None


def test_what_is_found_later_is_added_and_replaces_what_was_tried_again():
    identity = found_on().identity
    remembered.remember(found_on())
    remembered.remember(found_on(kind=OTHER))
    assert remembered.recall(identity).trials == found_on().trials + found_on(kind=OTHER).trials
    attention, blending = found_on().trials
    crashed = replace(attention, failure="was killed by signal 11")
    remembered.remember(replace(found_on(), verdicts=(), trials=(crashed,)))
    found = remembered.recall(identity)
    assert found.verdicts == found_on(kind=OTHER).verdicts
    assert found.trials == (blending, *found_on(kind=OTHER).trials, crashed)


def test_what_failed_at_once_is_one_line():
    found = found_on().merged_with(found_on(kind=OTHER))
    reason = "ran for more than 300 s (a case); tried: bfloat16 128, bfloat16 112"
    assert report_lines(found)[2:] == [f"{'blend_kv':<20} {'triton':<11} not used: {reason}"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"seconds": 3.0', '"seconds": 1.0'),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(f'"format": {remembered.FORMAT}', '"format": 0'),
        lambda text: "[]",
        lambda text: "\0",
        lambda text: "[" * 100_000,
    ],
    ids=["another number", "cut off", "another format", "another type", "no JSON", "too deep"],
)
def test_a_damaged_file_is_nothing(damage):
    found = found_on()
    path = remembered.remember(found)
    path.write_text(damage(path.read_text()))
    assert remembered.recall(found.identity) is None


def test_a_file_of_another_device_in_its_place_is_nothing():
    found, other = found_on(GPU), found_on(H100)
    remembered.path_of(found.identity).parent.mkdir(parents=True)
    remembered.remember(other).rename(remembered.path_of(found.identity))
    assert remembered.recall(found.identity) is None


def test_verdicts_are_found_without_platformdirs(monkeypatch, own_user_cache):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert remembered.cache_directory() == own_user_cache / "kernels"


# --- at first use --------------------------------------------------------------------------------------------------


def never(place, trials):
    raise AssertionError("it was to be remembered")


def test_kernels_are_proven_once_and_then_remembered(caplog):
    asked = []

    def proof(place, trials):
        asked.append((place.target, trials))
        return found_on()

    use_verdicts_on(GPU, KIND, proof)
    use_verdicts_on(GPU, KIND, never)  # in use already
    use_verdicts()
    use_verdicts_on(GPU, KIND, never)  # remembered, the failure too
    assert asked == [(target_of(GPU), trials_on(target_of(GPU), [KIND]))]
    assert verdicts_on(target_of(GPU)).backends_for(CALL) == ("triton",)
    assert [record.message for record in caplog.records] == [
        "checking and timing the kernels on this NVIDIA A100 for bfloat16 and head_dim 128, once; that takes up to a"
        " minute"
    ]


def test_only_what_is_missing_is_proven_and_the_rest_stays():
    asked, keys = [], [kernels_in_force()]

    def proof(place, trials):
        asked.append(trials)
        return replace(found_on(kind=OTHER), trials=tuple(trials))

    remembered.remember(found_on())
    remembered.remember(replace(found_on(kind=OTHER), verdicts=(), trials=found_on(kind=OTHER).trials[1:]))
    use_verdicts_on(GPU, KIND, never)
    keys.append(kernels_in_force())
    use_verdicts_on(GPU, OTHER, proof)
    keys.append(kernels_in_force())
    assert asked == [[Trial("selective_attention", "triton", *OTHER)]]
    assert len(set(keys)) == 3  # programs compiled before are of other choices
    use_verdicts_on(GPU, Kind("float32", 64), lambda place, trials: replace(found_on(), verdicts=(), trials=trials))
    assert kernels_in_force() == keys[-1]  # what fails changes no choice
    for call in (CALL, CALL._replace(head_dim=112)):
        assert verdicts_on(target_of(GPU)).backends_for(call) == ("triton",)
    assert not remembered.recall(found_on().identity).lacking(trials_on(target_of(GPU), [KIND, OTHER]))


def test_what_is_found_unlike_what_is_in_use_is_of_the_next_process():
    use_verdicts_on(GPU, KIND, lambda place, trials: found_on())
    slower = tuple(replace(each, seconds=9.0) for each in found_on().verdicts)
    remembered.remember(replace(found_on(), verdicts=slower))  # another process tried again
    use_verdicts_on(GPU, OTHER, lambda place, trials: found_on(kind=OTHER))
    assert verdicts_on(target_of(GPU)).backends_for(CALL) == ("triton",)
    assert remembered.recall(found_on().identity).backends_for(CALL) == ()


def test_verdicts_on_one_device_leave_those_on_others_in_use():
    use_verdicts_on(GPU, KIND, lambda place, trials: found_on())
    use_verdicts_on(H100, KIND, lambda place, trials: found_on(H100))
    assert verdicts_on(target_of(GPU)) is not None
    assert verdicts_on(target_of(H100)) is not None


@pytest.mark.parametrize(
    "error", [UnprovenError("the card is full"), OSError("no more processes"), KeyError("seconds")], ids=repr
)
def test_what_cannot_be_proven_now_is_xlas_with_one_warning_and_tried_again_by_the_next_process(error, caplog):
    def proof(place, trials):
        raise error

    use_verdicts_on(GPU, KIND, proof)
    use_verdicts_on(GPU, KIND, never)
    assert verdicts_on(target_of(GPU)).verdicts == ()
    unproven = "the kernels on this NVIDIA A100 for bfloat16 and head_dim 128 are XLA's, the others are unproven"
    assert f"{unproven}: {error}" in caplog.text
    assert len(caplog.records) == 2  # with the line of progress
    assert remembered.recall(Place.of(GPU).identity) is None
    use_verdicts_on(GPU, OTHER, lambda place, trials: found_on(kind=OTHER))
    assert remembered.recall(Place.of(GPU).identity).trials == found_on(kind=OTHER).trials


def test_a_tpu_that_this_process_uses_is_not_proven(caplog):
    use_verdicts_on(TPU, OTHER, never)
    by_hand = "python -m pallas_kernels.proving --dtypes bfloat16 --head-dims 112"
    assert f"before it does, run: {by_hand}" in caplog.text
    assert verdicts_on(target_of(TPU)).verdicts == ()


def test_where_no_kernel_can_run_nothing_is_said(caplog):
    t4 = SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5", local_hardware_id=0)
    use_verdicts_on(t4, KIND, never)
    assert not caplog.records


def test_verdicts_that_cannot_be_written_are_used_all_the_same(caplog, own_user_cache):
    own_user_cache.mkdir()
    (own_user_cache / "kernels").write_text("a file")
    use_verdicts_on(GPU, KIND, lambda place, trials: found_on())
    assert verdicts_on(target_of(GPU)).backends_for(CALL) == ("triton",)
    assert "can't be remembered, and each process will check anew" in caplog.text


@pytest.fixture
def asked(monkeypatch) -> list[list[Trial]]:
    """What the command had proven, on a GPU where only `blend_kv` fails."""
    asked: list[list[Trial]] = []

    def prove(place, trials, progress, **options):
        asked.append(trials)
        progress("blend_kv", "triton", Outcome(True, reason="was killed by signal 11"))
        return found_on()

    monkeypatch.setattr(command_line, "describe_first_device", lambda: Place.of(GPU))
    monkeypatch.setattr(command_line, "prove", prove)
    return asked


def test_the_command_proves_everything_prints_what_is_found_and_remembers_it(asked, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["proving", "--json", str(tmp_path / "found.json")])
    command_line.main()
    assert asked == [trials_on(target_of(GPU))]
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found_on().record()))
    assert "not used: was killed by signal 11" in capsys.readouterr().out
    assert remembered.recall(found_on().identity).record() == found_on().record()


def test_the_narrowed_command_adds_to_what_is_remembered(asked, monkeypatch, capsys):
    remembered.remember(found_on(kind=OTHER))
    narrow = ["--backends", "triton", "--dtypes", "float16", "--head-dims", "112", "64", "112"]
    monkeypatch.setattr(sys, "argv", ["proving", *narrow])
    command_line.main()
    assert asked == [trials_on(target_of(GPU), [Kind("float16", 64), Kind("float16", 112)])]
    assert remembered.recall(found_on().identity).trials == found_on(kind=OTHER).trials + found_on().trials
    monkeypatch.setattr(sys, "argv", ["proving", "--backends", "tpu"])
    command_line.main()
    assert asked[-1] == []
    monkeypatch.setattr(sys, "argv", ["proving", "--head-dims", "0"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "head_dim must be a whole number from 1 on, got '0'" in capsys.readouterr().err
