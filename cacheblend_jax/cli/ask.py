"""The command `ask`: answers a question from text files."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheblend_jax.choices import MODES
from cacheblend_jax.cli.answering import (
    add_answer_options,
    answer_report,
    chosen_blend,
    chosen_sampling,
    engine_options,
    precompute_first,
    precomputes_first,
    prefill_shown,
    print_as_it_comes,
    read_shown,
    recomputed_tokens,
    store_missing,
    summary,
)
from cacheblend_jax.cli.bundled_model import loading_reader
from cacheblend_jax.cli.collecting import rarely_collecting
from cacheblend_jax.cli.documents_prompt import (
    add_choice_options,
    add_question,
    add_source_options,
    asked,
    chosen_context,
    context_for,
    question_and_paths,
    split,
)
from cacheblend_jax.cli.options import (
    add_shared_options,
    add_store_options,
    check_writable,
    open_store,
    print_status,
    print_warning,
)
from cacheblend_jax.cli.progress import Advance, Parts, progress_of_parts
from cacheblend_jax.cli.store_report import StoreReport, stored_otherwise
from cacheblend_jax.documents import Document
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkStore

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.blend import BlendConfig
    from cacheblend_jax.engine.chunk_lookup import ChunkLookup
    from cacheblend_jax.engine.engine import Engine
    from cacheblend_jax.engine.prompt import Prompt
    from cacheblend_jax.engine.results import Generation, PrefillResult
    from cacheblend_jax.model.loading import LoadingModel
    from cacheblend_jax.model.sampling import Sampling


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `ask` to the command line's commands."""
    parser = commands.add_parser("ask", help="answer a question from text files")
    add_question(parser)
    add_source_options(parser)
    add_choice_options(parser)
    add_answer_options(parser)
    parser.add_argument("--compare", action="store_true", help="answer in all four modes and print a table")
    parser.add_argument("--explain", action="store_true", help="say what the controller decided, and what happened")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a Chrome trace, and a picture of it beside it (.png)"
    )
    add_store_options(parser)
    add_shared_options(parser)
    parser.set_defaults(shorten=": --top-k K, --chunk-tokens N")
    return parser


@rarely_collecting()
def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Answers one question; returns what `--json` writes."""
    from cacheblend_jax.engine.engine import Engine

    question, paths = question_and_paths(parsed.question, parsed.docs)
    blend, sampling = _blend(parsed), chosen_sampling(parsed)
    context = chosen_context(parsed.context)
    trace = None if parsed.trace is None else Trace()
    with ExitStack() as opened:
        waiting = opened.enter_context(ExitStack())
        shown = waiting.enter_context(progress_of_parts())
        documents = read_shown(paths, shown)
        loading = opened.enter_context(_loading(parsed, question, documents, shown))
        model = loading.outline
        chunks, prompt = asked(split(documents, model, parsed.chunk_tokens, shown.items), question, model, parsed)
        store = opened.enter_context(open_store(parsed))
        context = context_for(parsed.context, context, store, documents, model)
        options = {"context": context, "store_missing": False, **engine_options(parsed)}
        new_engine = partial(Engine, store=store, blend=blend, **options)
        looked_up = _prepare(new_engine(model=model), store, prompt, parsed, shown.part("compiling"))
        engine = opened.enter_context(new_engine(model=loading.model()))
        report = StoreReport(looked_up)
        if _precomputes_first(parsed):
            report = precompute_first(engine, prompt, looked_up, _modes(parsed), parsed.max_new_tokens, shown)
        if parsed.compare:
            answers = _compared(parsed, engine, prompt, sampling, trace, shown)
        else:
            out = prefill_shown(engine, prompt, parsed.mode, shown, trace)
            waiting.close()  # the answer has the terminal to itself
            stream = engine.stream(out, max_new_tokens=parsed.max_new_tokens, sampling=sampling)
            answers = {parsed.mode: print_as_it_comes(stream)}
        _print_about(parsed, answers)
        if trace is not None:
            _save_trace(trace, parsed.trace)
        if parsed.store is not None and not _precomputes_first(parsed):
            with progress_of_parts() as shown:
                report = store_missing(engine, prompt, looked_up, shown)
    (print_status if parsed.compare else print)(report.line(parsed.store))  # a table stands alone on stdout
    return {
        "question": question,
        "model": model.name,
        "chunks": [
            {"source": chunk.source, "index": chunk.index, "found": looked_up.is_stored}
            for chunk, looked_up in zip(chunks, report.chunks, strict=True)
        ],
        "store": {"found": report.found, "computed": report.computed, "seconds": report.seconds},
        "answers": {mode: answer_report(each) for mode, each in answers.items()},
    }


def _print_about(parsed: argparse.Namespace, answers: dict[str, Generation]) -> None:
    from cacheblend_jax.engine.controller import explain

    prefill = answers[parsed.mode].stats.prefill
    print(_comparison_table(answers) if parsed.compare else summary(prefill))
    if parsed.explain and prefill.decision is not None:
        print(explain(prefill.decision, prefill.ttft_s))


def _blend(parsed: argparse.Namespace) -> BlendConfig:
    """How to blend; refuses options that do not go together before any work."""
    auto = parsed.ratio == "auto"
    check_writable("--trace", parsed.trace)
    if parsed.trace is not None and parsed.trace.suffix == ".png":
        raise CacheBlendError(f"--trace {parsed.trace} is the name of its picture; give one that ends in .json")
    if parsed.explain and (not auto or parsed.mode != "blend"):
        raise CacheBlendError("--explain needs --mode blend --ratio auto: else there is no decision to explain")
    return chosen_blend(parsed)


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
        first = _precomputes_first(parsed)
        # While missing chunks are computed, there is time to compile what answers.
        modes = _modes(parsed) if not first or all(chunk.is_stored for chunk in looked_up) else ()
        decoded = parsed.max_new_tokens if modes else 1
        ahead.prepare(prompt, modes, max_new_tokens=decoded, precomputed=first, progress=advance)
    advance(1, 1)
    return looked_up


def _precomputes_first(parsed: argparse.Namespace) -> bool:
    return parsed.compare or precomputes_first(parsed.mode)


def _modes(parsed: argparse.Namespace) -> tuple[str, ...]:
    return MODES if parsed.compare else (parsed.mode,)


def _compared(
    parsed: argparse.Namespace, engine: Engine, prompt: Prompt, sampling: Sampling, trace: Trace | None, shown: Parts
) -> dict[str, Generation]:
    """Answers in all modes; `trace` collects what happens in the chosen one."""
    answers = {}
    for mode in MODES:
        engine.prefill(prompt, mode)  # so that every mode is timed on its second run
        out = prefill_shown(engine, prompt, mode, shown, trace if mode == parsed.mode else None)
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


def _comparison_table(answers: dict[str, Generation]) -> str:
    table = [f"{'mode':8}{'TTFT ms':>9}{'speed-up':>10}{'reused':>8}{'recomputed':>12}{'GFLOP':>8}  answer"]
    full = answers["full"].stats.ttft_s
    for mode, answer in answers.items():
        stats = answer.stats.prefill
        text = " ".join(answer.text.split())
        table.append(
            f"{mode:8}{stats.ttft_s * 1e3:9.1f}{full / stats.ttft_s:9.2f}x{stats.reused:8}{recomputed_tokens(stats):12}"
            f"{stats.flops / 1e9:8.1f}  {text[:60]}"
        )
    return "\n".join(table)
