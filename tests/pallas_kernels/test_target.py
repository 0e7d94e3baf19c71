"""The device that kernels are chosen for: that of the arrays, of the mesh in use, or of whoever compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import blend_kv, dispatch, selective_attention, target
from pallas_kernels.target import Target, compiling, current_target


@pytest.fixture
def second_is_an_a100(monkeypatch) -> jax.Device:
    """The second of two fake devices, which is taken for a GPU; the first is the default one."""
    second = jax.devices()[1]
    a100 = Target("gpu", "NVIDIA A100", (8, 0))
    as_it_is = target.target_of
    monkeypatch.setattr(target, "target_of", lambda device: a100 if device == second else as_it_is(device))
    return second


def _asked(monkeypatch) -> list[Target]:
    """The targets for which backends were chosen, while XLA serves every call."""
    asked = []

    def choose(*_):
        asked.append(current_target())
        return "xla"

    for module in ("attention", "blending"):
        monkeypatch.setattr(f"pallas_kernels.{module}.api.choose_backend", choose)
    return asked


def _attend(device):
    rows, positions = jnp.ones((4, 2, 8), device=device), jnp.arange(4, device=device)
    return selective_attention(rows, rows, rows, positions)


def _blend(device):
    rows, angles = jnp.ones((4, 2, 8), device=device), jnp.ones((4, 4), device=device)
    return blend_kv(rows, rows, rows, rows, jnp.arange(4, device=device), cos=angles, sin=angles)[0]


@pytest.mark.parametrize("call", [_attend, _blend])
def test_the_device_is_that_of_the_arrays_not_the_default_one(call, second_is_an_a100, monkeypatch):
    asked = _asked(monkeypatch)
    assert call(second_is_an_a100).devices() == {second_is_an_a100}
    call(None)
    assert [of.platform for of in asked] == ["gpu", "cpu"]


def test_what_is_preferred_while_compiling_holds_for_the_arrays_device_too(second_is_an_a100, monkeypatch):
    preferred = []
    monkeypatch.setattr(
        "pallas_kernels.attention.api.choose_backend",
        lambda *_: preferred.append(target.preferred_while_compiling()) or "xla",
    )
    with compiling(None, "triton"):
        _attend(second_is_an_a100)
    assert preferred == ["triton"]


def test_inside_a_program_whoever_compiles_it_says_for_which_device(second_is_an_a100, monkeypatch):
    asked = _asked(monkeypatch)
    stored = jnp.ones((4, 2, 8))  # on the default device
    attend = jax.jit(lambda q: selective_attention(q, stored, stored, jnp.arange(4)))
    with compiling(second_is_an_a100, None):
        attend.trace(jax.ShapeDtypeStruct((4, 2, 8), jnp.float32))
    assert [of.platform for of in asked] == ["gpu"]


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("Tesla T4", (7, 5)),
        ("NVIDIA A100-SXM4-80GB", (8, 0)),
        ("NVIDIA L4", (8, 9)),
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA GH200 480GB", (9, 0)),
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA GeForce RTX 3090", None),
        ("NVIDIA L400", None),
    ],
)
def test_a_gpu_that_is_not_there_is_known_by_its_name(name, capability):
    device = AbstractDevice(device_kind=name, num_cores=1, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert current_target() == Target("gpu", name, capability)
        needs_ampere = dispatch.wrong_platform("triton", current_target()) is not None
    assert needs_ampere == (capability is None or capability < (8, 0))


def test_a_gpu_of_this_machine_says_itself_what_it_can(monkeypatch):
    class Gpu:
        platform, device_kind, compute_capability = "gpu", "NVIDIA GeForce RTX 3090", "8.6"

    monkeypatch.setattr(target.jax, "local_devices", lambda **_: [Gpu()])
    device = AbstractDevice(device_kind="NVIDIA GeForce RTX 3090", num_cores=82, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        assert current_target().compute_capability == (8, 6)
