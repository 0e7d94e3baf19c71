"""I6 on meshes of eight devices: logits, recomputed sets and answers are one device's, and no KV is gathered."""

from __future__ import annotations

from math import gcd

import numpy as np
import pytest
from conftest import random_prompt, relative_error
from mesh_cases import (
    BLEND,
    BY_EXPERT,
    BY_QUESTION,
    CONFIGS,
    PROMPT,
    SHAPE,
    collectives,
    model_on,
    store_of,
    wanted,
    whole_model,
)

import cacheblend_jax as cb
from cacheblend_jax.engine.slot_part import SlotPart

# Each mesh, each family with each executor or mesh, and each mode: all pairs would compile for minutes.
CASES = [
    ("8 KV heads", "1x8", "resident", ("reuse", "blend"), None, BLEND),
    ("2 KV heads", "1x8", "streamed", ("blend",), None, BLEND),
    ("1 KV head", "2x4", "streamed", ("reuse",), None, BLEND),
    ("1 KV head", "4x2", "resident", ("blend",), None, BY_QUESTION),
    ("experts", "2x4", "resident", ("prefix", "blend"), BY_EXPERT, BLEND),
    ("1 KV head", "8x1", "resident", ("full",), None, BLEND),
    ("experts", "4x2", "streamed", ("blend",), None, BLEND),
]
HIDDEN, LAYERS = SHAPE["hidden_size"], SHAPE["num_layers"]


@pytest.mark.parametrize(("name", "shape", "executor", "modes", "rules", "blend"), CASES)
def test_i6_a_mesh_gives_what_one_device_gives(name, shape, executor, modes, rules, blend):
    heads = CONFIGS[name].num_kv_heads
    with cb.Engine(model_on(name, shape, rules), store_of(name), blend, executor=executor) as engine:
        for mode in modes:
            out, one = engine.prefill(PROMPT, mode), wanted(name, mode, blend)
            assert (out.stats.executor, out.stats.hits) == (executor, one.stats.hits)
            assert relative_error(out.logits, one.logits) < 1e-5
            np.testing.assert_array_equal(out.recomputed, one.recomputed)
            assert relative_error(out.cache.k, one.cache.k) < 1e-5
            for x in (out.padded_cache.k, out.padded_cache.v):
                assert x.sharding.shard_shape(x.shape)[2] == heads // gcd(heads, int(shape[-1]))


def programs(model: cb.Model) -> dict[str, list[list[tuple[str, str]]]]:
    """By function, what each program compiled for it has the devices exchange."""
    found: dict[str, list[list[tuple[str, str]]]] = {}
    for key, text in zip(model.runner._entries, model.runner.texts(), strict=True):
        found.setdefault(key[0].__name__, []).append(collectives(text))
    return found


def test_devices_exchange_hidden_states_twice_a_layer_and_no_kv():
    model = model_on("2 KV heads", "1x8")
    with cb.Engine(model, store_of("2 KV heads"), BLEND, executor="streamed") as engine:
        out = engine.prefill(PROMPT)
        engine.complete(out, max_new_tokens=2, stop_token_ids=[])
    rows, kept = (stage.rows for stage in out.plan.stages)
    found = programs(model)

    def sums(rows: int, times: int) -> list[tuple[str, str]]:
        return [("all-reduce", f"f32[{rows},{HIDDEN}]")] * times

    logits = [("all-gather", f"f32[1,{SHAPE['vocab_size']}]")]
    selection = [("all-reduce", f"f32[4,{rows}]")]  # squared norms and distances, of keys and values
    # Each device has some of the embedding's rows, and some of the logits.
    assert found["begin"] == [sums(rows, 1)]
    assert found["plain_layer"] == [sums(rows, 2)]
    assert found["border_layer"] == [sorted(sums(kept, 2) + selection)]
    assert found["last_layer"] == [sorted(sums(1, 2) + logits)]
    assert found["decode_tokens"] == [sorted(sums(1, 3) + logits)]  # of a loop over layers, one layer is written
    assert found["token_signals"] == found["with_room"] == [[]]


