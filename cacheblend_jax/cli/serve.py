"""The command `serve`: answers OpenAI's clients over HTTP."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheblend_jax.choices import EXECUTORS, MODES
from cacheblend_jax.cli.answering import chosen_blend, engine_options, ratio_or_auto
from cacheblend_jax.cli.documents_prompt import DOCUMENTS, chosen_context
from cacheblend_jax.cli.options import (
    BUNDLED,
    add_model_option,
    add_shared_options,
    add_store_options,
    at_least_one,
    at_least_zero,
    json_object,
    load_with_bar,
    open_store,
    print_status,
    size_of_at_least_one,
)
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.serving.options import Bounds, ServingOptions
from cacheblend_jax.serving.tenants import Tenants
from cacheblend_jax.store import TenantStore

if TYPE_CHECKING:
    from cacheblend_jax.engine.engine import Engine
    from cacheblend_jax.engine.scheduler import Scheduler
    from cacheblend_jax.serving.service import Service

INSTALL = "pip install 'cacheblend-jax[serve]'"
KEY_VARIABLE = "CACHEBLEND_API_KEY"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
UNFINISHED = 1  # the exit code where not everything was written in time


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `serve` to the command line's commands."""
    parser = commands.add_parser("serve", help="answer OpenAI's clients over HTTP")
    add_model_option(parser)
    _add_address_options(parser)
    _add_answer_options(parser)
    _add_bounds(parser)
    add_store_options(parser)
    add_shared_options(parser)
    return parser


