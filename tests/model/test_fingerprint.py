"""The fingerprint that ties stored KV to a model: its weights' digest is remembered, and never outlives a change."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import pytest
from conftest import FAMILIES, HF, SHAPE, family_model

import cacheblend_jax as cb
from cacheblend_jax.model import RopeConfig, weights_digest
from cacheblend_jax.model.model import _config_bytes


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_digest, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(weights_digest, "SETTLED_SECONDS", 0.0)
    return shutil.copytree(HF / "llama3", tmp_path / "model")


def records(own_user_cache: Path) -> list[Path]:
    return list((own_user_cache / "digests").glob("*"))


def count_hashing(monkeypatch) -> list[int]:
    calls = []
    computed = weights_digest.WeightFiles._computed
    monkeypatch.setattr(weights_digest.WeightFiles, "_computed", lambda self: calls.append(1) or computed(self))
    return calls


def change_a_weight(directory: Path) -> None:
    file = min(directory.glob("*.safetensors"))
    with open(file, "r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last[0] ^ 1]))


def listing(directory: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (directory, *directory.rglob("*"))}


def test_the_digest_is_computed_once_and_remembered_in_the_users_cache(checkpoint, monkeypatch, own_user_cache):
    before = listing(checkpoint)
    calls = count_hashing(monkeypatch)
    prints = {cb.load_model(checkpoint).fingerprint for _ in range(3)}
    assert len(prints) == len(calls) == 1
    assert [len(json.loads(record.read_text())["sha256"]) for record in records(own_user_cache)] == [64]
    assert listing(checkpoint) == before


def test_files_that_may_still_change_within_their_time_stamp_are_not_remembered(
    checkpoint,
    monkeypatch,
    own_user_cache,
):
    monkeypatch.setattr(weights_digest, "SETTLED_SECONDS", 3600.0)
    assert cb.load_model(checkpoint).fingerprint
    assert not records(own_user_cache)


def test_verify_hashes_all_bytes_and_remembers_them_anew(checkpoint, monkeypatch, own_user_cache, caplog):
    before = cb.load_model(checkpoint).fingerprint
    (record,) = records(own_user_cache)
    known = json.loads(record.read_text())
    record.write_text(json.dumps(known | {"sha256": "0" * 64}))
    calls = count_hashing(monkeypatch)
    assert cb.load_model(checkpoint).fingerprint != before  # the record of the user's own cache is believed
    assert not calls
    assert cb.load_model(checkpoint, verify=True).fingerprint == before
    assert len(calls) == 1
    assert "was wrong and is replaced" in caplog.text
    assert json.loads(record.read_text()) == known


def test_equal_sizes_times_and_records_do_not_make_two_checkpoints_one(checkpoint, tmp_path):
    """As with archives and images that set all times to one, the record of an earlier version copied along."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    change_a_weight(other)
    for file in [*checkpoint.iterdir(), *other.iterdir()]:
        os.utime(file, (1e9, 1e9))
    weights = sorted(checkpoint.glob("*.safetensors"))
    first = cb.load_model(checkpoint)
    travelling = {
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights],
        "sha256": first.weight_files.digest(),
    }
    for directory in (checkpoint, other):
        (directory / "cacheblend-digest.json").write_text(json.dumps(travelling))
    assert cb.load_model(other).fingerprint != first.fingerprint


def test_a_file_changed_in_place_under_its_old_time_changes_the_fingerprint(checkpoint):
    file = min(checkpoint.glob("*.safetensors"))
    stat = file.stat()
    before = cb.load_model(checkpoint).fingerprint
    change_a_weight(checkpoint)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert cb.load_model(checkpoint).fingerprint != before


@pytest.mark.parametrize("change", ["device", "inode", "size", "mtime_ns", "ctime_ns", "sample"])
def test_a_record_is_believed_only_where_everything_agrees(checkpoint, monkeypatch, own_user_cache, change):
    before = cb.load_model(checkpoint).fingerprint
    (record,) = records(own_user_cache)
    known = json.loads(record.read_text())
    value = known["files"][-1][change]
    known["files"][-1][change] = "0" * 64 if change == "sample" else value + 1
    record.write_text(json.dumps(known | {"sha256": "0" * 64}))
    calls = count_hashing(monkeypatch)
    assert cb.load_model(checkpoint).fingerprint == before
    assert calls


