"""KV in host memory is copied to its places several layers at a time, and arrives as one thread would have read it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cacheblend_jax as cb
from cacheblend_jax.engine.device_layers import PlacedLayers
from cacheblend_jax.engine.layer_stream import LayerStream
from cacheblend_jax.engine.layout import PlacedChunk
from cacheblend_jax.engine.loading import SHARE_BYTES, LostChunkError, batches, load_all
from cacheblend_jax.model import LayerKV
from cacheblend_jax.store.quantise import SCALES, QuantisedRows
from cacheblend_jax.store.stored_chunk import HostChunk

LAYERS, KEYS, HEADS, HEAD_DIM = 7, 24, 2, 4


class Chunk(HostChunk):
    """An entry in host memory, of the size at which copying it is worth several threads."""

    def __init__(self, entry: cb.ChunkEntry) -> None:
        super().__init__(entry, lambda: None)
        self.entry, self.num_bytes = entry, self.num_layers * 3 * SHARE_BYTES


def placed(tokens: int, start: int, *, kv_dtype: str | None = None, heads: range | None = None, layers: int = LAYERS):
    rng = np.random.default_rng(start)
    k, v = (rng.standard_normal((layers, tokens, HEADS, HEAD_DIM), np.float32) for _ in "kv")
    entry = cb.ChunkEntry(k, v).quantised(kv_dtype).hand_over()
    ids = np.zeros(tokens, np.int32)
    return PlacedChunk(f"key {start}", "", ids[:0], ids, start, stored=Chunk(entry), heads=heads)


def from_disk(chunk: PlacedChunk) -> PlacedChunk:
    """The same chunk from a tier that delivers each layer by itself."""
    chunk.handle.tier = "disk"
    return chunk


def empty(kv_dtype: str | None = None, layers: int = LAYERS, heads: int = HEADS):
    """Buffers that hold what must not reach a result."""
    shape = layers, KEYS, heads, HEAD_DIM
    if kv_dtype is None:
        return tuple(np.full(shape, np.nan, np.float32) for _ in "kv")
    return tuple(QuantisedRows(np.full(shape, 77, kv_dtype), np.full(shape[:-1], np.nan, SCALES)) for _ in "kv")


@pytest.fixture(scope="module")
def readers():
    with ThreadPoolExecutor(4) as readers:
        yield readers


def test_the_first_layers_are_read_alone_and_later_ones_together():
    assert batches(11, 4) == [range(0, 1), range(1, 2), range(2, 4), range(4, 8), range(8, 11)]
    assert batches(3, 1) == [range(0, 1), range(1, 2), range(2, 3)]
    assert batches(0, 4) == []


@pytest.mark.parametrize("kv_dtype", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("heads", [None, range(1, 2)])
def test_copying_gives_what_reading_layer_by_layer_does(readers, kv_dtype, heads):
    found = []
    for threads, change in ((3, lambda chunk: chunk), (1, lambda chunk: chunk), (3, from_disk)):
        buffers = empty(kv_dtype, heads=HEADS if heads is None else len(heads))
        chunks = [placed(5, 2, kv_dtype=kv_dtype, heads=heads), placed(9, 7, kv_dtype=kv_dtype, heads=heads)]
        load_all([change(chunks[0]), chunks[1]], *buffers, readers, threads=threads)
        found.append(jax.tree.leaves(buffers))
    for others in found[1:]:
        for leaf, other in zip(found[0], others, strict=True):
            assert leaf.tobytes() == other.tobytes()
    assert np.isnan(found[0][-1][:, 16:].astype(np.float32)).all()  # scales or values of rows that are nobody's


def test_what_has_to_be_dequantised_is_dequantised(readers):
    quantised, values = placed(5, 2, kv_dtype="int8"), placed(5, 9)
    k, v = empty()
    load_all([quantised, values], k, v, readers, threads=3)
    entry = quantised.handle.entry.dequantised()
    assert k[:, 2:7].tobytes() == entry.k.tobytes()
    assert v[:, 9:14].tobytes() == values.handle.entry.v.tobytes()


def test_an_entry_of_another_shape_is_lost(readers):
    chunk = placed(5, 2, layers=LAYERS)
    wrong = tuple(buffer.astype(np.float16) for buffer in empty())
    with pytest.raises(LostChunkError, match=r"float32.*float16"):
        load_all([chunk], *wrong, readers, threads=3)


@settings(max_examples=40, deadline=None)
@example(layers=7, host_layers=7, device_layers=4, twice=True, kept=0, room=0, sent_ahead=0)
@example(layers=13, host_layers=6, device_layers=4, twice=False, kept=3, room=0, sent_ahead=3)
@example(layers=7, host_layers=7, device_layers=2, twice=True, kept=1, room=5, sent_ahead=1)
@given(
    layers=st.integers(1, 13),
    host_layers=st.integers(1, 13),
    device_layers=st.integers(1, 6),
    twice=st.booleans(),
    kept=st.integers(0, 3),
    room=st.integers(0, 6),
    sent_ahead=st.integers(0, 5),
)
def test_every_layer_arrives_whole_however_few_buffers_there_are(
    readers, layers, host_layers, device_layers, twice, kept, room, sent_ahead
):
    sent_ahead = min(sent_ahead, device_layers - 1)
    host_layers = layers if twice else max(host_layers, min(device_layers, layers))  # as `Delivery` has them
    chunks = [placed(5, 2, layers=layers), placed(9, 7, layers=layers)]
    entries = [chunk.handle.entry for chunk in chunks]
    there = {layer: LayerKV(*(np.full((KEYS, HEADS, HEAD_DIM), 1.0 + layer) for _ in "kv")) for layer in range(kept)}
    wanted, buffers = list(range(layers)) * (2 if twice else 1), empty(layers=host_layers)

    def put(pair):
        return jax.device_put([part.copy() for part in pair])

    stays = PlacedLayers(max(room, kept), 0, dict(there))
    stream = LayerStream(
        chunks, wanted, buffers, device_layers, put, readers, threads=3, sent_ahead=sent_ahead, kept=stays
    )
    with stream:
        for layer in wanted:
            kv = stream.next()
            k, v = np.asarray(kv.k), np.asarray(kv.v)
            if layer in there:
                assert (k == 1.0 + layer).all()
            else:
                for chunk, entry in zip(chunks, entries, strict=True):
                    assert k[chunk.start : chunk.stop].tobytes() == entry.k[layer].tobytes()
                    assert v[chunk.start : chunk.stop].tobytes() == entry.v[layer].tobytes()
            stream.used_until(jax.numpy.asarray(v[0, 0, 0]) * 1)
    assert sorted(stays.layers) == [layer for layer in range(layers) if layer < max(room, kept)] + [
        layer for layer in there if layer >= layers
    ]
    for layer in set(stays.layers) - set(there):  # whole, and not deleted with those that went
        for chunk, entry in zip(chunks, entries, strict=True):
            assert np.asarray(stays.layers[layer].k)[chunk.start : chunk.stop].tobytes() == entry.k[layer].tobytes()
