"""The commands that look after a store's directory, and those that fill and use one."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from conftest import HF, family_model
from store_cases import BIG, fill, key_of, largest_file, make_entry, packs

import cacheblend_jax as cb
from cacheblend_jax.cli.main import main
from cacheblend_jax.cli.store_report import stored_otherwise
from cacheblend_jax.engine import groups
from cacheblend_jax.engine.chunk_lookup import ChunkLookup
from cacheblend_jax.model.demo import demo_directory
from cacheblend_jax.store.disk import DiskTier
from cacheblend_jax.store.label import UNKNOWN, label_of
from cacheblend_jax.store.maintenance import prune


def run(capsys, tmp_path, *arguments, code: int = 0) -> dict:
    report = tmp_path / "report.json"
    assert main([*map(str, arguments), "--json", str(report)]) == code
    return json.loads(report.read_text()) | {"printed": capsys.readouterr().out}


def test_ls_lists_and_rm_removes(capsys, tmp_path):
    fill(tmp_path / "kv", [2**255 + 1, 2**255 + 2, 5])
    listed = run(capsys, tmp_path, "store", "ls", tmp_path / "kv")
    assert len(listed["entries"]) == 3
    assert "3 entries" in listed["printed"]
    first = next(entry for entry in listed["entries"] if entry["key"] == key_of(5))
    assert (first["tokens"], first["dtype"], first["fingerprint"]) == (6, "float32", "fingerprint")
    assert main(["store", "rm", str(tmp_path / "kv"), key_of(2**255 + 1)[:10]]) == 2  # two begin so
    assert "names 2 entries" in capsys.readouterr().err
    assert run(capsys, tmp_path, "store", "rm", tmp_path / "kv", key_of(5)[:12])["removed"] == 1
    with cb.ChunkStore(tmp_path / "kv") as store:
        assert sorted(store.keys()) == [key_of(2**255 + 1), key_of(2**255 + 2)]


def test_ls_names_model_and_text(capsys, tmp_path):
    labels = [
        label_of("models/" + "long" * 9 + "-1B", "The Cobalt team\nworks in Oslo."),
        label_of("demo", "\x1b[31mred"),
    ]
    with cb.ChunkStore(tmp_path / "kv") as store:
        for seed, label in enumerate([*labels, UNKNOWN]):
            store.put(key_of(seed), replace(make_entry(seed), label=label))
    listed = run(capsys, tmp_path, "store", "ls", tmp_path / "kv")
    assert "  …" + "long" * 5 + "-1B  The Cobalt team works in Oslo.\n" in listed["printed"]
    assert {(entry["model"], entry["text"]) for entry in listed["entries"]} == {
        (label.model, label.text) for label in [*labels, UNKNOWN]
    }
    assert "\x1b" not in listed["printed"]
    assert "fingerprint" in listed["printed"]


def test_verify_says_what_is_damaged_and_repairs_it(capsys, tmp_path):
    fill(tmp_path / "kv", range(3), one_by_one=True, tokens=BIG)
    assert run(capsys, tmp_path, "store", "verify", tmp_path / "kv")["problems"] == []
    os.truncate(largest_file(packs(tmp_path / "kv")[0]), 100)
    damaged = run(capsys, tmp_path, "store", "verify", tmp_path / "kv", code=1)
    assert damaged["entries"] == 3
    assert any(problem["name"] for problem in damaged["problems"])
    assert "100 bytes" in damaged["printed"]
    run(capsys, tmp_path, "store", "verify", "--repair", tmp_path / "kv", code=1)
    assert run(capsys, tmp_path, "store", "verify", tmp_path / "kv")["entries"] == 2
    assert run(capsys, tmp_path, "store", "prune", "--quarantine", tmp_path / "kv")["quarantined_removed"] == 1


def test_prune_keeps_what_was_used_last(capsys, tmp_path):
    fill(tmp_path / "kv", range(4), one_by_one=True, tokens=BIG)
    size = make_entry(0, BIG).num_bytes
    report = run(capsys, tmp_path, "store", "prune", "--max-bytes", str(5 * size // 2), tmp_path / "kv")
    assert (report["removed"], report["entries"]) == (2, 2)
    with cb.ChunkStore(tmp_path / "kv") as store:
        assert sorted(store.keys()) == [key_of(2), key_of(3)]
    assert run(capsys, tmp_path, "store", "prune", "--unused-days", "1", tmp_path / "kv")["removed"] == 0
    assert run(capsys, tmp_path, "store", "prune", "--unused-days", "0", tmp_path / "kv")["entries"] == 0


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "soon"])
def test_days_that_make_no_sense_remove_nothing(capsys, tmp_path, days):
    fill(tmp_path, [1])
    with pytest.raises(SystemExit, match="2"):
        main(["store", "prune", str(tmp_path), "--unused-days", days])
    assert "must be a number of at least 0" in capsys.readouterr().err
    disk = DiskTier(tmp_path, 2**40)
    if days != "soon":
        with pytest.raises(cb.CacheBlendError, match="unused_days must be at least 0 and finite"):
            prune(disk, unused_days=float(days))
    assert disk.index.totals()[1] == 1
    disk.close()


def test_prune_removes_packs_of_another_version_that_the_index_does_not_know(capsys, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for module in ("record", "pack"):
            patch.setattr(f"cacheblend_jax.store.{module}.FORMAT_VERSION", 4)
        fill(tmp_path / "kv", range(2), one_by_one=True)
    (tmp_path / "kv" / "index.sqlite").unlink()
    fill(tmp_path / "kv", [5])
    assert len(run(capsys, tmp_path, "store", "verify", "--repair", tmp_path / "kv", code=1)["problems"]) == 2
    report = run(capsys, tmp_path, "store", "prune", "--unused-days", "9", tmp_path / "kv")
    assert (report["outdated_packs_removed"], report["entries"]) == (2, 1)
    assert len(packs(tmp_path / "kv")) == 1
    assert run(capsys, tmp_path, "store", "verify", tmp_path / "kv")["problems"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "{}/none"], "is not there"),
        (["prune", "{}"], "prune needs --max-bytes"),
        (["rm", "{}", "12"], "names 0 entries; give the first 8"),
    ],
)
def test_what_makes_no_sense_is_named(capsys, tmp_path, arguments, message):
    fill(tmp_path, [1])
    assert main(["store", *(text.format(tmp_path) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    with cb.ChunkStore(tmp_path) as store:
        assert len(store) == 1


def test_ask_finds_what_precompute_stored(capsys, tmp_path):
    (tmp_path / "notes.md").write_text("The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.")
    common = ["--model", HF / "llama3", "--no-compile-cache", "--docs", tmp_path / "notes.md", "--chunk-tokens", "40"]
    stored = run(capsys, tmp_path, "precompute", *common, "--store", tmp_path / "kv")
    assert stored["written"] == len(stored["chunks"]) + 1  # and the prefix
    before = {path.name for path in packs(tmp_path / "kv")}
    asked = ["ask", *common, "--all", "--max-new-tokens", "2", "--store", tmp_path / "kv", "Where?"]
    report = run(capsys, tmp_path, *asked)
    assert report["answers"]["blend"]["prefill"]["hits"] == len(stored["chunks"])
    assert {path.name for path in packs(tmp_path / "kv")} == before  # nothing was computed again


def test_ask_finds_what_precompute_stored_after_the_same_context_alone(capsys, tmp_path):
    (tmp_path / "notes.md").write_text("The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.")
    (tmp_path / "before.txt").write_text("Rooms open at eight.")
    common = ["--model", HF / "llama3", "--no-compile-cache", "--docs", tmp_path / "notes.md", "--chunk-tokens", "40"]
    common += ["--store", tmp_path / "kv"]
    stored = run(capsys, tmp_path, "precompute", *common, "--context", tmp_path / "before.txt")
    asked = ["ask", *common, "--all", "--max-new-tokens", "1"]
    with_it = run(capsys, tmp_path, *asked, "--context", tmp_path / "before.txt", "Where?")
    assert with_it["store"]["found"] == len(stored["chunks"])
    assert run(capsys, tmp_path, *asked, "Where?")["store"]["found"] == 0
    assert main([*map(str, asked), "--context", str(tmp_path / "none.txt"), "Where?"]) == 2
    assert "is neither 'plain', 'neutral' nor a readable file" in capsys.readouterr().err


def test_a_sample_of_the_documents_is_remembered_with_the_store(capsys, tmp_path, monkeypatch):
    (tmp_path / "notes.md").write_text("The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.")
    common = ["--model", HF / "llama3", "--no-compile-cache", "--docs", tmp_path / "notes.md", "--chunk-tokens", "40"]
    common += ["--store", tmp_path / "kv"]
    sampled = ["precompute", *common, "--context", "documents"]
    assert main([*map(str, sampled)]) == 2
    assert "have 59 characters, expected at least 25000 to take a sample of" in capsys.readouterr().err
    monkeypatch.setattr("cacheblend_jax.documents.sampling.LEAST_CHARACTERS", 50)
    monkeypatch.setattr("cacheblend_jax.documents.sampling.EXCERPTS", 1)
    stored = run(capsys, tmp_path, *sampled)
    with cb.ChunkStore(tmp_path / "kv") as store:
        assert store.remembered_context() == "The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.\n\n"
    asked = ["ask", *common, "--all", "--max-new-tokens", "1"]
    assert run(capsys, tmp_path, *asked, "Where?")["store"]["found"] == len(stored["chunks"])
    assert run(capsys, tmp_path, *asked, "--context", "plain", "Where?")["store"]["found"] == 0
    (tmp_path / "notes.md").write_text("The Ridge team works in Lima.\n\nAna has left the Cobalt team.")
    assert main([*map(str, sampled)]) == 0
    assert "after the text that the store remembers, not a sample of these" in capsys.readouterr().err


TEXTS = ("Reyes took the nickname Cobalt.", "The green car was given to Cobalt.")


@pytest.fixture
def records(tmp_path) -> list[str]:
    (tmp_path / "records.md").write_text("\n\n".join(TEXTS))
    return ["--no-compile-cache", "--docs", str(tmp_path / "records.md"), "--chunk-tokens", "10", "--store"]


def ask(capsys, tmp_path, records, *options) -> dict:
    asked = [*records, str(tmp_path / "kv"), "--max-new-tokens", "1", "--all", *options, "Who took the green car?"]
    report = run(capsys, tmp_path, "ask", *asked)
    return report["store"] | {"printed": report["printed"], "chunks": [chunk["found"] for chunk in report["chunks"]]}


def test_ask_reports_what_was_there_when_the_question_came(capsys, tmp_path, records):
    first = ask(capsys, tmp_path, records)
    assert (first["found"], first["computed"], first["chunks"]) == (0, 2, [False, False])
    assert f"[store: 0 of 2 chunks found in {tmp_path / 'kv'}; 2 precomputed in " in first["printed"]
    with cb.ChunkStore(tmp_path / "kv") as store:
        (second_chunk,) = [record.key for record in store.same_texts([label_of("", TEXTS[1]).text_digest])]
        store.remove(second_chunk)
    again = ask(capsys, tmp_path, records)
    assert (again["found"], again["computed"], again["chunks"]) == (1, 1, [True, False])
    assert f"[store: 2 of 2 chunks found in {tmp_path / 'kv'}]" in ask(capsys, tmp_path, records)["printed"]


def test_ask_says_what_keeps_stored_texts_from_being_used(capsys, tmp_path, records, monkeypatch):
    def warned(*options) -> list[str]:
        assert main(["ask", *records, str(tmp_path / "kv"), *options, "Who took the green car?"]) == 2
        lines = capsys.readouterr().err.splitlines()
        return [line.partition("for another use: ")[2] for line in lines if "warning: the store holds" in line]

    def stop(*_, **__):
        raise cb.CacheBlendError("far enough")

    assert main(["precompute", *records, str(tmp_path / "kv")]) == 0
    precomputed = capsys.readouterr()
    assert "for another use" not in precomputed.err
    monkeypatch.setattr(cb.Engine, "precompute", stop)
    assert warned() == []
    assert warned("--system", "All new records.") == ["2 with another text before it (--system, --context)"]
    assert warned("--dtype", "float32") == ["2 with dtype bfloat16 (--dtype)"]
    assert main(["precompute", *records, str(tmp_path / "kv"), "--dtype", "float32"]) == 2
    assert "the store holds 2 of these texts, but for another use: 2 with dtype bfloat16" in capsys.readouterr().err
    shutil.copytree(demo_directory(), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 1000000.0', '"rope_theta": 20000.0'))
    assert warned("--model", str(tmp_path / "model")) == ["2 with model 'demo' (--model)"]


def test_of_all_entries_of_a_text_the_one_that_differs_least_is_named(tmp_path):
    model, label = family_model("llama3"), label_of("random", "The Cobalt team works in Oslo.")
    asked = [ChunkLookup(key_of(9), False, (5,), label)]
    with cb.ChunkStore(tmp_path) as store:

        def said_after(seed: int, entry: cb.ChunkEntry) -> str | None:
            store.put(key_of(seed), entry)
            store.flush()
            said = stored_otherwise(store, model, asked)
            return said and said.partition("for another use: ")[2]

        here = replace(make_entry(1), label=label)
        two = replace(here, k=here.k.astype("float16"), v=here.v.astype("float16"), label=replace(label, model="other"))
        assert said_after(1, replace(here, label=label_of("random", "Another text."))) is None
        assert said_after(2, two) == "1 with model 'other' (--model) and dtype float16 (--dtype)"
        weights = "1 with other weights or another tokenizer under the model's name"
        assert said_after(3, here) == weights
        assert said_after(4, two) == weights
        context = replace(here, fingerprint=model.fingerprint, context_ids=(6,))
        assert said_after(5, context) == weights  # of as many differences, the first
        store.remove(key_of(3))
        assert said_after(4, two) == "1 with another text before it (--system, --context)"


def test_precompute_fails_where_not_all_is_written(capsys, tmp_path, monkeypatch):
    (tmp_path / "notes.md").write_text("The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.")
    common = ["--model", HF / "llama3", "--no-compile-cache", "--docs", tmp_path / "notes.md"]
    write, written = DiskTier.write, []

    def write_two(tier, entries):  # the prefix, and a chunk
        fitting = entries[: 2 - len(written)]
        written.extend(fitting)
        write(tier, fitting)

    monkeypatch.setattr(DiskTier, "write", write_two)
    monkeypatch.setattr(groups, "num_lanes", lambda model: 1)  # of two, the one that is done first writes first
    options = [*common, "--chunk-tokens", "40", "--store", tmp_path / "kv"]
    stored = run(capsys, tmp_path, "precompute", *options, code=1)
    keys = [chunk["key"] for chunk in stored["chunks"]]
    assert [key is None for key in keys] == [False, *(True for _ in keys[1:])]
    assert f"only 1 of {len(keys)} chunks are in {tmp_path / 'kv'}" in stored["printed"]
