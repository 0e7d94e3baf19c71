"""The commands `ask` and `precompute`: from text files to an answer, and to stored KV."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cacheblend_jax.blend import SELECTORS, BlendConfig
from cacheblend_jax.cli.options import add_shared_options, check_writable, count, load, progress, progress_bar, say
from cacheblend_jax.documents import Chunk, chunk_documents, read_documents, select_top_k
from cacheblend_jax.engine.controller import AutoBlend, explain
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.executors import EXECUTORS
from cacheblend_jax.engine.layout import MODES
from cacheblend_jax.engine.prompt import Prompt, encode
from cacheblend_jax.engine.results import Generation, PrefillStats
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model import Model
from cacheblend_jax.model.decode import Sampling
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkStore

SEPARATOR = "\n\n"


def add_ask(commands: Any) -> None:
    """Adds `ask` to the command line's commands."""
    ask = commands.add_parser("ask", help="answer a question from text files")
    ask.add_argument("question", nargs="?", help="what to ask; write it last")
    _add_sources(ask)
    ask.add_argument("--top-k", type=count, default=5, metavar="K", help="chunks to use, picked by BM25 (5)")
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
    ask.add_argument("--max-new-tokens", type=count, default=64, metavar="N", help="longest answer (64)")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    ask.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest P (1: all)")
    ask.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    ask.add_argument("--store", metavar="DIR", help="keep chunk KV in a directory, for the next time")
    ask.add_argument("--store-bytes", type=count, default=4 * 2**30, metavar="N", help="memory for chunk KV (4 GiB)")
    add_shared_options(ask)
    ask.set_defaults(run=run_ask)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="checkpoint directory or hub id (demo)")
    parser.add_argument(
        "--docs", nargs="+", action="extend", required=True, metavar="PATH", help=".txt and .md files, or directories"
    )
    parser.add_argument("--chunk-tokens", type=count, default=512, metavar="N", help="longest chunk (512)")
    parser.add_argument("--system", help="system text before the chunks")


def add_precompute(commands: Any) -> None:
    """Adds `precompute` to the command line's commands."""
    precompute = commands.add_parser("precompute", help="compute the KV of text files and keep it in a directory")
    _add_sources(precompute)
    precompute.add_argument("--store", required=True, metavar="DIR", help="where to keep it")
    add_shared_options(precompute)
    precompute.set_defaults(run=run_precompute)


def _ratio(text: str) -> float | str:
    """A recompute ratio, or `auto`."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a ratio in [0, 1] or 'auto', got {text!r}") from None


def run_ask(parsed: argparse.Namespace) -> dict[str, Any]:
    """Answers one question; returns what `--json` writes."""
    _take_question_from_docs(parsed)
    auto = parsed.ratio == "auto"
    check_writable("--trace", parsed.trace)
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
    with progress_bar("precompute") as advance:
        engine.precompute(prompt, progress=advance)
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
    with (
        ChunkStore(parsed.store) as store,
        Engine(model, store) as engine,
        progress_bar("precompute") as advance,
    ):
        store.check_writable()
        keys = engine.precompute(prompt.chunks, prefix=prompt.prefix, progress=advance)
        engine.flush()
        stats = store.stats
    failed = f", {stats.write_errors} errors of writing: see above" if stats.write_errors else ""
    size = stats.disk.bytes / 1e6
    print(f"{len(keys)} chunks, {stats.written} entries written to {parsed.store} ({size:.1f} MB){failed}")
    return {
        "chunks": [
            {"source": chunk.source, "index": chunk.index, "key": key} for chunk, key in zip(chunks, keys, strict=True)
        ],
        "written": stats.written,
        "store_bytes": stats.disk.bytes,
        "exit_code": 1 if stats.write_errors else 0,
    }


def _load_with_tokenizer(parsed: argparse.Namespace) -> Model:
    model = load(parsed.model, parsed.dtype)
    if model.tokenizer is None:
        raise CacheBlendError(f"model {parsed.model!r} has no tokenizer; text needs one")
    return model


def _save_trace(trace: Trace, path: Path) -> None:
    trace.save(path)
    trace.save_picture(path.with_suffix(".png"))
    say(f"wrote {path} (open it in ui.perfetto.dev) and {path.with_suffix('.png')}")


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

    return chunk_documents(documents, parsed.chunk_tokens, count_tokens, partial(progress, what="split"))


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
