"""The command line: `cacheblend-jax` with its commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from platformdirs import user_cache_path
from tqdm import tqdm

from cacheblend_jax.blend import SELECTORS, BlendConfig
from cacheblend_jax.controller import AutoBlend, explain
from cacheblend_jax.documents import Chunk, chunk_documents, read_documents, select_top_k
from cacheblend_jax.engine import Engine
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.execution import EXECUTORS
from cacheblend_jax.layout import MODES
from cacheblend_jax.model import Model, load_model
from cacheblend_jax.model.decode import Sampling
from cacheblend_jax.prompt import Prompt, encode
from cacheblend_jax.results import Generation, PrefillStats
from cacheblend_jax.store import ChunkStore
from cacheblend_jax.store.commands import add_store_commands
from cacheblend_jax.trace import Trace

SEPARATOR = "\n\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0; 1 for a store that is damaged or could not be written; 2 for bad usage or input; 130 where it was interrupted.
    """
    parsed = _parser().parse_args(arguments)
    try:
        _check_writable("--json", parsed.json)
        if not parsed.no_compile_cache:
            _keep_compiled_programs()
        report = parsed.run(parsed)
        if parsed.json is not None:
            _write_json(parsed.json, report)
        sys.stdout.flush()
        return report.get("exit_code", 0)
    except BrokenPipeError:  # who read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush finds a reader
        return 0
    except (CacheBlendError, OSError) as error:
        print(f"cacheblend-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cacheblend-jax: interrupted", file=sys.stderr)
        return 130


def _check_writable(option: str, path: Path | None) -> None:
    """Refuses a file that cannot be written, before the work whose results are to go there."""
    if path is None:
        return
    why = None
    if path.is_dir():
        why = "is a directory"
    elif not path.parent.is_dir():
        why = f"{path.parent} is not a directory"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "no permission"
    if why is not None:
        raise CacheBlendError(f"cannot write {option} {path}: {why}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cacheblend-jax",
        description="Answers from texts whose KV is computed once and blended (CacheBlend).",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('cacheblend-jax')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_ask(commands)
    _add_precompute(commands)
    add_store_commands(commands)
    _add_evaluate(commands)
    _add_bench(commands)
    _add_calibrate(commands)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="cast the weights (as stored)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--no-compile-cache", action="store_true", help="do not keep compiled programs on disk")


def _add_ask(commands: Any) -> None:
    ask = commands.add_parser("ask", help="answer a question from text files")
    ask.add_argument("question", nargs="?", help="what to ask; write it last")
    _add_sources(ask)
    ask.add_argument("--top-k", type=_count, default=5, metavar="K", help="chunks to use, picked by BM25 (5)")
    ask.add_argument("--all", action="store_true", help="use all chunks")
    ask.add_argument("--mode", choices=MODES, default="blend", help="how to prefill (blend)")
    ask.add_argument("--compare", action="store_true", help="answer in all four modes and print a table")
    ask.add_argument(
        "--ratio", type=_ratio, default=0.15, help="recompute ratio (0.15); auto: as much as loading hides"
    )
    ask.add_argument("--executor", choices=EXECUTORS, default="auto", help="stream stored KV, or load it first (auto)")
    ask.add_argument("--profile", type=Path, metavar="FILE", help="with --ratio auto: what calibrate saved there")
    ask.add_argument("--explain", action="store_true", help="say what the controller decided, and what happened")
    ask.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace, and beside it a picture (.png)")
    ask.add_argument("--selector", default="hkvd", help=f"{', '.join(sorted(SELECTORS))} (hkvd)")
    ask.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="longest answer (64)")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    ask.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest P (1: all)")
    ask.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    ask.add_argument("--store", metavar="DIR", help="keep chunk KV in a directory, for the next time")
    ask.add_argument("--store-bytes", type=_count, default=4 * 2**30, metavar="N", help="memory for chunk KV (4 GiB)")
    _add_shared(ask)
    ask.set_defaults(run=run_ask)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="checkpoint directory or hub id (demo)")
    parser.add_argument(
        "--docs", nargs="+", action="extend", required=True, metavar="PATH", help=".txt and .md files, or directories"
    )
    parser.add_argument("--chunk-tokens", type=_count, default=512, metavar="N", help="longest chunk (512)")
    parser.add_argument("--system", help="system text before the chunks")


