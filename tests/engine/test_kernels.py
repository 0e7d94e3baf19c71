"""The kernels of an engine's programs: proven at first, or as asked."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import FAMILIES, family_model, random_prompt
from mesh_cases import mesh_of

import cacheblend_jax as cb
from cacheblend_jax.blend.layer_step import PromptSequence
from cacheblend_jax.blend.resident import prefill
from cacheblend_jax.blend.schedule import make_plan
from cacheblend_jax.engine import kernels
from cacheblend_jax.evaluation.whole_prefills import request_of
from cacheblend_jax.model.kv_cache import KVCache, cache_shape
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.sharding import partition_of
from cacheblend_jax.model.transformer import random_params
from pallas_kernels.attention import api as attention
from pallas_kernels.blending import api as blending
from pallas_kernels.dispatch import OVERRIDE


@pytest.fixture
def model() -> cb.Model:
    return family_model("llama3")


@pytest.fixture
def proven_on(monkeypatch):
    """What kernels were proven on, and for, with models that say that they are on a GPU."""
    proven: list[object] = []
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.setattr(Model, "platform", "gpu")
    monkeypatch.setattr(kernels, "use_verdicts_on", lambda *asked: proven.append(asked))
    return proven


def test_unknown_kernels_are_an_error_that_lists_the_known(model):
    with pytest.raises(cb.CacheBlendError, match="unknown kernels 'cuda'; expected one of auto, xla, mosaic_gpu, "):
        cb.Engine(model, kernels="cuda")


def test_an_engine_on_a_gpu_proves_its_kernels_for_what_its_programs_call_them_with(model, proven_on):
    assert cb.Engine(model).model is model
    (device,) = model.placement.device_set
    assert proven_on == [(device, ("float32", model.config.head_dim))]


def test_a_models_programs_call_both_operations_with_its_dtype_and_head_dim_alone(monkeypatch):
    called = set()

    def choose(implementation, call, unsupported):
        called.add(call[:3])
        return "xla"

    for api in (attention, blending):
        monkeypatch.setattr(api, "choose_backend", choose)
    config, length = replace(FAMILIES["llama3"], dtype="bfloat16"), 200
    blend = cb.BlendConfig(0.3, selector="cross")
    plan = make_plan(num_layers=6, length=length, active=length, forced=64, blend=blend, check_layer=1)
    request = request_of(plan, length, config.vocab_size, 0.3)
    stored = jnp.zeros(cache_shape(config, plan.cache_length), config.dtype)
    sequence = PromptSequence(request.length, rope_tables(config, plan.cache_length))
    run = partial(prefill, random_params(jax.random.key(0), config), config=config, plan=plan)
    jax.eval_shape(run, request, KVCache(stored, stored), sequence)
    operations = "selective_attention", "blend_kv"
    assert called == {(operation, config.dtype, config.head_dim) for operation in operations}


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


def test_on_several_devices_kernels_are_xlas_unless_a_partition_splits_them(model, proven_on, monkeypatch):
    devices = SimpleNamespace(device_set=frozenset(jax.devices()[:2]), is_fully_addressable=True)
    monkeypatch.setattr(Model, "placement", devices)
    assert kernels.with_kernels(model, "auto").kernels == "xla"
    assert kernels.with_kernels(model, "pallas").kernels == "pallas"
    split = replace(model, partition=partition_of(mesh_of("1x2"), model.config))
    assert kernels.with_kernels(split, "auto").kernels is None
    devices.is_fully_addressable = False  # several hosts, which may have found different kernels to be the best
    assert kernels.with_kernels(split, "auto").kernels == "xla"
    assert kernels.with_kernels(split, "pallas").kernels == "pallas"


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
