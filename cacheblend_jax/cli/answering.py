"""What `ask` and `chat` share: options that say how to answer, answers that are printed as they come, and reports."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cacheblend_jax.choices import BUILT_IN_SELECTORS, EXECUTORS, MODES
from cacheblend_jax.cli.compiling import compiled_meanwhile
from cacheblend_jax.cli.options import at_least_one
from cacheblend_jax.cli.progress import Advance, Parts
from cacheblend_jax.cli.store_report import StoreReport
from cacheblend_jax.documents import Document, read_documents
from cacheblend_jax.runtime.trace import Trace

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.blend import BlendConfig
    from cacheblend_jax.engine.chunk_lookup import ChunkLookup
    from cacheblend_jax.engine.engine import Engine
    from cacheblend_jax.engine.generation import TokenStream
    from cacheblend_jax.engine.prompt import Prompt
    from cacheblend_jax.engine.results import Generation, PrefillResult, PrefillStats
    from cacheblend_jax.model.sampling import Sampling

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how prompts are prefilled, and answers drawn."""
    parser.add_argument("--mode", choices=MODES, default="blend", help="how to prefill (default: blend)")
    parser.add_argument(
        "--ratio",
        type=ratio_or_auto,
        default=0.15,
        help="recompute ratio, or auto: as much as loading hides (default: 0.15)",
    )
    parser.add_argument(
        "--executor", choices=EXECUTORS, default="auto", help="stream stored KV, or load it first (default: auto)"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="with --ratio auto: a profile that calibrate has saved"
    )
    parser.add_argument(
        "--selector", help=f"{', '.join(sorted(BUILT_IN_SELECTORS))} (default: query; hkvd with --ratio auto)"
    )
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


def ratio_or_auto(text: str) -> float | Literal["auto"]:
    """Parses a recompute ratio; `BlendConfig` checks its range."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a ratio in [0, 1] or 'auto', got {text!r}") from None


def chosen_blend(parsed: argparse.Namespace) -> BlendConfig:
    """Returns how the options say to blend."""
    from cacheblend_jax.blend import BlendConfig

    return BlendConfig(parsed.ratio, selector=parsed.selector)


def chosen_sampling(parsed: argparse.Namespace) -> Sampling:
    """Returns how the options say to draw tokens."""
    from cacheblend_jax.model.sampling import Sampling

    return Sampling(parsed.temperature, top_p=parsed.top_p, seed=parsed.seed)


def engine_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `Engine` that are options."""
    return {"executor": parsed.executor, "profile": parsed.profile, "kernels": parsed.kernels}


def read_shown(paths: Sequence[str], shown: Parts) -> list[Document]:
    """Reads documents, as `read_documents` does, and shows that it does."""
    read = shown.part("reading documents")
    documents = read_documents(paths)
    read(1, 1)
    return documents


def precomputes_first(mode: str) -> bool:
    """Returns whether missing chunks are precomputed before an answer: where it is to show what reusing them does.

    Else that would take longer than computing them in the prompt, which is exact.
    """
    return mode in ("prefix", "reuse")


def precompute_first(
    engine: Engine,
    prompt: Prompt,
    looked_up: Sequence[ChunkLookup],
    modes: Sequence[str],
    max_new_tokens: int,
    shown: Parts,
) -> StoreReport:
    """Computes what the store lacks before a prompt is answered in these modes; reports what it had before that."""
    with compiled_meanwhile(engine, prompt, modes, max_new_tokens, shown.part("compiling")) as compiled:
        report = _precompute_missing(engine, prompt, looked_up, shown.part("precomputing"))
        compiled()  # a compiler beside it would slow down what is timed
    return report


def store_missing(engine: Engine, prompt: Prompt, looked_up: Sequence[ChunkLookup], shown: Parts) -> StoreReport:
    """Computes, after an answer, what the store lacked; reports what it had before that.

    The engine has not stored it (`store_missing=False`): beside the answer, that would have slowed it down.
    """
    with compiled_meanwhile(engine, prompt, (), 1, shown.part("compiling")) as compiled:
        compiled()  # on another thread, so that an interrupt is served at once
        return _precompute_missing(engine, prompt, looked_up, shown.part("storing for the next question"))


def _precompute_missing(
    engine: Engine, prompt: Prompt, looked_up: Sequence[ChunkLookup], advance: Advance
) -> StoreReport:
    missing = {chunk.key for chunk in looked_up if not chunk.is_stored}
    began = time.perf_counter()
    engine.precompute(prompt, progress=advance)
    return StoreReport(looked_up, len(missing), time.perf_counter() - began)


def prefill_shown(engine: Engine, prompt: Prompt, mode: str, shown: Parts, trace: Trace | None = None) -> PrefillResult:
    """Prefills a prompt, and shows that it does."""
    prefilled = shown.part(f"prefilling ({mode})")
    out = engine.prefill(prompt, mode, trace=trace)
    prefilled(1, 1)
    return out


def print_as_it_comes(stream: TokenStream) -> Generation:
    """Prints an answer's text while it is decoded, and ends its line, also where it is interrupted."""
    try:
        for _, text in stream:
            print(text, end="", flush=True)
    finally:
        print(flush=True)
    return stream.generation


def print_dim(line: str) -> None:
    """Prints a line beside the answers: dimmed on a terminal, unless NO_COLOR is set."""
    is_dim = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"{DIM}{line}{PLAIN}" if is_dim else line, flush=True)


def summary(stats: PrefillStats) -> str:
    """Returns on one line what a prefill reused and computed."""
    return (
        f"[{stats.mode}: {stats.tokens} tokens, {stats.reused} reused, {stats.recompute_ratio:.0%} of "
        f"{stats.candidates} candidates and {stats.forced} others computed; TTFT {stats.ttft_s * 1e3:.0f} ms]"
    )


def recomputed_tokens(stats: PrefillStats) -> int:
    """Returns how many tokens a prefill computed at most layers."""
    return stats.forced + round(stats.recompute_ratio * stats.candidates)


def answer_report(answer: Generation) -> dict[str, Any]:
    """Returns what `--json` writes of an answer."""
    prefill = asdict(answer.stats.prefill) | {"reused": answer.stats.prefill.reused}
    decode = {
        "tokens": answer.stats.decoded,
        "seconds_per_token": answer.stats.seconds_per_token,
        "finish_reason": answer.stats.finish_reason,
    }
    return {"text": answer.text, "token_ids": answer.token_ids, "prefill": prefill, "decode": decode}
