"""The fingerprint that ties stored KV to a model: its weights' digest is remembered, and never outlives a change."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import jax
import pytest
from conftest import HF

import cacheblend_jax as cb
from cacheblend_jax.model import weights_digest


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_digest, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(weights_digest, "user_cache_path", lambda _: tmp_path / "cache")
    directory = shutil.copytree(HF / "llama3", tmp_path / "model")
    settle(directory)
    return directory


def settle(directory: Path, seconds_ago: float = 100.0) -> None:
    for file in directory.glob("*.safetensors"):
        os.utime(file, (time.time() - seconds_ago,) * 2)


def count_hashing(monkeypatch) -> list[int]:
    calls = []
    computed = weights_digest.WeightFiles._computed
    monkeypatch.setattr(
        weights_digest.WeightFiles, "_computed", lambda self, names: calls.append(1) or computed(self, names)
    )
    return calls


def change_a_weight(directory: Path) -> None:
    file = min(directory.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_digest_is_computed_once_and_remembered_beside_the_model(checkpoint, monkeypatch):
    calls = count_hashing(monkeypatch)
    prints = {cb.load_model(checkpoint).fingerprint for _ in range(3)}
    assert len(prints) == len(calls) == 1
    kept = json.loads((checkpoint / weights_digest.DIGEST_FILE).read_text())
    assert len(kept["sha256"]) == 64


@pytest.mark.parametrize("aged", [True, False])
def test_a_changed_file_changes_the_fingerprint(checkpoint, aged):
    before = cb.load_model(checkpoint).fingerprint
    change_a_weight(checkpoint)
    if aged:
        settle(checkpoint, 50.0)
    assert cb.load_model(checkpoint).fingerprint != before


def test_a_digest_that_was_tampered_with_in_form_is_computed_anew(checkpoint, monkeypatch):
    before = cb.load_model(checkpoint).fingerprint
    (checkpoint / weights_digest.DIGEST_FILE).write_text("{}")
    calls = count_hashing(monkeypatch)
    assert cb.load_model(checkpoint).fingerprint == before
    assert calls


def test_where_the_model_cannot_be_written_the_digest_is_in_the_users_cache(checkpoint, monkeypatch, tmp_path):
    (checkpoint / weights_digest.DIGEST_FILE).mkdir()  # nothing can be put in its place
    before = cb.load_model(checkpoint).fingerprint
    assert len(list((tmp_path / "cache" / "digests").glob("*.json"))) == 1
    calls = count_hashing(monkeypatch)
    assert cb.load_model(checkpoint).fingerprint == before
    assert not calls


def test_weights_that_change_after_loading_are_not_mistaken_for_those_loaded(checkpoint):
    unchanged = cb.load_model(checkpoint)
    model = cb.load_model(checkpoint)
    change_a_weight(checkpoint)
    settle(checkpoint, 50.0)
    changed = cb.load_model(checkpoint)
    # Neither may pass for the other: the files no longer say what the earlier one holds.
    assert model.fingerprint == unchanged.fingerprint != changed.fingerprint


def test_parameters_put_in_the_place_of_those_loaded_have_their_own_fingerprint(checkpoint):
    model = cb.load_model(checkpoint)
    params = jax.tree.map(lambda leaf: leaf * 2, model.params)
    assert dataclasses.replace(model, params=params).fingerprint != model.fingerprint
    assert cb.load_model(checkpoint, dtype="float16").fingerprint != model.fingerprint


def test_a_parameter_replaced_in_place_changes_the_fingerprint(checkpoint):
    """As merging an adapter does: KV of the weights before must not be served to those after."""
    model = cb.load_model(checkpoint)
    before = model.fingerprint
    kernel = model.params.layers["v_proj"]["kernel"]
    model.params.layers["v_proj"]["kernel"] = kernel * 2
    merged = model.fingerprint
    assert merged != before
    assert merged == dataclasses.replace(model).fingerprint
    model.params.layers["v_proj"]["kernel"] = kernel
    assert model.fingerprint == before


def test_how_a_tokenizer_was_last_called_is_no_part_of_the_fingerprint(checkpoint):
    before = cb.load_model(checkpoint).fingerprint
    model = cb.load_model(checkpoint)
    model.tokenizer("a text", truncation=True, max_length=2)
    assert model.tokenizer.backend_tokenizer.truncation
    assert model.fingerprint == before
