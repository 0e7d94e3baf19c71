"""Kernels are tried in processes of their own, and chosen where they are right and faster: with fake ones, on a CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from pallas_kernels.dispatch import choose_backend, kernels_in_force
from pallas_kernels.proving import __main__ as command_line
from pallas_kernels.proving import remembered
from pallas_kernels.proving.case import KINDS
from pallas_kernels.proving.first_use import use_verdicts_on
from pallas_kernels.proving.identity import Place
from pallas_kernels.proving.prove import (
    Outcome,
    UnprovenError,
    backends_to_try,
    describe_first_device,
    prove,
    trials_on,
)
from pallas_kernels.proving.report import report_lines
from pallas_kernels.target import Target, compiling, target_of
from pallas_kernels.verdicts import Call, Kind, Trial, Verdict, Verdicts, use_verdicts, verdicts_on

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
    use_verdicts_on(
        GPU, Kind("float32", 64), lambda place, trials: replace(found_on(), verdicts=(), trials=tuple(trials))
    )
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


def test_the_command_says_in_one_line_that_verdicts_cannot_be_written(asked, monkeypatch, capsys, own_user_cache):
    own_user_cache.mkdir()
    (own_user_cache / "kernels").write_text("a file")
    monkeypatch.setattr(sys, "argv", ["proving"])
    with pytest.raises(SystemExit, match=r"the verdicts can't be remembered: .*kernels.*; set XDG_CACHE_HOME"):
        command_line.main()
    assert "not used: was killed by signal 11" in capsys.readouterr().out


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
