"""The command line, run in this process on tiny checkpoints and real files."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from conftest import HF

import cacheblend_jax as cb
from cacheblend_jax.cli import answering, documents_prompt
from cacheblend_jax.cli import ask as ask_module
from cacheblend_jax.cli.main import main
from cacheblend_jax.cli.progress import Parts
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.evaluation.evaluate import Evaluation
from cacheblend_jax.evaluation.evaluator import Evaluator
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.model import loading as loading_module
from cacheblend_jax.model.demo import demo_directory
from cacheblend_jax.runtime.programs import Runner

MODEL = ["--model", str(HF / "llama3"), "--no-compile-cache"]
TEXT = "The Cobalt team works in Oslo.\n\nAna joined the Cobalt team.\n\nCats purr at night."


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "company.md").write_text(TEXT)
    return str(tmp_path / "docs")


def ask(docs, *options, question="Where does Ana of the Cobalt team work?"):
    common = ["--chunk-tokens", "40", "--max-new-tokens", "4"]
    return main(["ask", *MODEL, "--docs", docs, *common, *options, question])


def test_ask_answers_and_says_what_was_reused(docs, capsys, tmp_path):
    report = tmp_path / "report.json"
    options = ["--top-k", "2", "--json", str(report), "--store", str(tmp_path / "kv")]
    for hits in (0, 2):  # the first answer does not wait for what it stores for the next
        assert ask(docs, *options) == 0
        printed = capsys.readouterr().out
        assert "TTFT" in printed
        assert "reused" in printed
        content = json.loads(report.read_text())
        assert [chunk["index"] for chunk in content["chunks"]] == [0, 1]
        prefill = content["answers"]["blend"]["prefill"]
        assert (prefill["hits"], prefill["misses"]) == (hits, 2 - hits)
        assert content["store"]["computed"] == 2 - hits
    assert 0 < prefill["recompute_ratio"] < 0.3
    assert prefill["reused"] == prefill["exact"] + prefill["candidates"]


def test_ask_compiles_beside_its_other_work_and_shows_what_it_does(docs, capsys, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="jax._src.dispatch")
    shown, compiled_by, prepared = [], [], threading.Event()
    part, prepare, compile_program = Parts.part, Engine.prepare, Runner._compile
    load = loading_module.load_params

    def load_later(*args, **options):
        assert prepared.wait(300)  # the weights come after the first programs
        return load(*args, **options)

    def prepare_first(engine, *args, **options):
        prepare(engine, *args, **options)
        prepared.set()

    def compile_and_note(*args):
        compiled_by.append(threading.current_thread())
        compile_program(*args)

    monkeypatch.setattr(loading_module, "load_params", load_later)
    monkeypatch.setattr(Engine, "prepare", prepare_first)
    monkeypatch.setattr(Runner, "_compile", compile_and_note)
    monkeypatch.setattr(Parts, "part", lambda parts, what, **unit: shown.append(what) or part(parts, what, **unit))
    options = ["--top-k", "2", "--store", str(tmp_path / "kv"), "--executor", "resident"]
    assert ask(docs, *options) == 0
    working = ["reading documents", "loading weights", "split", "compiling"]
    assert shown == [*working, "prefilling (blend)", "compiling", "storing for the next question"]
    # For the prefill; for decoding, its cache, and its first token; for chunks and prefix, of one padded length.
    assert len(compiled_by) == 5
    assert ask(docs, *options) == 0
    assert ask(docs, *options, "--mode", "reuse") == 0
    assert threading.main_thread() not in compiled_by
    assert capsys.readouterr().err == ""
    compiled = set(re.findall(r"Finished XLA compilation of jit\((.*?)\)", caplog.text))
    ours = {"prefill", "standalone", "with_room", "next_token", "decode_tokens"}
    assert ours <= compiled
    assert compiled - ours <= {"<lambda>", "top_k"}  # nothing in passing but a trial of options, and one of bm25s


@pytest.mark.once
def test_ask_compares_the_four_modes(docs, capsys, tmp_path):
    report = tmp_path / "report.json"
    assert ask(docs, "--all", "--compare", "--selector", "hkvd", "--json", str(report)) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["mode", "full", "prefix", "reuse", "blend"]
    answers = json.loads(report.read_text())["answers"]
    assert answers["prefix"]["token_ids"] == answers["full"]["token_ids"]
    assert answers["full"]["prefill"]["flops"] > answers["blend"]["prefill"]["flops"]
    assert answers["blend"]["prefill"]["flops"] > answers["reuse"]["prefill"]["flops"]


@pytest.mark.once
def test_ask_without_a_chat_template(docs, tmp_path, capsys):
    model = shutil.copytree(HF / "llama3", tmp_path / "plain")
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    assert (
        main(["ask", "--model", str(model), "--no-compile-cache", "--docs", docs, "--max-new-tokens", "2", "Why?"]) == 0
    )
    assert "TTFT" in capsys.readouterr().out


def test_ask_passes_arguments_to_the_chat_template(docs, tmp_path, monkeypatch):
    model = shutil.copytree(HF / "llama3", tmp_path / "model")
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] += "{% if enable_thinking is false %}<|end|>{% endif %}"
    path.write_text(json.dumps(config))
    prompts = []
    real = documents_prompt.prompt_of
    monkeypatch.setattr(documents_prompt, "prompt_of", lambda *args: prompts.append(real(*args)) or prompts[-1])
    common = ["ask", "--model", str(model), "--no-compile-cache", "--docs", docs, "--max-new-tokens", "1"]
    assert main([*common, "Why?"]) == 0
    without = prompts[-1]
    assert main([*common, "--template-arguments", '{"enable_thinking": false}', "Why?"]) == 0
    given = prompts[-1]
    assert given.suffix == [*without.suffix, 4]
    assert given.chunks == without.chunks


def test_a_question_that_is_not_utf_8_is_one_line(docs, capsys):
    question = os.fsdecode(b"Where \xff?")  # as arguments come
    assert ask(docs, question=question) == 2
    assert "the question must be valid Unicode" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_platform_without_a_device_is_one_line(docs):
    command = [sys.executable, "-m", "cacheblend_jax", "ask", *MODEL, "--docs", docs, "Why?"]
    ended = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "nonsense"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    lines = ended.stderr.strip().splitlines()
    assert "JAX cannot use what JAX_PLATFORMS=nonsense asks for (" in lines[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.once
def test_the_question_may_follow_the_paths(docs, capsys):
    options = [*MODEL, "--max-new-tokens", "2"]
    assert main(["ask", *options, "--docs", docs, docs + "/company.md", "Where is Oslo?"]) == 0
    assert "TTFT" in capsys.readouterr().out
    assert main(["ask", *options, "--docs", docs, "Where is Oslo? " * 20]) == 0  # too long for a path
    for without in (["--docs", docs], ["--docs", docs, docs]):
        assert main(["ask", *options, *without]) == 2
        assert "a question is missing" in capsys.readouterr().err
    assert main(["ask", *options, "--docs", docs, "--top-k", "1", " "]) == 2
    assert "the question is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "1.5"], "recompute_ratio must be in [0, 1], got 1.5"),
        (["--ratio", "nan"], "got nan"),
        (["--selector", "best"], "unknown selector 'best'; known: cross"),
        (["--temperature", "-1"], "temperature must be"),
        (["--docs", "/nowhere"], "'/nowhere' does not exist"),
        (["--model", "/nowhere"], "model '/nowhere' is not a directory"),
        (["--model", str(HF / "llama2")], "has no tokenizer"),
        (["--host-bytes", "0"], "must be at least 1 bytes, got '0'"),
        (["--chunk-tokens", "-5"], "must be a whole number of at least 1, got '-5'"),
        (["--top-k", "many"], "must be a whole number of at least 1, got 'many'"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
        (["--json", "/nowhere/report.json"], "/nowhere/report.json"),
        (["--json", "/"], "cannot write --json /: is a directory"),
        (["--json", f"{__file__}/report.json"], f"{__file__} is not a directory"),
        (["--trace", "/nowhere/trace.json"], "cannot write --trace /nowhere/trace.json"),
        (["--trace", "trace.png"], "give one that ends in .json"),
        (["--model", "m" * 300], "is not a directory"),
        (["--seed", "99999999999999999999"], "seed must be"),
        (["--template-arguments", "enable_thinking=false"], "must be a JSON object such as"),
        (["--template-arguments", "[1]"], "must be a JSON object such as"),
        (["--template-arguments", '{"tokenize": true}'], "template_arguments must not have 'tokenize'"),
        (["--system", "wh\udcff"], "the system text must be valid Unicode"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(docs, capsys, options, message):
    try:
        code = ask(docs, *options)
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "cacheblend-jax: interrupted"),
        (PermissionError(13, "Permission denied", "/secret"), 2, "error: [Errno 13] Permission denied: '/secret'"),
    ],
)
def test_what_stops_a_command_is_one_line(docs, capsys, monkeypatch, error, code, message):
    def stop(_):
        raise error

    monkeypatch.setattr(answering, "read_documents", stop)
    assert ask(docs) == code
    assert capsys.readouterr().err.strip().endswith(message)


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    with cb.ChunkStore(tmp_path):
        pass
    command = f"{sys.executable} -m cacheblend_jax store ls {tmp_path} | true; echo ${{PIPESTATUS[0]}}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_precompute_into_what_cannot_be_written_stops_before_any_work(docs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.store.disk.make_directories", lambda *_: False)
    options = [*MODEL, "--docs", docs, "--store", str(tmp_path)]
    assert main(["precompute", *options]) == 2
    assert f"store '{tmp_path}' cannot be written" in capsys.readouterr().err


def test_a_prompt_too_long_is_an_error_before_anything_is_stored(tmp_path, capsys):
    (tmp_path / "long.txt").write_text("\n\n".join([TEXT] * 20))
    assert ask(str(tmp_path), "--all") == 2
    error = capsys.readouterr().err
    assert "the model takes at most 512; use fewer or shorter chunks: --top-k K, --chunk-tokens N\n" in error


def test_without_top_k_as_many_chunks_are_used_as_fit(tmp_path, capsys, monkeypatch):
    asked = []

    def stop(_):
        raise cb.CacheBlendError("far enough")

    prompt_of = documents_prompt.prompt_of
    monkeypatch.setattr(
        documents_prompt, "prompt_of", lambda *arguments: asked.append(arguments) or prompt_of(*arguments)
    )
    monkeypatch.setattr(ask_module, "open_store", stop)
    for number in range(3):
        text = f"Reyes took the nickname Cobalt {number}. " + "The office is quiet. " * 160
        (tmp_path / f"{number}.md").write_text(text)
    options = ["--no-compile-cache", "--model", "demo", "--docs", str(tmp_path), "--chunk-tokens", "820"]
    assert main(["ask", *options, "Who is Cobalt 2 or 0?"]) == 2
    assert [os.path.basename(chunk.source) for chunk in asked[-1][0]] == ["0.md", "2.md"]
    assert "the model takes 2048 tokens: 2 instead of 3 chunks are used" in capsys.readouterr().err


@pytest.mark.once
def test_bench_prints_a_table_and_writes_json(tmp_path, capsys):
    report = tmp_path / "bench.json"
    sizes = ["--tokens", "64", "--chunks", "2", "--prefix-tokens", "8", "--question-tokens", "8", "--repeats", "2"]
    options = ["--ratios", "0.2", "0.5", "--json", str(report), "--no-compile-cache"]
    assert main(["bench", "--model", str(HF / "qwen3"), "--dtype", "float32", *sizes, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    rows = {row["mode"]: row for row in json.loads(report.read_text())["rows"]}
    assert list(rows) == ["full", "prefix", "reuse", "blend 0.2", "blend 0.5"]
    assert all(row["compiles_after_warmup"] == 0 for row in rows.values())
    assert rows["full"]["efficiency"] == 1
    assert rows["blend 0.2"]["ideal_speed_up"] > rows["blend 0.5"]["ideal_speed_up"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "4", "--chunks", "8"], "--tokens must be at least --chunks (8), got 4"),
        (["--tokens", "100000"], "the model takes at most 32768"),
        (["--ratios", "2"], "recompute_ratio must be in [0, 1], got 2.0"),
        (["--prefix-tokens", "-1"], "--prefix-tokens"),
    ],
)
def test_bench_names_what_makes_no_sense(capsys, monkeypatch, options, message):
    few = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}  # weights: one of these draws them
    small = replace(SHAPES["bench-16l"], **few)
    monkeypatch.setitem(SHAPES, "bench-16l", small)
    assert main(["bench", "--no-compile-cache", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_package_runs_as_a_module_and_keeps_compiled_programs(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "names.md").write_text("Reyes took the nickname Cobalt. The green car was given to Cobalt.")
    (tmp_path / "long.md").write_text("The printer near the hall is broken again.\n\n" * 300)
    command = [sys.executable, "-m", "cacheblend_jax", "ask", "--docs", str(tmp_path), "--top-k", "1"]
    done = subprocess.run([*command, "Which car was given to Reyes?"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("green\n")
    assert "TTFT" in done.stdout
    assert "PyTorch" not in done.stderr  # nor other advice of the libraries below
    assert "indexing errors" not in done.stderr
    assert list((tmp_path / "cache" / "cacheblend-jax" / "compiled").iterdir())


def evaluate(*options):
    return main(["evaluate", "--no-compile-cache", *options])


@pytest.mark.once
def test_evaluate_goes_on_where_it_was_stopped(tmp_path, capsys):
    out, report = tmp_path / "results.jsonl", tmp_path / "report.json"
    told = ("Reyes took the nickname Cobalt.", "Lima is the birthplace of Novak.")
    passages = [{"title": "Names", "text": told[0]}, {"text": told[1]}]
    rows = [
        {"question": "Whose nickname is Cobalt?", "answers": ["Reyes"], "ctxs": passages},
        {"question": "Where is the birthplace of Novak?", "answers": ["Oslo", "Lima"], "ctxs": passages},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    common = ["--data", str(tmp_path / "rows.json"), "--out", str(out), "--max-new-tokens", "2"]
    assert evaluate(*common, "--modes", "full", "--limit", "1") == 0
    first = out.read_text()
    assert len(first.splitlines()) == 2
    out.write_text(first + '{"row": "rows/1", "set')  # killed while writing
    assert evaluate(*common, "--modes", "full", "blend", "--selectors", "hkvd", "--json", str(report)) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert out.read_text().startswith(first)
    done = [(line["row"], line["setting"]) for line in lines[1:]]
    assert sorted(done) == sorted((f"rows/{i}", setting) for i in (0, 1) for setting in ("full", "hkvd 0.15"))
    summary = {line["setting"]: line for line in json.loads(report.read_text())["summary"]}
    assert summary["full"]["rows"] == 2
    assert summary["full"]["kl"] == 0.0
    assert "hkvd 0.15" in capsys.readouterr().out
    for change, name in ((["--max-new-tokens", "3"], "max_new_tokens"), (["--system", "Other."], "system")):
        assert evaluate(*common, *change) == 2
        assert f"holds results of another {name}; choose another --out" in capsys.readouterr().err
    (tmp_path / "rows.json").write_text(json.dumps(rows[:1]))
    assert evaluate(*common) == 2
    assert "holds results of another data's content" in capsys.readouterr().err
    out.write_text("")
    assert evaluate(*common, "--modes", "full") == 0


def test_evaluate_says_which_rows_are_skipped(tmp_path, capsys, monkeypatch):
    skipped = {f"rows/{number}": "the prompt has 9 tokens" for number in range(7)}
    found = Evaluation(1, [], [], [], skipped=skipped)
    monkeypatch.setattr("cacheblend_jax.evaluation.evaluate.evaluate", lambda *_, **__: found)
    report = tmp_path / "report.json"
    assert evaluate("--json", str(report)) == 0
    error = capsys.readouterr().err
    assert "warning: 7 rows are skipped: rows/0 (the prompt has 9 tokens), rows/1 (" in error
    assert error.endswith("rows/4 (the prompt has 9 tokens), …\n")
    assert json.loads(report.read_text())["skipped"] == skipped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.json"], "data set 'nowhere.json' is neither a file nor 'bundled'"),
        (["--ratios", "1.5"], "recompute_ratio must be in [0, 1], got 1.5"),
        (["--selectors", "best"], "unknown selector 'best'; known: cross, "),
        (["--check-layer", "20"], "check_layer"),
        (["--out", "/nowhere/results.jsonl"], "cannot write --out /nowhere/results.jsonl"),
    ],
)
def test_evaluate_names_what_makes_no_sense_before_any_work(capsys, monkeypatch, options, message):
    monkeypatch.setattr(Evaluator, "evaluate_row", None)
    assert evaluate("--limit", "1", *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.once
@pytest.mark.usefixtures("optimised", "one_length")
def test_check_layers_are_measured_and_saved(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(demo_directory(), model)
    (model / "cacheblend.json").unlink()
    assert cb.load_model(model).config.check_layer == 1
    assert evaluate("--model", str(model), "--dtype", "float32", "--check-layers", "--limit", "1") == 0
    assert "check layer: " in capsys.readouterr().out
    assert cb.load_model(model).config.check_layer == cb.load_model("demo").config.check_layer > 1


@pytest.mark.once
@pytest.mark.usefixtures("optimised", "one_length")
def test_demo_shows_that_reuse_fails_and_blend_does_not(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    # Each selector and ratio has programs of its own to compile.
    monkeypatch.setattr("cacheblend_jax.evaluation.demo.QUESTIONS", {"single": 1, "reference": 5, "compare": 1})
    monkeypatch.setattr("cacheblend_jax.evaluation.demo.SELECTORS", ("hkvd",))
    monkeypatch.setattr("cacheblend_jax.evaluation.demo.CURVE_RATIOS", (0.15,))  # as in the table
    monkeypatch.setattr("cacheblend_jax.evaluation.demo.CURVE_SELECTORS", ("hkvd",))
    report, plots = tmp_path / "demo.json", tmp_path / "plots"
    assert main(["demo", "--no-compile-cache", "--dtype", "float32", "--json", str(report), "--plot", str(plots)]) == 0
    printed = capsys.readouterr().out
    assert "For instance: " in printed
    right = {line["setting"]: line for line in json.loads(report.read_text())["summary"] if line["kind"] == "reference"}
    assert right["full"]["exact_match"] == 1
    assert right["hkvd 0.15"]["exact_match"] >= 0.8
    assert right["reuse"]["exact_match"] <= 0.6
    assert sorted(path.name for path in plots.iterdir()) == [
        "deviation.png",
        "insights.png",
        "layers.png",
        "quality.png",
        "recovered.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in plots.iterdir())
