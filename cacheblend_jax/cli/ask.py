"""The command `ask`: answers a question from text files."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cacheblend_jax.blend import SELECTORS, BlendConfig
from cacheblend_jax.cli.bundled_model import loading_reader
from cacheblend_jax.cli.compiling import compiled_meanwhile
from cacheblend_jax.cli.documents_prompt import (
    DOCUMENTS,
    add_choice_options,
    add_question,
    add_source_options,
    asked,
    chosen_context,
    question_and_paths,
    remembered_sample,
    split,
)
from cacheblend_jax.cli.options import (
    add_shared_options,
    add_store_options,
    at_least_one,
    check_writable,
    open_store,
    print_status,
    print_warning,
)
from cacheblend_jax.cli.progress import Advance, Parts, progress_of_parts
from cacheblend_jax.cli.store_report import StoreReport, stored_otherwise
from cacheblend_jax.documents import Document, read_documents
from cacheblend_jax.engine.chunk_lookup import ChunkLookup
from cacheblend_jax.engine.controller import explain
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.layout import MODES
from cacheblend_jax.engine.planner import EXECUTORS
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.engine.results import Generation, PrefillResult, PrefillStats
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.loading import LoadingModel
from cacheblend_jax.model.sampling import Sampling
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkStore

AUTO = "auto"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `ask` to the command line's commands."""
    parser = commands.add_parser("ask", help="answer a question from text files")
    add_question(parser)
    add_source_options(parser)
    add_choice_options(parser)
    parser.add_argument("--mode", choices=MODES, default="blend", help="how to prefill (default: blend)")
    parser.add_argument("--compare", action="store_true", help="answer in all four modes and print a table")
    parser.add_argument(
        "--ratio",
        type=_ratio_or_auto,
        default=0.15,
        help="recompute ratio, or auto: as much as loading hides (default: 0.15)",
    )
    parser.add_argument(
        "--executor", choices=EXECUTORS, default="auto", help="stream stored KV, or load it first (default: auto)"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="with --ratio auto: a profile that calibrate has saved"
    )
    parser.add_argument("--explain", action="store_true", help="say what the controller decided, and what happened")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Chrome trace, and a picture of it beside it (.png)"
    )
    parser.add_argument("--selector", help=f"{', '.join(sorted(SELECTORS))} (default: query; hkvd with --ratio auto)")
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (default: 0)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that together have probability P (default: 1, all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    add_store_options(parser)
    add_shared_options(parser)
    parser.set_defaults(shorten=": --top-k K, --chunk-tokens N")
    return parser


def _ratio_or_auto(text: str) -> float | str:
    if text == AUTO:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a ratio in [0, 1] or 'auto', got {text!r}") from None


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Answers one question; returns what `--json` writes."""
    question, paths = question_and_paths(parsed.question, parsed.docs)
    blend = _blend(parsed)
    sampling = Sampling(parsed.temperature, top_p=parsed.top_p, seed=parsed.seed)
    context = chosen_context(parsed.context)
    documents = read_documents(paths)
    trace = None if parsed.trace is None else Trace()
    with ExitStack() as opened:
        shown = opened.enter_context(progress_of_parts())
        loading = opened.enter_context(_loading(parsed, question, documents, shown))
        model = loading.outline
        chunks, prompt = asked(split(documents, model, parsed.chunk_tokens, shown.items), question, model, parsed)
        store = opened.enter_context(open_store(parsed))
        if parsed.context == DOCUMENTS:
            context = remembered_sample(store, documents, model)
        options = {"executor": parsed.executor, "profile": parsed.profile, "kernels": parsed.kernels}
        new_engine = partial(Engine, store=store, blend=blend, context=context, **options)
        looked_up = _prepare(new_engine(model=model), store, prompt, parsed, shown.part("compiling"))
        engine = opened.enter_context(new_engine(model=loading.model()))
        to_answer = prompt, _modes(parsed), parsed.max_new_tokens
        compiled = opened.enter_context(compiled_meanwhile(engine, *to_answer, shown.part("compiling")))
        report = _precompute(engine, prompt, looked_up, shown.part("precomputing"))
        compiled()  # a compiler beside it would slow down what is timed
        answers = _answers(parsed, engine, prompt, sampling, trace, shown)
    answer = answers[parsed.mode]
    prefill = answer.stats.prefill
    print(_comparison_table(answers) if parsed.compare else f"{answer.text}\n{_summary(prefill)}")
    (print_status if parsed.compare else print)(report.line(parsed.store))  # a table stands alone on stdout
    if parsed.explain and prefill.decision is not None:
        print(explain(prefill.decision, prefill.ttft_s))
    if trace is not None:
        _save_trace(trace, parsed.trace)
    return {
        "question": question,
        "model": model.name,
        "chunks": [
            {"source": chunk.source, "index": chunk.index, "found": looked_up.is_stored}
            for chunk, looked_up in zip(chunks, report.chunks, strict=True)
        ],
        "store": {"found": report.found, "computed": report.computed, "seconds": report.seconds},
        "answers": {mode: _answer_report(each) for mode, each in answers.items()},
    }


def _blend(parsed: argparse.Namespace) -> BlendConfig:
    """How to blend; refuses options that do not go together before any work."""
    auto = parsed.ratio == AUTO
    check_writable("--trace", parsed.trace)
    if parsed.trace is not None and parsed.trace.suffix == ".png":
        raise CacheBlendError(f"--trace {parsed.trace} is the name of its picture; give one that ends in .json")
    if parsed.explain and (not auto or parsed.mode != "blend"):
        raise CacheBlendError("--explain needs --mode blend --ratio auto: else there is no decision to explain")
    return BlendConfig(parsed.ratio, selector=parsed.selector)


def _loading(
    parsed: argparse.Namespace, question: str, documents: Sequence[Document], shown: Parts
) -> AbstractContextManager[LoadingModel]:
    texts = [question, *(document.text for document in documents)]
    advance = shown.part("loading weights", unit="B", unit_scale=True)
    return loading_reader(parsed.model, parsed.dtype, texts, advance)


def _prepare(
    ahead: Engine, store: ChunkStore, prompt: Prompt, parsed: argparse.Namespace, advance: Advance
) -> list[ChunkLookup]:
    """Does what needs no weights, while they are read: looks up the chunks, and compiles what is needed first."""
    with ahead:
        looked_up = ahead.look_up(prompt)
        if otherwise := stored_otherwise(store, ahead.model, looked_up):
            print_warning(otherwise)
        # While missing chunks are computed, there is time to compile what answers.
        modes = _modes(parsed) if all(chunk.is_stored for chunk in looked_up) else ()
        ahead.prepare(prompt, modes, max_new_tokens=parsed.max_new_tokens if modes else 1, progress=advance)
    advance(1, 1)
    return looked_up


def _precompute(engine: Engine, prompt: Prompt, looked_up: Sequence[ChunkLookup], advance: Advance) -> StoreReport:
    """Computes what the store lacks, and reports what it had before that."""
    missing = {chunk.key for chunk in looked_up if not chunk.is_stored}
    began = time.perf_counter()
    engine.precompute(prompt, progress=advance)
    return StoreReport(looked_up, len(missing), time.perf_counter() - began)


def _modes(parsed: argparse.Namespace) -> tuple[str, ...]:
    return MODES if parsed.compare else (parsed.mode,)


def _answers(
    parsed: argparse.Namespace, engine: Engine, prompt: Prompt, sampling: Sampling, trace: Trace | None, shown: Parts
) -> dict[str, Generation]:
    """Answers in the chosen mode, or in all of them to compare; `trace` collects what happens in the chosen one."""
    answers = {}
    for mode in _modes(parsed):
        prefilled = shown.part(f"prefilling ({mode})")
        if parsed.compare:
            engine.prefill(prompt, mode)  # so that every mode is timed on its second run
        out = engine.prefill(prompt, mode, trace=trace if mode == parsed.mode else None)
        prefilled(1, 1)
        answers[mode] = _completed(engine, out, parsed.max_new_tokens, sampling, shown.part("decoding"))
    return answers


def _completed(
    engine: Engine, out: PrefillResult, max_new_tokens: int, sampling: Sampling, advance: Advance
) -> Generation:
    count = itertools.count(1)

    def decoded(token: int, text: str) -> None:
        advance(next(count), max_new_tokens)

    answer = engine.complete(out, max_new_tokens=max_new_tokens, sampling=sampling, on_token=decoded)
    advance(max_new_tokens, max_new_tokens)
    return answer


def _save_trace(trace: Trace, path: Path) -> None:
    trace.save(path)
    trace.save_picture(path.with_suffix(".png"))
    print_status(f"wrote {path} (open it in ui.perfetto.dev) and {path.with_suffix('.png')}")


def _summary(stats: PrefillStats) -> str:
    return (
        f"[{stats.mode}: {stats.tokens} tokens, {stats.reused} reused, {stats.recompute_ratio:.0%} of "
        f"{stats.candidates} candidates and {stats.forced} others computed; TTFT {stats.ttft_s * 1e3:.0f} ms]"
    )


def _comparison_table(answers: dict[str, Generation]) -> str:
    table = [f"{'mode':8}{'TTFT ms':>9}{'speed-up':>10}{'reused':>8}{'recomputed':>12}{'GFLOP':>8}  answer"]
    full = answers["full"].stats.ttft_s
    for mode, answer in answers.items():
        stats = answer.stats.prefill
        recomputed = stats.forced + round(stats.recompute_ratio * stats.candidates)
        text = " ".join(answer.text.split())
        table.append(
            f"{mode:8}{stats.ttft_s * 1e3:9.1f}{full / stats.ttft_s:9.2f}x{stats.reused:8}{recomputed:12}"
            f"{stats.flops / 1e9:8.1f}  {text[:60]}"
        )
    return "\n".join(table)


def _answer_report(answer: Generation) -> dict[str, Any]:
    prefill = asdict(answer.stats.prefill) | {"reused": answer.stats.prefill.reused}
    decode = {
        "tokens": answer.stats.decoded,
        "seconds_per_token": answer.stats.seconds_per_token,
        "finish_reason": answer.stats.finish_reason,
    }
    return {"text": answer.text, "token_ids": answer.token_ids, "prefill": prefill, "decode": decode}