def _add_precompute(commands: Any) -> None:
    precompute = commands.add_parser("precompute", help="compute the KV of text files and keep it in a directory")
    _add_sources(precompute)
    precompute.add_argument("--store", required=True, metavar="DIR", help="where to keep it")
    _add_shared(precompute)
    precompute.set_defaults(run=run_precompute)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="ask the bundled model in every mode")
    demo.add_argument("--plot", type=Path, metavar="DIR", help="also draw quality against ratio, and deviation")
    _add_shared(demo)
    demo.set_defaults(run=_run_demo)


def _run_demo(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.evaluation.demo import run_demo

    return run_demo(parsed, _load("demo", parsed.dtype), _progress)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure quality on a data set, in modes, selectors and ratios")
    evaluate.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="checkpoint directory or hub id (demo)")
    evaluate.add_argument(
        "--data", default="bundled", metavar="FILE", help="JSON of question, answers, ctxs; LongBench jsonl; (bundled)"
    )
    evaluate.add_argument("--limit", type=_count, metavar="N", help="first N rows; of the bundled: of each kind (200)")
    evaluate.add_argument(
        "--modes", nargs="+", choices=MODES, default=["full", "reuse", "blend"], help="(full reuse blend)"
    )
    evaluate.add_argument("--selectors", nargs="+", default=["hkvd", "random", "epic"], help="(hkvd random epic)")
    evaluate.add_argument(
        "--ratios", type=float, nargs="+", default=[0.15], metavar="R", help="recompute ratios (0.15)"
    )
    evaluate.add_argument("--deviations", nargs="+", choices=("kv", "k", "v"), default=["kv"], help="measured on (kv)")
    evaluate.add_argument("--stages", type=_count, nargs="+", default=[4], metavar="N", help="filtering stages (4)")
    evaluate.add_argument("--check-layer", type=_count, metavar="L", help="the layer of selection (the model's)")
    evaluate.add_argument("--check-layers", action="store_true", help="find the model's check layer and save it")
    evaluate.add_argument(
        "--chunk-tokens", type=_count, default=512, metavar="N", help="chunks of LongBench texts (512)"
    )
    evaluate.add_argument("--max-new-tokens", type=_count, default=16, metavar="N", help="longest answer (16)")
    evaluate.add_argument("--system", help="system text before the chunks")
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="results, a line each; an interrupted run goes on")
    evaluate.add_argument("--plot", type=Path, metavar="DIR", help="draw quality against ratio, and deviation")
    _add_shared(evaluate)
    evaluate.set_defaults(run=_run_evaluate)


