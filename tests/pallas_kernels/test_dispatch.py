"""Which backend serves a call: what is asked for, what is preferred, and what was proven on the device."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import blend_kv, dispatch, selective_attention, use_verdicts
from pallas_kernels.dispatch import Target, current_target
from pallas_kernels.target import compiling
from pallas_kernels.verdicts import Call, Verdict, Verdicts

H200 = Target("gpu", "NVIDIA H200", (9, 0))
A100 = Target("gpu", "NVIDIA A100", (8, 0))
T4 = Target("gpu", "Tesla T4", (7, 5))
B200 = Target("gpu", "NVIDIA B200", (10, 0))
V5E = Target("tpu", "TPU v5 lite")
CPU = Target("cpu", "cpu")


CALL = Call("op", "bfloat16", 128, "scattered")


def _verdicts(target, *backends):
    """Verdicts that these backends are right, and faster in this order."""
    found = [Verdict("op", name, "bfloat16", 128, "scattered", 0.5, 1.0 + i, 9.0) for i, name in enumerate(backends)]
    return Verdicts(target, {}, tuple(found))


def _choose(implementation, target, monkeypatch, unsupported=(), proven=("mosaic_gpu", "triton", "tpu")):
    monkeypatch.setattr(dispatch, "current_target", lambda: target)
    use_verdicts(*([] if target == CPU else [_verdicts(target, *proven)]))
    backends = ("mosaic_gpu", "triton", "tpu")
    reasons = {name: (lambda name=name: "is out of order" if name in unsupported else None) for name in backends}
    return dispatch.choose_backend(implementation, CALL, reasons)


@pytest.mark.parametrize(
    ("implementation", "target", "unsupported", "chosen"),
    [
        (None, CPU, (), "xla"),
        (None, H200, (), "mosaic_gpu"),
        (None, H200, ("mosaic_gpu",), "triton"),
        (None, H200, ("mosaic_gpu", "triton"), "xla"),
        (None, A100, (), "triton"),
        (None, B200, (), "triton"),
        (None, T4, (), "xla"),
        (None, V5E, (), "tpu"),
        (None, V5E, ("tpu",), "xla"),
        ("pallas", CPU, (), "tpu"),
        ("pallas", H200, (), "mosaic_gpu"),
        ("xla", H200, (), "xla"),
        ("triton", H200, (), "triton"),
    ],
)
def test_the_best_backend_that_can_serve_the_call_is_chosen(implementation, target, unsupported, chosen, monkeypatch):
    assert _choose(implementation, target, monkeypatch, unsupported) == chosen


@pytest.mark.parametrize(
    ("implementation", "target", "unsupported", "message"),
    [
        ("mosaic_gpu", A100, (), "needs a Hopper GPU"),
        ("mosaic_gpu", B200, (), "needs a Hopper GPU"),
        ("tpu", H200, (), "needs a TPU"),
        ("triton", V5E, (), "needs a GPU"),
        ("pallas", T4, (), "needs an NVIDIA GPU of compute capability 8.0 or more"),
        ("pallas", V5E, ("tpu",), "tpu is out of order"),
        ("cuda", H200, (), "unknown implementation 'cuda'"),
    ],
)
def test_what_cannot_be_served_says_why(implementation, target, unsupported, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        _choose(implementation, target, monkeypatch, unsupported)


def test_without_a_verdict_for_such_calls_on_this_device_xla_is_chosen(monkeypatch):
    assert _choose(None, H200, monkeypatch, proven=()) == "xla"
    assert _choose(None, H200, monkeypatch, proven=("triton", "mosaic_gpu")) == "triton"
    assert _choose("pallas", H200, monkeypatch, proven=()) == "mosaic_gpu"
    monkeypatch.setattr(dispatch, "current_target", lambda: A100)
    use_verdicts(_verdicts(H200, "triton"))
    serves = {"triton": lambda: None}
    assert dispatch.choose_backend(None, CALL, serves) == "xla"
    use_verdicts(_verdicts(H200, "mosaic_gpu"), _verdicts(A100, "triton"))
    assert dispatch.choose_backend(None, CALL, serves) == "triton"
    for other in ({"dtype": "float16"}, {"head_dim": 64}, {"shapes": "one"}, {"operation": "another"}):
        assert dispatch.choose_backend(None, CALL._replace(**other), serves) == "xla"


def test_the_environment_replaces_the_default(monkeypatch):
    monkeypatch.setenv(dispatch.OVERRIDE, "xla")
    assert _choose(None, H200, monkeypatch) == "xla"
    assert _choose("pallas", H200, monkeypatch) == "mosaic_gpu"
    monkeypatch.setenv(dispatch.OVERRIDE, "pallas")
    assert _choose(None, H200, monkeypatch, proven=()) == "mosaic_gpu"
    assert _choose(None, H200, monkeypatch, unsupported=("mosaic_gpu", "triton")) == "xla"


def test_the_override_is_what_the_environment_says_now(monkeypatch):
    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    assert dispatch.implementation_override() is None
    for value in ("xla", "pallas", "mosaic_gpu"):
        monkeypatch.setenv(dispatch.OVERRIDE, value)
        assert dispatch.implementation_override() == value
    monkeypatch.setenv(dispatch.OVERRIDE, "")
    assert dispatch.implementation_override() is None
    monkeypatch.setenv(dispatch.OVERRIDE, "palas")
    with pytest.raises(ValueError, match=f"the environment variable {dispatch.OVERRIDE} is 'palas'; expected 'xla', "):
        dispatch.implementation_override()


def test_an_operation_without_the_backend_that_the_environment_names_takes_xla(monkeypatch):
    monkeypatch.setattr(dispatch, "current_target", lambda: H200)
    use_verdicts(_verdicts(H200, "triton"))
    monkeypatch.setenv(dispatch.OVERRIDE, "mosaic_gpu")
    assert dispatch.choose_backend(None, CALL, {"triton": lambda: None}) == "xla"
    monkeypatch.setenv(dispatch.OVERRIDE, "palas")
    with pytest.raises(ValueError, match=f"the environment variable {dispatch.OVERRIDE} is 'palas'; expected 'xla', "):
        dispatch.choose_backend(None, CALL, {"triton": lambda: None})


def test_what_a_caller_prefers_while_compiling_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv(dispatch.OVERRIDE, "triton")
    with compiling(None, "xla"):
        assert _choose(None, H200, monkeypatch) == "xla"
        assert _choose("pallas", H200, monkeypatch) == "mosaic_gpu"
        assert dispatch.kernels_in_force() == "xla"
    assert _choose(None, H200, monkeypatch) == "triton"


def test_other_choices_of_verdicts_are_other_kernels_in_force(monkeypatch):
    monkeypatch.delenv(dispatch.OVERRIDE, raising=False)
    found = []
    for verdicts in (
        (),
        (_verdicts(H200, "triton"),),
        (_verdicts(H200, "triton", "tpu"),),
        (_verdicts(H200, "triton"),),
    ):
        use_verdicts(*verdicts)
        found.append(dispatch.kernels_in_force())
    assert found[1] == found[3]
    assert len(set(found)) == 3


def test_the_target_is_the_device_that_is_compiled_for():
    a100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    with compiling(a100, None):
        assert current_target() == A100
        with compiling(None, None):
            assert current_target().platform == "cpu"
        assert current_target() == A100
    assert current_target().platform == "cpu"


def _rows(tokens, heads):
    return jax.ShapeDtypeStruct((tokens, heads, 32), jnp.float32)


@pytest.mark.parametrize(("rows", "shapes"), [(1, "one"), (20, "few"), (60, "full")])
def test_calls_take_what_was_proven_for_their_kind(rows, shapes):
    """On a CPU, where kernels are interpreted. A function that was traced before stays as it was."""
    indices, angles = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((64, 16), jnp.float32)
    calls = {
        "selective_attention": lambda: jax.make_jaxpr(
            lambda *arrays: selective_attention(*arrays)
        )(  # not traced before
            _rows(rows, 4), *[_rows(64, 2)] * 2, indices
        ),
        "blend_kv": lambda: jax.make_jaxpr(lambda *arrays: blend_kv(*arrays[:-2], cos=arrays[-2], sin=arrays[-1]))(
            *[_rows(64, 2)] * 2, *[_rows(rows, 2)] * 2, indices, angles, angles
        ),
    }
    for operation, trace in calls.items():
        for kind in ("one", "few", "scattered", "full"):
            verdict = Verdict(operation, "triton", "float32", 32, kind, 0.5, 1.0, 2.0)
            use_verdicts(Verdicts(current_target(), {}, (verdict,)))
            assert ("pallas_call" in str(trace())) == (kind == shapes), operation