def test_answers_decoded_together_are_split_over_data():
    model, prompts = model_on("experts", "4x2"), [random_prompt(n, (9, n), 3, 2) for n in range(1, 5)]
    answers = []
    for each in (model, whole_model("experts")):
        with cb.Engine(each, cb.ChunkStore(), BLEND) as engine:
            together = engine.generate_batch(prompts, mode="full", max_new_tokens=3, stop_token_ids=[])
            answers.append([answer.token_ids for answer in together])
    assert answers[0] == answers[1]
    for exchanged in programs(model)["decode_slots"]:
        # Each device decodes one of four slots. Beside that, tokens, and whether any slot goes on, are exchanged.
        large = [each for each in exchanged if not each[1].startswith(("s32[4]", "s32[64,4]", "pred[]"))]
        assert large == sorted(
            [("all-reduce", f"f32[1,{HIDDEN}]")] * 3 + [("all-gather", f"f32[1,{SHAPE['vocab_size']}]")]
        )
    cache = SlotPart(model, 4, 32)._state().cache
    assert cache.k.sharding.shard_shape(cache.k.shape) == (LAYERS, 1, 2, 8, 32)  # of 4 KV heads, in a CPU's order
    assert SlotPart(model, 3, 32)._state().cache.k.sharding.shard_shape((LAYERS, 3, 4, 8, 32))[1] == 3


def test_what_is_kept_on_the_devices_is_split():
    one = store_of("8 KV heads")
    keys = one.keys()
    whole = sum(one.get(key).num_bytes for key in keys)
    with cb.Engine(model_on("8 KV heads", "1x8"), cb.ChunkStore(device_bytes=whole // 4), BLEND) as engine:
        for key in keys:
            engine.store.put(key, one.get(key))
            engine._background.promote_later(key, one.get(key).num_bytes)
        engine.flush()
        assert whole // 8 <= engine.store.stats.device.bytes <= whole // 4  # of each device
        for key in keys:
            with engine.store.open(key) as chunk:
                k = chunk.device_entry.k
                assert chunk.num_bytes == one.get(key).num_bytes
                assert k.sharding.shard_shape(k.shape)[2] == 1
        out, before = engine.prefill(PROMPT, "reuse"), len(keys)
        assert engine.store.stats.device.hits > before
        assert engine.store.stats.host.hits == 0
        assert relative_error(out.logits, wanted("8 KV heads", "reuse").logits) < 1e-5


def test_quantised_kv_is_split_as_codes():
    answers, store = [], cb.ChunkStore(kv_dtype="int8")
    for model in (whole_model("2 KV heads"), model_on("2 KV heads", "2x4")):
        with cb.Engine(model, store, BLEND, executor="streamed") as engine:
            engine.precompute(PROMPT)
            answers.append(engine.prefill(PROMPT))
    assert relative_error(answers[1].logits, answers[0].logits) < 1e-5
    np.testing.assert_array_equal(answers[1].recomputed, answers[0].recomputed)


@pytest.mark.parametrize(("writer", "reader"), [(None, "1x4"), ("1x4", None)])
def test_entries_serve_other_meshes_than_they_were_computed_on_bit_for_bit(writer, reader, tmp_path):
    def engine_on(shape: str | None) -> cb.Engine:
        model = whole_model("2 KV heads") if shape is None else model_on("2 KV heads", shape)
        return cb.Engine(model, cb.ChunkStore(tmp_path), BLEND)

    with engine_on(writer) as engine:
        keys = engine.precompute(PROMPT)
    with engine_on(reader) as engine:
        out = engine.prefill(PROMPT, "reuse")
        values = np.concatenate([engine.store.get(key).v for key in keys], axis=1)
    assert out.stats.hits == len(keys) == len(PROMPT.chunks)
    begin = len(PROMPT.prefix)
    assert np.asarray(out.cache.v)[:, begin : begin + values.shape[1]].tobytes() == values.tobytes()
