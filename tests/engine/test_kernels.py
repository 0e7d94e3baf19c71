"""The kernels of an engine's programs: proven at first, or as asked."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest
from conftest import family_model, random_prompt

import cacheblend_jax as cb
from cacheblend_jax.engine import kernels
from cacheblend_jax.model.model import Model
from pallas_kernels.dispatch import OVERRIDE


@pytest.fixture
def model() -> cb.Model:
    return family_model("llama3")


@pytest.fixture
def proven_on(monkeypatch):
    """What kernels were proven on, for models that say that they are on a GPU."""
    proven: list[object] = []
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.setattr(Model, "platform", "gpu")
    monkeypatch.setattr(kernels, "use_verdicts_on", proven.append)
    return proven


def test_unknown_kernels_are_an_error_that_lists_the_known(model):
    with pytest.raises(cb.CacheBlendError, match="unknown kernels 'cuda'; expected one of auto, xla, mosaic_gpu, "):
        cb.Engine(model, kernels="cuda")


def test_an_engine_on_a_gpu_proves_its_kernels(model, proven_on):
    assert cb.Engine(model).model is model
    assert proven_on == list(model.placement.device_set)


def test_no_kernels_are_proven_where_xla_or_others_were_asked_for(model, proven_on, monkeypatch):
    for asked in ("xla", "pallas", "triton"):
        assert cb.Engine(model, kernels=asked).model.kernels == asked
    assert cb.Engine(model.with_kernels("xla")).model.kernels == "xla"
    monkeypatch.setenv(OVERRIDE, "xla")
    assert cb.Engine(model).model is model
    assert not proven_on


def test_no_kernels_are_proven_on_a_cpu_or_for_wrong_arguments(model, proven_on, monkeypatch):
    with pytest.raises(cb.CacheBlendError, match="unknown executor"):
        cb.Engine(model, executor="fast")
    monkeypatch.setattr(Model, "platform", "cpu")
    cb.Engine(model)
    assert not proven_on


def test_on_a_mesh_kernels_are_xlas(model, proven_on, monkeypatch):
    mesh = SimpleNamespace(device_set=frozenset(jax.devices()[:2]))
    monkeypatch.setattr(Model, "placement", mesh)
    assert kernels.with_kernels(model, "auto").kernels == "xla"
    assert kernels.with_kernels(model, "pallas").kernels == "pallas"


def test_other_kernels_are_other_programs_of_the_same_model(model):
    other = model.with_kernels("xla")
    assert other is model.with_kernels("xla") is not model
    assert other.with_kernels(None) is model
    assert other.fingerprint == model.fingerprint
    count, prompt = other.runner.count, random_prompt(3)
    with cb.Engine(model) as engine, cb.Engine(model, kernels="xla") as xla:
        expected = engine.prefill(prompt, "full").logits
        assert xla.prefill(prompt, "full").logits.tolist() == expected.tolist()
    assert other.runner.count > count