def _add_address_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=at_least_zero, default=8000, metavar="N", help="0: any (default: 8000)")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: its own name)")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key", metavar="KEY", help=f"that clients must send (default: ${KEY_VARIABLE}, or none is asked for)"
    )
    keys.add_argument(
        "--keys", type=Path, metavar="FILE", help="JSON: each key's tenant, who sees and uses their own chunks alone"
    )


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mode", choices=MODES, default="blend", help="how to prefill by default (default: blend)")
    parser.add_argument(
        "--ratio", type=ratio_or_auto, default=0.15, help="recompute ratio by default, or auto (default: 0.15)"
    )
    parser.add_argument("--selector", help="which tokens are recomputed (default: query; hkvd with --ratio auto)")
    parser.add_argument(
        "--executor", choices=EXECUTORS, default="auto", help="stream stored KV, or load it first (default: auto)"
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="with --ratio auto: what calibrate has saved")
    parser.add_argument("--context", metavar="NAME", help="what chunks are precomputed after: see ask")
    parser.add_argument(
        "--template-arguments", type=json_object, metavar="JSON", help="arguments of the model's chat template"
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least_one, default=256, metavar="N", help="of an answer by default (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="by default (default: 1, as OpenAI's; 0 is greedy)"
    )


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slots", type=at_least_one, default=8, metavar="N", help="requests answered at a time (default: 8)"
    )
    parser.add_argument(
        "--slot-tokens",
        type=at_least_one,
        metavar="N",
        help="of a prompt with its answer, at most (default: 2048, or as many as the model takes)",
    )
    parser.add_argument(
        "--waiting", type=at_least_one, default=64, metavar="N", help="requests that may wait (default: 64)"
    )
    parser.add_argument(
        "--max-body", type=size_of_at_least_one, default=4 * 2**20, metavar="SIZE", help="of a request (default: 4M)"
    )
    parser.add_argument("--max-chunks", type=at_least_one, default=256, metavar="N", help="of a request (default: 256)")
    parser.add_argument(
        "--pinned-bytes", type=size_of_at_least_one, metavar="SIZE", help="pinned at most (default: half --host-bytes)"
    )
    parser.add_argument(
        "--warm-up",
        type=at_least_zero,
        default=0,
        metavar="TOKENS",
        help="compile for all prompts of up to so many tokens before the server is ready (default: 0, one short one)",
    )
    parser.add_argument(
        "--stop-seconds", type=at_least_one, default=30, metavar="S", help="to end in after SIGTERM (default: 30)"
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Serves until SIGTERM or an interrupt."""
    from cacheblend_jax.engine.engine import Engine
    from cacheblend_jax.engine.scheduler import Scheduler

    try:
        from cacheblend_jax.serving import bound_socket, make_app, run_server
    except ImportError as error:
        raise CacheBlendError(f"serve needs packages that are not installed ({error}): {INSTALL}") from error
    tenants = _tenants(parsed)
    if parsed.context == DOCUMENTS:
        raise CacheBlendError(f"--context {DOCUMENTS} needs documents; precompute some with it, and serve that store")
    blend, context = chosen_blend(parsed), chosen_context(parsed.context)
    with ExitStack() as opened:
        bound = opened.enter_context(bound_socket(parsed.host, parsed.port))
        model = load_with_bar(parsed.model, parsed.dtype)
        pins = {"pinned_bytes": parsed.pinned_bytes, "tenants": tenants.count}
        store = opened.enter_context(TenantStore(open_store(parsed), tenants.quotas, **pins))
        engine = opened.enter_context(Engine(model, store, blend, context=context, **engine_options(parsed)))
        longest = min(parsed.slot_tokens or 2048, model.config.max_positions)
        scheduler = opened.enter_context(
            Scheduler(engine, slots=parsed.slots, max_tokens=longest, waiting=parsed.waiting)
        )
        options = _options(parsed, model.name, tenants)
        app = make_app(engine, scheduler, options, tenants, warm_up=lambda: _warm_up(engine, scheduler, parsed.warm_up))
        opened.push(partial(_leave_unless_closed, app.state.service))
        run_server(
            app,
            bound,
            bounds=options.bounds,
            stop_s=options.stop_s,
            announce=lambda address: print_status(f"serving {options.model_name} at {address}/v1"),
        )
    return {"model": options.model_name}


def _tenants(parsed: argparse.Namespace) -> Tenants:
    if parsed.keys is not None:
        return Tenants.from_file(parsed.keys)
    key = parsed.api_key if parsed.api_key is not None else os.environ.get(KEY_VARIABLE)
    return Tenants() if key is None else Tenants.with_key(key)


def _leave_unless_closed(service: Service, kind: type[BaseException] | None, *_: object) -> None:
    """Ends the process where the server did not end in time: a thread that nothing can stop would keep it.

    After an error, it has served nothing.
    """
    if not service.is_closed and (kind is None or not issubclass(kind, Exception)):
        os._exit(UNFINISHED)


def _hosts(host: str, tenants: Tenants) -> tuple[str, ...] | None:
    """Returns the names that the server answers to: all of them where it asks for a key, or others reach it."""
    name = f"[{host}]" if ":" in host else host
    is_local = name in LOCAL_NAMES or name.startswith("127.")
    return tuple(dict.fromkeys((*LOCAL_NAMES, name))) if is_local and not tenants.ask_for_keys else None


def _options(parsed: argparse.Namespace, name: str, tenants: Tenants) -> ServingOptions:
    return ServingOptions(
        model_name=parsed.model_name or Path(name).name or BUNDLED,
        mode=parsed.mode,
        max_tokens=parsed.max_new_tokens,
        temperature=parsed.temperature,
        template_arguments=parsed.template_arguments or {},
        bounds=Bounds(body_bytes=parsed.max_body, chunks=parsed.max_chunks),
        stop_s=float(parsed.stop_seconds),
        hosts=_hosts(parsed.host, tenants),
    )


def _warm_up(engine: Engine, scheduler: Scheduler, tokens: int) -> None:
    """Compiles what decodes, and what prompts of up to so many tokens need."""
    from cacheblend_jax.engine.prompt import Prompt

    scheduler.warmup()  # first: it must come before any request
    if tokens:
        engine.warmup(tokens, pausing=True)
    scheduler.submit(Prompt("", (), "a"), mode="full", max_new_tokens=2).result()
