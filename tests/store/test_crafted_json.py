"""JSON that somebody wrote to be trouble: with numbers that Python cannot convert, or too deep to be read."""

from __future__ import annotations

import json

import pytest
from etils import epath
from store_cases import key_of, make_entry

from cacheblend_jax.store.entry import QueuedEntry
from cacheblend_jax.store.marker import MARKER_NAME, read_marker
from cacheblend_jax.store.pack import RECORDS_FILE, read_contents
from cacheblend_jax.store.record import (
    DamagedRecordError,
    canonical_json,
    crc32c_of_bytes,
    load_record,
    record_from_json,
    record_of,
    record_to_json,
)

DEEP = b"[" * 200_000
FIELDS = {
    "infinite": ("shape", [3, float("inf"), 2, 8]),
    "too large": ("shape", [3, 10**30, 2, 8]),
    "negative": ("shape", [3, -6, 2, 8]),
    "too late": ("created", 10**400),
}


@pytest.fixture
def record() -> dict:
    return record_to_json(record_of(QueuedEntry(key_of(1), make_entry(1)), "", 0.0))


@pytest.mark.parametrize("name", FIELDS)
def test_a_record_with_such_a_number_is_damaged(record, name):
    field, value = FIELDS[name]
    with pytest.raises(DamagedRecordError):
        record_from_json(record | {field: value})


def test_a_pack_with_such_a_number_is_damaged(record, tmp_path):
    body = {"version": record["version"], "entries": [record], "files": [["_METADATA", float("inf"), 0]]}
    text = canonical_json({"crc32c": crc32c_of_bytes(canonical_json(body)), "pack": body})
    (tmp_path / RECORDS_FILE).write_bytes(text)
    with pytest.raises(DamagedRecordError):
        read_contents(epath.Path(tmp_path))


def test_what_is_too_deep_is_damaged(tmp_path):
    for name in (RECORDS_FILE, MARKER_NAME):
        (tmp_path / name).write_bytes(DEEP)
    with pytest.raises(DamagedRecordError):
        read_contents(epath.Path(tmp_path))
    with pytest.raises(DamagedRecordError):
        load_record(DEEP, crc32c_of_bytes(DEEP), "")
    assert read_marker(epath.Path(tmp_path)) is None


def test_a_marker_with_such_a_number_is_damaged(tmp_path):
    body = {"format": "cacheblend_jax store", "version": float("inf"), "id": "ab"}
    text = canonical_json({"crc32c": crc32c_of_bytes(canonical_json(body)), "store": body})
    assert json.loads(text)["store"]["version"] == float("inf")
    (tmp_path / MARKER_NAME).write_bytes(text)
    assert read_marker(epath.Path(tmp_path)) is None
