"""What entries are called: kept through every tier, absent from entries of older versions, the same for every model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_cases import key_of, make_entry

import cacheblend_jax as cb
from cacheblend_jax.store.entry import QueuedEntry
from cacheblend_jax.store.label import UNKNOWN, Label, label_of
from cacheblend_jax.store.record import (
    DamagedRecordError,
    content_of,
    dump_record,
    load_record,
    record_from_json,
    record_of,
    record_to_json,
)

LABEL = label_of("llama", "The Cobalt team\n\nworks in Oslo.")


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_a_label_outlives_the_process_and_finds_the_text(tmp_path, salt):
    with cb.ChunkStore(tmp_path, salt=salt) as store:
        store.put(key_of(1), replace(make_entry(1), label=LABEL))
        store.put(key_of(2), make_entry(2))
    with cb.ChunkStore(tmp_path, salt=salt) as store:
        assert (store.get(key_of(1)).label, store.get(key_of(2)).label) == (LABEL, UNKNOWN)
        assert [record.key for record in store.same_texts([LABEL.text_digest])] == [key_of(1)]
        assert store.same_texts(["0" * 64]) == []
    with cb.ChunkStore(tmp_path, salt="another") as store:
        assert store.same_texts([LABEL.text_digest]) == []


def test_records_without_a_label_are_as_they_were_before_there_were_labels():
    record = record_of(QueuedEntry(key_of(1), make_entry(1)), "", 5.0)
    assert set(record_to_json(record)).isdisjoint(("model", "text", "text_digest"))
    labelled = replace(record, label=LABEL)
    text, crc = dump_record(labelled)
    assert load_record(text, crc, record.name) == labelled
    assert content_of(labelled) == content_of(record)  # it is not written again for its label


def test_a_label_that_is_no_text_is_damage():
    record = record_of(QueuedEntry(key_of(1), make_entry(1)), "", 5.0)
    with pytest.raises(DamagedRecordError):
        record_from_json(record_to_json(record) | {"model": 5})


def test_the_digest_is_of_the_text_alone():
    assert LABEL.text == "The Cobalt team works in Oslo."
    assert label_of("qwen", "The Cobalt  team works in Oslo. ").text_digest == LABEL.text_digest
    assert label_of("llama", "The Cobalt team works in Rome.").text_digest != LABEL.text_digest
    assert label_of("llama", "") == Label("llama")
    assert len(label_of("llama", "word " * 1000).text) <= 80