def _run_evaluate(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.evaluation.evaluate import run_evaluate, settings_of

    settings_of(parsed)
    return run_evaluate(parsed, _load(parsed.model, parsed.dtype), _progress)


def _progress(items: Iterable, what: str) -> Iterable:
    return tqdm(items, desc=what, disable=not sys.stderr.isatty(), leave=False)


def _add_bench(commands: Any) -> None:
    from cacheblend_jax.evaluation.bench import SHAPES, run_bench

    bench = commands.add_parser("bench", help="time the modes against each other")
    source = bench.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR_OR_ID", help="checkpoint directory or hub id")
    source.add_argument("--shape", choices=sorted(SHAPES), default="bench-16l", help="random weights (bench-16l)")
    bench.add_argument("--tokens", type=_count, nargs="+", default=[4096], metavar="N", help="tokens in chunks (4096)")
    bench.add_argument("--chunks", type=_count, default=8, metavar="N", help="equal chunks (8)")
    bench.add_argument("--prefix-tokens", type=int, default=0, metavar="N", help="tokens before the chunks (0)")
    bench.add_argument("--question-tokens", type=_count, default=32, metavar="N", help="tokens after the chunks (32)")
    bench.add_argument("--ratios", type=float, nargs="+", default=[0.15], metavar="R", help="recompute ratios (0.15)")
    bench.add_argument("--selector", default="hkvd", help="which tokens to recompute (hkvd)")
    bench.add_argument("--repeats", type=_count, default=7, metavar="N", help="interleaved rounds (7)")
    bench.add_argument("--peer", choices=("torch",), help="also time transformers + torch full prefill")
    _add_shared(bench)
    bench.set_defaults(run=lambda parsed: run_bench(parsed, _say))


def _ratio(text: str) -> float | str:
    """A recompute ratio, or `auto`."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a ratio in [0, 1] or 'auto', got {text!r}") from None


def _count(text: str) -> int:
    """An argument that counts something: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def run_ask(parsed: argparse.Namespace) -> dict[str, Any]:
    """Answers one question; returns what `--json` writes."""
    _take_question_from_docs(parsed)
    auto = parsed.ratio == "auto"
    _check_writable("--trace", parsed.trace)
    if parsed.trace is not None and parsed.trace.suffix == ".png":
        raise CacheBlendError(f"--trace {parsed.trace} is the name of its picture; give one that ends in .json")
    if parsed.explain and (not auto or parsed.mode != "blend"):
        raise CacheBlendError("--explain needs --mode blend --ratio auto: else there is no decision to explain")
    fixed = BlendConfig(0.15 if auto else parsed.ratio, selector=parsed.selector)
    blend = AutoBlend(fixed, parsed.profile) if auto else fixed
    sampling = Sampling(parsed.temperature, top_p=parsed.top_p, seed=parsed.seed)
    documents = read_documents(parsed.docs)
    model = _load_with_tokenizer(parsed)
    prompt, sources = _prompt(parsed, model, documents)
    with (
        ChunkStore(parsed.store, host_bytes=parsed.store_bytes) as store,
        Engine(model, store, blend, executor=parsed.executor) as engine,
    ):
        answers, trace = _ask(parsed, engine, prompt, sampling)
    if parsed.compare:
        _print_comparison(answers)
    else:
        print(answers[parsed.mode].text)
        print(_summary(answers[parsed.mode].stats.prefill))
    stats = answers[parsed.mode].stats.prefill
    if parsed.explain and stats.decision is not None:
        print(explain(stats.decision, stats.ttft_s))
    if trace is not None:
        _save_trace(trace, parsed.trace)
    return {
        "question": parsed.question,
        "model": parsed.model,
        "chunks": sources,
        "answers": {mode: _answer_json(answer) for mode, answer in answers.items()},
    }


def _ask(
    parsed: argparse.Namespace, engine: Engine, prompt: Prompt, sampling: Sampling
) -> tuple[dict[str, Generation], Trace | None]:
    """Answers in the mode asked for, or in all to compare them; and what happened when in the one asked for."""
    bar = _bar(total=None, desc="precompute")
    engine.precompute(prompt, progress=lambda done, total: _advance(bar, done, total))
    bar.close()
    answers = {}
    trace = None if parsed.trace is None else Trace()
    for mode in MODES if parsed.compare else (parsed.mode,):
        if parsed.compare:
            engine.prefill(prompt, mode)  # so that every mode is timed on its second run
        out = engine.prefill(prompt, mode, trace=trace if mode == parsed.mode else None)
        answers[mode] = engine.complete(out, max_new_tokens=parsed.max_new_tokens, sampling=sampling)
    return answers, trace


def run_precompute(parsed: argparse.Namespace) -> dict[str, Any]:
    """Stores the KV of all chunks of the documents; returns what `--json` writes."""
    documents = read_documents(parsed.docs)
    model = _load_with_tokenizer(parsed)
    chunks = _chunks(parsed, model, documents)
    # The prompt that `ask` makes of them: its prefix is what they are computed after.
    texts = [chunk.text for chunk in chunks]
    prompt = Prompt.to_answer(model.tokenizer, texts, "?", system=parsed.system, separator=SEPARATOR)
    bar = _bar(total=None, desc="precompute")
    with ChunkStore(parsed.store) as store, Engine(model, store) as engine:
        store.check_writable()
        keys = engine.precompute(
            prompt.chunks, prefix=prompt.prefix, progress=lambda done, total: _advance(bar, done, total)
        )
        engine.flush()
        stats = store.stats
    bar.close()
    failed = f", {stats.write_errors} errors of writing: see above" if stats.write_errors else ""
    size = stats.disk_bytes / 1e6
    print(f"{len(keys)} chunks, {stats.written} entries written to {parsed.store} ({size:.1f} MB){failed}")
    return {
        "chunks": [
            {"source": chunk.source, "index": chunk.index, "key": key} for chunk, key in zip(chunks, keys, strict=True)
        ],
        "written": stats.written,
        "store_bytes": stats.disk_bytes,
        "exit_code": 1 if stats.write_errors else 0,
    }


def _load_with_tokenizer(parsed: argparse.Namespace) -> Model:
    model = _load(parsed.model, parsed.dtype)
    if model.tokenizer is None:
        raise CacheBlendError(f"model {parsed.model!r} has no tokenizer; text needs one")
    return model


def _save_trace(trace: Trace, path: Path) -> None:
    trace.save(path)
    trace.save_picture(path.with_suffix(".png"))
    _say(f"wrote {path} (open it in ui.perfetto.dev) and {path.with_suffix('.png')}")


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser("calibrate", help="measure what --ratio auto decides by: layer steps and tiers")
    calibrate.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="checkpoint directory or hub id (demo)")
    calibrate.add_argument("--store", metavar="DIR", help="the store whose disk is measured (memory only)")
    calibrate.add_argument("--lengths", type=_count, nargs="+", default=[512, 1024, 2048, 4096], metavar="N")
    calibrate.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.5], metavar="R", help="(0.15 0.5)")
    calibrate.add_argument("--repeats", type=_count, default=3, metavar="N", help="runs of each (3)")
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="where to save (where engines look for it)")
    _add_shared(calibrate)
    calibrate.set_defaults(run=_run_calibrate)


