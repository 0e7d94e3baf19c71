"""The command `evaluate`: measures quality on a data set, or finds a model's check layer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cacheblend_jax.choices import CONTINUATION_TOKENS, CONTINUATIONS, MODES, NEUTRAL, PLAIN, SELECTORS_COMPARED
from cacheblend_jax.cli.bundled_model import warn_of_unknown
from cacheblend_jax.cli.options import (
    add_model_option,
    add_shared_options,
    at_least_one,
    kv_dtype,
    load_with_bar,
    print_warning,
)
from cacheblend_jax.cli.progress import progress

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.model import Model

NAMED_ROWS = 5  # of those skipped


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `evaluate` to the command line's commands."""
    parser = commands.add_parser("evaluate", help="measure quality on a data set, by mode, selector and ratio")
    add_model_option(parser)
    parser.add_argument(
        "--data",
        default="bundled",
        metavar="FILE",
        help="JSON of question, answers and ctxs, or LongBench's jsonl (default: the bundled corpus)",
    )
    parser.add_argument(
        "--limit",
        type=at_least_one,
        metavar="N",
        help="first N rows (default: all); of the bundled corpus, N of each kind of question (default: 200)",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=["full", "reuse", "blend"],
        help="modes to compare (default: full reuse blend)",
    )
    parser.add_argument(
        "--selectors",
        nargs="+",
        default=list(SELECTORS_COMPARED),
        help=f"for blend (default: {' '.join(SELECTORS_COMPARED)})",
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.15], metavar="R", help="recompute ratios (default: 0.15)"
    )
    parser.add_argument(
        "--deviations",
        nargs="+",
        choices=("kv", "k", "v"),
        default=["kv"],
        help="what the deviation is measured on (default: kv)",
    )
    parser.add_argument(
        "--stages", type=at_least_one, nargs="+", default=[4], metavar="N", help="stages of filtering (default: 4)"
    )
    parser.add_argument(
        "--check-layer", type=at_least_one, metavar="L", help="where tokens are first chosen (default: the model's own)"
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        default=[PLAIN],
        metavar="NAME",
        help=f"what chunks are precomputed after: {PLAIN} (default), {NEUTRAL} (a packaged text), or a text file",
    )
    parser.add_argument(
        "--kv-dtype",
        dest="kv_dtypes",
        type=kv_dtype,
        nargs="+",
        default=[None],
        metavar="DTYPE",
        help="what stored KV is quantised to: int8, float8_e4m3fn or none, each compared (default: none)",
    )
    parser.add_argument("--check-layers", action="store_true", help="find the model's check layer and save it")
    parser.add_argument(
        "--chunk-tokens", type=at_least_one, default=512, metavar="N", help="longest chunk of LongBench (default: 512)"
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=16, metavar="N", help="longest answer (default: 16)"
    )
    parser.add_argument(
        "--answers",
        choices=CONTINUATIONS,
        default="full",
        help="what settings are scored on, token by token: full recompute's own answer, or the data's (default: full)",
    )
    parser.add_argument(
        "--continuation-tokens",
        type=at_least_one,
        default=CONTINUATION_TOKENS,
        metavar="N",
        help=f"score at most N tokens of it (default: {CONTINUATION_TOKENS})",
    )
    parser.add_argument("--against", metavar="SETTING", help='compare all with a setting, such as "hkvd 0.15"')
    parser.add_argument(
        "--layer-deviations", action="store_true", help="also measure KV and attention deviation by layer (slower)"
    )
    parser.add_argument(
        "--system", help="system text before the chunks (default: the tokenizer's own, or a general one)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="keep the results, a line each; an interrupted run goes on from there"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="DIR",
        help="draw what is recovered against work, quality against ratio, and deviation",
    )
    add_shared_options(parser)
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, prints a table and draws; returns what `--json` writes."""
    from cacheblend_jax.engine.kernels import with_kernels
    from cacheblend_jax.evaluation.evaluate import evaluate
    from cacheblend_jax.evaluation.settings import settings_for
    from cacheblend_jax.evaluation.tables import summary_table

    settings = settings_for(
        modes=parsed.modes,
        selectors=parsed.selectors,
        ratios=parsed.ratios,
        deviations=parsed.deviations,
        num_stages=parsed.stages,
        check_layer=parsed.check_layer,
        contexts=parsed.contexts,
        kv_dtypes=parsed.kv_dtypes,
    )
    if parsed.plot is not None:
        from cacheblend_jax.evaluation.figures import make_picture_directory

        make_picture_directory(parsed.plot)
    model = with_kernels(load_with_bar(parsed.model, parsed.dtype), parsed.kernels)
    warn_of_unknown(model, _texts(parsed, model))
    if parsed.check_layers:
        return _find_check_layer(parsed, model)
    found = evaluate(
        model,
        settings,
        data_set=parsed.data,
        limit=parsed.limit,
        chunk_tokens=parsed.chunk_tokens,
        max_new_tokens=parsed.max_new_tokens,
        continuation=parsed.answers,
        continuation_tokens=parsed.continuation_tokens,
        against=parsed.against,
        system=parsed.system,
        out=parsed.out,
        layer_deviations=parsed.layer_deviations,
        with_deviation=parsed.plot is not None,
        progress=progress,
    )
    print(summary_table(found.summary))
    _print_skipped(found.skipped)
    if found.deviation is not None:
        from cacheblend_jax.evaluation.plots import draw

        for path in draw(parsed.plot, settings, found.summary, found.deviation, found.chunk_lengths):
            print(f"drew {path}")
    return {
        "model": model.name,
        "data": parsed.data,
        "rows": found.rows,
        "skipped": found.skipped,
        "summary": found.summary,
    }


def _texts(parsed: argparse.Namespace, model: Model) -> Iterator[str]:
    """Yields what the model will read of a user's data set, which is loaded when the first text is asked for."""
    from cacheblend_jax.evaluation.datasets import BUNDLED
    from cacheblend_jax.evaluation.evaluator import rows_for

    if parsed.data != BUNDLED:
        for row in rows_for(model, parsed.data, limit=parsed.limit, chunk_tokens=parsed.chunk_tokens):
            yield from (row.question, *row.chunks)


def _print_skipped(skipped: dict[str, str]) -> None:
    if skipped:
        named = [f"{name} ({reason})" for name, reason in list(skipped.items())[:NAMED_ROWS]]
        more = ["…"] if len(skipped) > NAMED_ROWS else []
        print_warning(f"{len(skipped)} rows are skipped: {', '.join(named + more)}")


def _find_check_layer(parsed: argparse.Namespace, model: Model) -> dict[str, Any]:
    from cacheblend_jax.evaluation.check_layer import measure_check_layer
    from cacheblend_jax.evaluation.tables import check_layer_table
    from cacheblend_jax.model import save_check_layer

    measured = measure_check_layer(
        model,
        data_set=parsed.data,
        limit=parsed.limit,
        chunk_tokens=parsed.chunk_tokens,
        system=parsed.system,
        progress=progress,
    )
    print(check_layer_table(measured))
    _print_skipped(measured.skipped)
    saved = save_check_layer(model, measured.layer)
    where = f", saved in {saved}" if saved else " (not saved: the model has no directory)"
    print(f"check layer: {measured.layer}{where}")
    return {
        "check_layer": measured.layer,
        "skipped": measured.skipped,
        "scores": [None if np.isnan(score) else float(score) for score in measured.scores],
        "concentration": measured.concentration.tolist(),
        "neighbour_correlation": measured.neighbour_correlation.tolist(),
    }
