"""The command `inspect`: shows, token by token, what reuse loses of a prompt and what a blend restores."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheblend_jax.choices import BUILT_IN_SELECTORS
from cacheblend_jax.cli.bundled_model import load_reader
from cacheblend_jax.cli.documents_prompt import (
    SEPARATOR,
    add_choice_options,
    add_question,
    add_source_options,
    asked,
    chosen_context,
    context_for,
    prompt_of,
    question_and_paths,
    split,
)
from cacheblend_jax.cli.options import (
    add_shared_options,
    add_store_options,
    at_least_one,
    check_writable,
    open_store,
)
from cacheblend_jax.cli.progress import progress
from cacheblend_jax.documents import Chunk, Document, read_documents
from cacheblend_jax.errors import CacheBlendError

if TYPE_CHECKING:
    from cacheblend_jax.blend import BlendConfig
    from cacheblend_jax.evaluation.inspection import Inspection
    from cacheblend_jax.evaluation.settings import Setting

    Measured = tuple[list[Setting], list[dict[str, object]]]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `inspect` to the command line's commands."""
    parser = commands.add_parser("inspect", help="show token by token what reuse loses and a blend restores")
    add_question(parser)
    add_source_options(parser, docs_required=False)
    add_choice_options(parser)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw deviation, attention between chunks, and more")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report: the prompt, shaded, and the answers")
    parser.add_argument("--ratio", type=float, default=0.15, help="recompute ratio (default: 0.15)")
    parser.add_argument("--selector", help=f"{', '.join(sorted(BUILT_IN_SELECTORS))} (default: query)")
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        default=[],
        metavar="R",
        help="with --plot, also draw quality against these ratios; another option goes between them and the question",
    )
    parser.add_argument(
        "--selectors", nargs="+", default=["query", "hkvd", "random"], help="for --ratios (default: query hkvd random)"
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=32, metavar="N", help="longest answer (default: 32)"
    )
    add_store_options(parser)
    add_shared_options(parser)
    parser.set_defaults(shorten=": --top-k K, --chunk-tokens N")
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Inspects one prompt, prints a table, draws and writes a report; returns what `--json` writes."""
    from cacheblend_jax.engine.engine import Engine
    from cacheblend_jax.evaluation.inspection import inspect, measure_ratios
    from cacheblend_jax.evaluation.tables import inspection_table

    blend = _checked(parsed)
    question, documents, chunks = _source(parsed)
    context = chosen_context(parsed.context)
    model = load_reader(parsed.model, parsed.dtype, [question, *(document.text for document in documents)])
    if chunks:
        prompt = prompt_of(chunks, question, model, parsed.system, parsed.template_arguments)
    else:
        chunks, prompt = asked(split(documents, model, parsed.chunk_tokens), question, model, parsed)
    with ExitStack() as opened:
        store = opened.enter_context(open_store(parsed))
        context = context_for(parsed.context, context, store, documents, model)
        engine = opened.enter_context(Engine(model, store, blend, context=context, kernels=parsed.kernels))
        found = inspect(
            engine, prompt, chunk_names=_names(chunks), max_new_tokens=parsed.max_new_tokens, progress=progress
        )
        measured = measure_ratios(engine, prompt, parsed.selectors, parsed.ratios, progress=progress)
    print(inspection_table(found))
    _write(parsed, found, measured)
    return _report(question, found, measured)


def _checked(parsed: argparse.Namespace) -> BlendConfig:
    """Returns how to blend; refuses what cannot be done or written before any work."""
    from cacheblend_jax.blend import BlendConfig

    check_writable("--html", parsed.html)
    if parsed.ratios and parsed.plot is None:
        raise CacheBlendError("--ratios draws quality against ratio, and needs --plot DIR")
    if parsed.plot is not None:
        from cacheblend_jax.evaluation.figures import make_picture_directory

        make_picture_directory(parsed.plot)
    for selector in parsed.selectors:
        for ratio in parsed.ratios:
            BlendConfig(ratio, selector=selector)
    return BlendConfig(parsed.ratio, selector=parsed.selector)


def _source(parsed: argparse.Namespace) -> tuple[str, list[Document], list[Chunk]]:
    """Returns the question, the documents, and the chunks where they are given: those of the demo's example."""
    if parsed.docs is not None:
        question, paths = question_and_paths(parsed.question, parsed.docs)
        return question, read_documents(paths), []
    if parsed.question is not None:
        raise CacheBlendError('--docs is missing; write inspect --docs PATH… "question", or neither for an example')
    from cacheblend_jax.evaluation.demo import EXAMPLE_CHUNKS, EXAMPLE_QUESTION

    chunks = [Chunk(text, "chunk", number) for number, text in enumerate(EXAMPLE_CHUNKS)]
    return EXAMPLE_QUESTION, [Document("example", SEPARATOR.join(EXAMPLE_CHUNKS))], chunks


def _names(chunks: Sequence[Chunk]) -> list[str]:
    """Returns each chunk's file and number; of files that are called alike, with their directories."""
    called = Counter(Path(source).name for source in {chunk.source for chunk in chunks})
    files = [name if called[name := Path(chunk.source).name] == 1 else chunk.source for chunk in chunks]
    return [f"{file} {chunk.index}" for file, chunk in zip(files, chunks, strict=True)]


def _write(parsed: argparse.Namespace, found: Inspection, measured: Measured) -> None:
    """Draws the pictures, and writes the report."""
    if parsed.plot is not None:
        from cacheblend_jax.evaluation.figures import save_figures
        from cacheblend_jax.evaluation.inspection_plots import inspection_figures
        from cacheblend_jax.evaluation.plots import quality_by_ratio

        figures = inspection_figures(found)
        if parsed.ratios:
            figures["quality"] = quality_by_ratio(*measured)
        for path in save_figures(parsed.plot, figures):
            print(f"drew {path}")
    if parsed.html is not None:
        from cacheblend_jax.evaluation.html_report import save_report

        save_report(found, parsed.html)
        print(f"wrote {parsed.html}")


def _report(question: str, found: Inspection, measured: Measured) -> dict[str, Any]:
    correlation = found.mean_neighbour_correlation()
    return {
        "question": question,
        "model": found.model,
        "parts": [{"name": part.name, "tokens": part.num_tokens} for part in found.parts],
        "answers": {
            mode: {"text": answer.text, "token_ids": answer.token_ids} for mode, answer in found.answers.items()
        },
        "kv_deviation": {mode: _number(value) for mode, value in found.mean_deviation().items()},
        "attention_deviation_by_layer": {mode: each.tolist() for mode, each in found.attention_deviation.items()},
        "cross_attention_by_layer": {mode: each.tolist() for mode, each in found.cross_attention.items()},
        "neighbour_correlation": _number(correlation),
        "ratios": measured[1],
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if value == value else None