def _run_calibrate(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.calibrate import run_calibrate

    if parsed.out is not None and parsed.out.parent.is_dir():  # else it is made
        _check_writable("--out", parsed.out)
    return run_calibrate(parsed, _load(parsed.model, parsed.dtype), _progress)


def _take_question_from_docs(parsed: argparse.Namespace) -> None:
    """In `--docs PATH… "question"` argparse gives the question to `--docs`, its last value."""
    if parsed.question is None:
        # `os.path` takes a text that is too long for a path for one that there is not.
        if len(parsed.docs) < 2 or os.path.exists(parsed.docs[-1]):
            raise CacheBlendError('a question is missing; write it last: ask --docs PATH… "question"')
        parsed.question = parsed.docs.pop()
    if not parsed.question.strip():
        raise CacheBlendError("the question is empty; write it last")


def _prompt(parsed: argparse.Namespace, model: Model, documents: list) -> tuple[Prompt, list[dict[str, Any]]]:
    chunks = _chunks(parsed, model, documents)
    if not parsed.all:
        chunks = select_top_k(chunks, parsed.question, parsed.top_k)
    texts = [chunk.text for chunk in chunks]
    prompt = Prompt.to_answer(model.tokenizer, texts, parsed.question, system=parsed.system, separator=SEPARATOR)
    return prompt, [{"source": chunk.source, "index": chunk.index} for chunk in chunks]


def _chunks(parsed: argparse.Namespace, model: Model, documents: list) -> list[Chunk]:
    tokenizer = model.tokenizer

    def count_tokens(text: str) -> int:
        return len(encode(tokenizer, text + SEPARATOR, plain=True))

    def progress(items: Iterable) -> Iterable:
        return tqdm(items, desc="split", disable=not sys.stderr.isatty())

    return chunk_documents(documents, parsed.chunk_tokens, count_tokens, progress)


def _load(name: str, dtype: str | None) -> Model:
    bar = _bar(total=None, desc="load", unit="B", unit_scale=True)
    model = load_model(name, dtype=dtype, progress=lambda done, total: _advance(bar, done, total))
    bar.close()
    return model


def _bar(**options: Any) -> tqdm:
    return tqdm(disable=not sys.stderr.isatty(), leave=False, **options)


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _summary(stats: PrefillStats) -> str:
    return (
        f"[{stats.mode}: {stats.tokens} tokens, {stats.reused} reused, {stats.recompute_ratio:.0%} of "
        f"{stats.candidates} candidates and {stats.forced} others computed; TTFT {stats.ttft_s * 1e3:.0f} ms]"
    )


def _print_comparison(answers: dict[str, Generation]) -> None:
    print(f"{'mode':8}{'TTFT ms':>9}{'speed-up':>10}{'reused':>8}{'recomputed':>12}{'GFLOP':>8}  answer")
    full = answers["full"].stats.ttft_s
    for mode, answer in answers.items():
        stats = answer.stats.prefill
        recomputed = stats.forced + round(stats.recompute_ratio * stats.candidates)
        text = " ".join(answer.text.split())
        print(
            f"{mode:8}{stats.ttft_s * 1e3:9.1f}{full / stats.ttft_s:9.2f}x{stats.reused:8}{recomputed:12}"
            f"{stats.flops / 1e9:8.1f}  {text[:60]}"
        )


def _answer_json(answer: Generation) -> dict[str, Any]:
    prefill = asdict(answer.stats.prefill) | {"reused": answer.stats.prefill.reused}
    decode = {
        "tokens": answer.stats.decoded,
        "seconds_per_token": answer.stats.seconds_per_token,
        "finish_reason": answer.stats.finish_reason,
    }
    return {"text": answer.text, "token_ids": answer.token_ids, "prefill": prefill, "decode": decode}


def _write_json(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CacheBlendError(f"cannot write --json {path}: {error.strerror}; choose another path") from error


def _keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, in the user's cache directory, unless the user chose one."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(user_cache_path("cacheblend-jax") / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
