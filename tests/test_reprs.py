"""What is printed of records that hold arrays: their shapes, on one line, and never the numbers."""

from __future__ import annotations

import jax
from conftest import family_model
from store_cases import make_entry

import cacheblend_jax as cb
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.store import DeviceEntry


def test_records_print_shapes_and_not_arrays():
    model, entry = family_model("llama3"), make_entry(1)
    on_device = DeviceEntry(*map(jax.numpy.asarray, (entry.k, entry.v)), entry.num_tokens)
    printed = {
        kind: repr(each)
        for kind, each in zip("mced", (model, KVCache(entry.k, entry.v), entry, on_device), strict=True)
    }
    assert printed["m"] == "Model('random', LlamaForCausalLM, 6 layers of 32, float32, on cpu)"
    assert printed["c"] == "KVCache(k=float32[3, 6, 2, 8], v=float32[3, 6, 2, 8])"
    assert printed["e"].startswith("ChunkEntry(float32[3, 6, 2, 8], Label(")
    assert printed["d"].startswith("DeviceEntry(float32[3, 6, 2, 8], 6 tokens, Label(")
    assert repr(jax.tree.map(lambda _: None, KVCache(entry.k, entry.v))) == "KVCache(k=None, v=None)"


def test_files_are_named_by_text_or_path(tmp_path):
    trace = cb.Trace()
    trace.save(str(tmp_path / "t.json"))
    trace.save(tmp_path / "p.json")
    assert (tmp_path / "t.json").read_text() == (tmp_path / "p.json").read_text()
