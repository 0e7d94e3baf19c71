"""The command line: `cacheblend-jax` with its commands."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from platformdirs import user_cache_path

from cacheblend_jax.cli.ask import add_ask, add_precompute
from cacheblend_jax.cli.options import add_shared_options, check_writable, count, load, progress, say, write_json
from cacheblend_jax.cli.store import add_store_commands
from cacheblend_jax.engine.layout import MODES
from cacheblend_jax.errors import CacheBlendError


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0; 1 for a store that is damaged or could not be written; 2 for bad usage or input; 130 where it was interrupted.
    """
    parsed = _parser().parse_args(arguments)
    try:
        check_writable("--json", parsed.json)
        if not parsed.no_compile_cache:
            _keep_compiled_programs()
        report = parsed.run(parsed)
        if parsed.json is not None:
            write_json(parsed.json, report)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cacheblend-jax",
        description="Answers from texts whose KV is computed once and blended (CacheBlend).",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('cacheblend-jax')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    add_ask(commands)
    add_precompute(commands)
    add_store_commands(commands)
    _add_evaluate(commands)
    _add_bench(commands)
    _add_calibrate(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="ask the bundled model in every mode")
    demo.add_argument("--plot", type=Path, metavar="DIR", help="also draw quality against ratio, and deviation")
    add_shared_options(demo)
    demo.set_defaults(run=_run_demo)


def _run_demo(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.evaluation.demo import run_demo

    return run_demo(parsed, load("demo", parsed.dtype), progress)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure quality on a data set, in modes, selectors and ratios")
    evaluate.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="checkpoint directory or hub id (demo)")
    evaluate.add_argument(
        "--data", default="bundled", metavar="FILE", help="JSON of question, answers, ctxs; LongBench jsonl; (bundled)"
    )
    evaluate.add_argument("--limit", type=count, metavar="N", help="first N rows; of the bundled: of each kind (200)")
    evaluate.add_argument(
        "--modes", nargs="+", choices=MODES, default=["full", "reuse", "blend"], help="(full reuse blend)"
    )
    evaluate.add_argument("--selectors", nargs="+", default=["hkvd", "random", "epic"], help="(hkvd random epic)")
    evaluate.add_argument(
        "--ratios", type=float, nargs="+", default=[0.15], metavar="R", help="recompute ratios (0.15)"
    )
    evaluate.add_argument("--deviations", nargs="+", choices=("kv", "k", "v"), default=["kv"], help="measured on (kv)")
    evaluate.add_argument("--stages", type=count, nargs="+", default=[4], metavar="N", help="filtering stages (4)")
    evaluate.add_argument("--check-layer", type=count, metavar="L", help="the layer of selection (the model's)")
    evaluate.add_argument("--check-layers", action="store_true", help="find the model's check layer and save it")
    evaluate.add_argument(
        "--chunk-tokens", type=count, default=512, metavar="N", help="chunks of LongBench texts (512)"
    )
    evaluate.add_argument("--max-new-tokens", type=count, default=16, metavar="N", help="longest answer (16)")
    evaluate.add_argument("--system", help="system text before the chunks")
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="results, a line each; an interrupted run goes on")
    evaluate.add_argument("--plot", type=Path, metavar="DIR", help="draw quality against ratio, and deviation")
    add_shared_options(evaluate)
    evaluate.set_defaults(run=_run_evaluate)


def _run_evaluate(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.evaluation.evaluate import run_evaluate, settings_of

    settings_of(parsed)
    return run_evaluate(parsed, load(parsed.model, parsed.dtype), progress)


def _add_bench(commands: Any) -> None:
    from cacheblend_jax.evaluation.bench import SHAPES, run_bench

    bench = commands.add_parser("bench", help="time the modes against each other")
    source = bench.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR_OR_ID", help="checkpoint directory or hub id")
    source.add_argument("--shape", choices=sorted(SHAPES), default="bench-16l", help="random weights (bench-16l)")
    bench.add_argument("--tokens", type=count, nargs="+", default=[4096], metavar="N", help="tokens in chunks (4096)")
    bench.add_argument("--chunks", type=count, default=8, metavar="N", help="equal chunks (8)")
    bench.add_argument("--prefix-tokens", type=int, default=0, metavar="N", help="tokens before the chunks (0)")
    bench.add_argument("--question-tokens", type=count, default=32, metavar="N", help="tokens after the chunks (32)")
    bench.add_argument("--ratios", type=float, nargs="+", default=[0.15], metavar="R", help="recompute ratios (0.15)")
    bench.add_argument("--selector", default="hkvd", help="which tokens to recompute (hkvd)")
    bench.add_argument("--repeats", type=count, default=7, metavar="N", help="interleaved rounds (7)")
    bench.add_argument("--peer", choices=("torch",), help="also time transformers + torch full prefill")
    add_shared_options(bench)
    bench.set_defaults(run=lambda parsed: run_bench(parsed, say))


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser("calibrate", help="measure what --ratio auto decides by: layer steps and tiers")
    calibrate.add_argument("--model", default="demo", metavar="DIR_OR_ID", help="checkpoint directory or hub id (demo)")
    calibrate.add_argument("--store", metavar="DIR", help="the store whose disk is measured (memory only)")
    calibrate.add_argument("--lengths", type=count, nargs="+", default=[512, 1024, 2048, 4096], metavar="N")
    calibrate.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.5], metavar="R", help="(0.15 0.5)")
    calibrate.add_argument("--repeats", type=count, default=3, metavar="N", help="runs of each (3)")
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="where to save (where engines look for it)")
    add_shared_options(calibrate)
    calibrate.set_defaults(run=_run_calibrate)


def _run_calibrate(parsed: argparse.Namespace) -> dict[str, Any]:
    from cacheblend_jax.evaluation.calibrate import run_calibrate

    if parsed.out is not None and parsed.out.parent.is_dir():  # else it is made
        check_writable("--out", parsed.out)
    return run_calibrate(parsed, load(parsed.model, parsed.dtype), progress)


def _keep_compiled_programs() -> None:
    """Turns JAX's persistent compilation cache on, in the user's cache directory, unless the user chose one."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(user_cache_path("cacheblend-jax") / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