@pytest.mark.parametrize("size", [0, 1, 4096, 64 * 4096, 64 * 4096 + 1, 10**7])
def test_samples_begin_with_a_file_and_end_with_it(tmp_path, size):
    offsets = weights_digest._sample_offsets(size)
    assert len(offsets) == min(-(-size // 4096), 64)
    if size:
        assert offsets[0] == 0
        assert offsets[-1] + 4096 >= size
    content = bytearray(size)
    (tmp_path / "a").write_bytes(content)
    (state,) = weights_digest.file_states(tmp_path, ["a"])
    for place in {0, size - 1} if size else ():
        changed = content.copy()
        changed[place] = 1
        (tmp_path / "a").write_bytes(changed)
        assert weights_digest.file_states(tmp_path, ["a"])[0].sample != state.sample


def test_a_changed_file_changes_the_fingerprint(checkpoint):
    before = cb.load_model(checkpoint).fingerprint
    change_a_weight(checkpoint)
    assert cb.load_model(checkpoint).fingerprint != before


@pytest.mark.parametrize("content", ["{}", "[]", "{", "[" * 10**5, '{"files": 1, "sha256": 2}'])
def test_a_record_that_is_none_is_computed_anew(checkpoint, monkeypatch, own_user_cache, content):
    before = cb.load_model(checkpoint).fingerprint
    (record,) = records(own_user_cache)
    record.write_text(content)
    calls = count_hashing(monkeypatch)
    assert cb.load_model(checkpoint).fingerprint == before
    assert calls


def test_a_cache_that_cannot_be_written_costs_the_hash_alone(checkpoint, own_user_cache):
    own_user_cache.mkdir()
    (own_user_cache / "digests").write_text("a file")
    assert cb.load_model(checkpoint).fingerprint == cb.load_model(checkpoint, verify=True).fingerprint


def test_weights_that_change_after_loading_are_not_mistaken_for_those_loaded(checkpoint):
    unchanged = cb.load_model(checkpoint)
    model = cb.load_model(checkpoint)
    change_a_weight(checkpoint)
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


@pytest.mark.parametrize(
    "changes",
    [
        {"local_rope": None},
        {"rope": RopeConfig(theta=1e6)},
        {"norm_offset": 0.0},
        {"embedding_scale": 1.0},
        {"attention_scale": None},
        {"attention_soft_cap": 50.0},
        {"attention_sinks": True},
        {"windows": (20,) * 6},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_configuration_has_another_fingerprint(changes):
    model = family_model("gemma3")
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
    assert other.fingerprint != model.fingerprint


def test_options_that_a_model_does_not_use_are_no_part_of_its_fingerprint():
    """A new option, of another family, must not cost users what they have stored."""
    names = json.loads(_config_bytes(FAMILIES["llama2"])).keys()
    assert names == {"architecture", "windows", *SHAPE} - {"max_positions"}


def test_weights_are_recognised_under_another_name_and_dtype_but_not_when_changed(tmp_path):
    for name in ("here", "there"):
        shutil.copytree(HF / "llama3", tmp_path / name)
    there, *_ = sorted((tmp_path / "there").glob("*.safetensors"))
    here, cast = (
        cb.load_model(tmp_path / name, dtype=dtype) for name, dtype in (("here", "float32"), ("there", "bfloat16"))
    )
    assert here.weights_digest == cast.weights_digest
    state = cast.weight_files.states[0]
    assert weights_digest.content_digest([state]) == weights_digest.content_digest(
        [dataclasses.replace(state, name="another")]
    )
    changed = bytearray(there.read_bytes())
    changed[-1] ^= 1
    there.write_bytes(changed)
    assert cb.load_model(tmp_path / "there", dtype="float32").weights_digest != here.weights_digest
    cast.params.layers["q_proj"]["kernel"] = cast.params.layers["q_proj"]["kernel"] * 2
    assert cast.weights_digest != here.weights_digest
