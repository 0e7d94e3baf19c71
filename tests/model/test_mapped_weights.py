"""Dequantised weights in a file: mapped by the next process, the same bit for bit, for the very same checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import HF
from gguf_files import from_hugging_face

from cacheblend_jax.model import loading as loading_module
from cacheblend_jax.model import mapped_weights, weights_digest
from cacheblend_jax.model.loading import loading_model
from cacheblend_jax.runtime import user_cache
from cacheblend_jax.runtime.kept_programs import sources_digest
from cacheblend_jax.runtime.user_cache import WEIGHTS, keep

QUANTISED = {"attn_q.weight": "Q8_0", "ffn_up.weight": "Q4_0"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return from_hugging_face(HF / "llama2", tmp_path_factory.mktemp("made") / "a.gguf", "llama", QUANTISED)


@pytest.fixture
def checkpoint(made, tmp_path) -> Path:
    return shutil.copy(made, tmp_path / "a.gguf")


@pytest.fixture
def kept(monkeypatch, own_user_cache) -> Path:
    """Has weights be kept, of files however new; returns where."""
    monkeypatch.setattr(weights_digest, "SETTLED_SECONDS", -1000)
    monkeypatch.setattr(user_cache, "_kept", set())
    keep(WEIGHTS)
    return own_user_cache / WEIGHTS


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Grows with each time that weights are read from their checkpoint."""
    grown, load = [], loading_module.load_params

    def recorded(*args, **options):
        grown.append("read")
        return load(*args, **options)

    monkeypatch.setattr(loading_module, "load_params", recorded)
    return grown


def load(path: Path, dtype: str | None = None) -> list[jax.Array]:
    """Loads as a process does that runs one command."""
    with loading_model(path, dtype=dtype) as loading:
        return jax.tree.leaves(loading.model().params)


def load_twice(path: Path, dtype: str | None = None) -> list[jax.Array]:
    """Has weights be kept."""
    load(path, dtype)
    return load(path, dtype)


def files(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.exists() else []


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_are_mapped_after_the_second_time_and_the_same(checkpoint, kept, reads, dtype):
    first, again = load_twice(checkpoint, dtype), load(checkpoint, dtype)
    assert (len(reads), len(files(kept))) == (2, 1)
    for one, other in zip(first, again, strict=True):
        assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where files are mapped is known on Linux alone")
def test_nothing_is_copied(checkpoint, kept):
    load_twice(checkpoint)
    mapped = load(checkpoint)
    (file,) = files(kept)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    regions = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for leaf in mapped:
        assert any(begin <= leaf.unsafe_buffer_pointer() < end for begin, end in regions)


def test_dtypes_are_kept_apart(checkpoint, kept, reads):
    for dtype in (None, "bfloat16") * 3:
        assert load(checkpoint, dtype)[0].dtype.name == (dtype or "float32")
    assert len(reads) == 4


def test_the_first_process_leaves_a_note_alone(checkpoint, kept):
    load(checkpoint)
    (file,) = files(kept)
    assert file.stat().st_size < 10_000
    load(checkpoint)
    assert file.stat().st_size > 10_000


def test_nothing_is_kept_unless_asked_nor_of_a_body_that_failed(checkpoint, kept, monkeypatch):
    def fail():
        with loading_model(checkpoint) as loading:
            loading.model()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    monkeypatch.setattr(user_cache, "_kept", set())
    load_twice(checkpoint)
    assert not files(kept)


def test_what_is_not_dequantised_is_not_kept(kept, tmp_path):
    load(from_hugging_face(HF / "llama2", tmp_path / "b.gguf", "llama"))
    load(HF / "llama2")
    assert not files(kept)


def test_files_that_may_still_change_are_not_kept(checkpoint, kept, monkeypatch):
    monkeypatch.setattr(weights_digest, "SETTLED_SECONDS", 1000)
    load(checkpoint)
    assert not files(kept)


def test_another_checkpoint_in_its_place_is_read_and_replaces_it(checkpoint, kept, reads):
    before = load_twice(checkpoint)
    from_hugging_face(HF / "llama2", checkpoint, "llama", {"attn_q.weight": "Q4_0", "ffn_up.weight": "Q8_0"})
    after, mapped = load_twice(checkpoint), load(checkpoint)
    assert (len(reads), len(files(kept))) == (4, 1)
    assert any((np.asarray(one) != other).any() for one, other in zip(before, after, strict=True))
    jax.tree.map(np.testing.assert_array_equal, after, mapped)


def flipped(content: bytes) -> bytes:
    """Returns it with one bit of the last weight changed, which is no NaN."""
    return content[:-70] + bytes([content[-70] ^ 1]) + content[-69:]


def made_by_others(content: bytes) -> bytes:
    """Returns it as another state of the package's sources would have written it."""
    return content.replace(sources_digest().encode(), b"0" * 64, 1)


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-64], lambda content: b"", lambda content: b"[]\n", flipped, made_by_others],
    ids=["cut off", "empty", "no head", "flipped", "made by others"],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(checkpoint, kept, reads, damage):
    load_twice(checkpoint)
    (file,) = files(kept)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    load_twice(checkpoint)
    assert file.read_bytes() == content
    assert len(reads) in (3, 4)  # a head that is as it was is noted still


def test_a_cache_that_cannot_be_written_costs_time_alone(checkpoint, kept, reads):
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("a file")
    for _ in range(3):
        load(checkpoint)
    assert len(reads) == 3


def test_what_is_kept_has_bounds(checkpoint, made, kept, monkeypatch):
    load_twice(made)
    (first,) = files(kept)
    size = first.stat().st_size
    monkeypatch.setattr(mapped_weights, "MOST_BYTES", size * 3 // 2)
    load_twice(checkpoint)
    (second,) = files(kept)
    assert second != first
    monkeypatch.setattr(mapped_weights, "MOST_BYTES_EACH", size // 2)
    load_twice(made)
    assert files(kept) == [second]


def test_a_disk_that_is_nearly_full_is_left_alone(checkpoint, kept, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    load(checkpoint)
    assert not files(kept)
