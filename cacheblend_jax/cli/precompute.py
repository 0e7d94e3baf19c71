"""The command `precompute`: computes the KV of text files and keeps it in a directory."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from cacheblend_jax.cli.bundled_model import load_reader
from cacheblend_jax.cli.documents_prompt import (
    add_source_options,
    chosen_context,
    context_for,
    prompt_of,
    split,
)
from cacheblend_jax.cli.options import add_shared_options, add_store_options, open_store, print_warning
from cacheblend_jax.cli.progress import progress_bar
from cacheblend_jax.cli.store_report import stored_otherwise
from cacheblend_jax.documents import read_documents


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `precompute` to the command line's commands."""
    parser = commands.add_parser("precompute", help="compute the KV of text files and keep it in a directory")
    add_source_options(parser)
    add_store_options(parser, required=True)
    add_shared_options(parser)
    parser.set_defaults(shorten=": --chunk-tokens N")
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Stores the KV of all chunks of the documents; returns what `--json` writes."""
    from cacheblend_jax.engine.engine import Engine

    context = chosen_context(parsed.context)
    documents = read_documents(parsed.docs)
    model = load_reader(parsed.model, parsed.dtype, [document.text for document in documents])
    chunks = split(documents, model, parsed.chunk_tokens)
    # Chunks are computed after the prefix of the prompt that `ask` will make of them, whatever its question.
    prompt = prompt_of(chunks, "?", model, parsed.system, parsed.template_arguments)
    with ExitStack() as opened:
        store = opened.enter_context(open_store(parsed))
        store.check_writable()
        context = context_for(parsed.context, context, store, documents, model)
        engine = opened.enter_context(Engine(model, store, context=context, kernels=parsed.kernels))
        advance = opened.enter_context(progress_bar("precompute"))
        if otherwise := stored_otherwise(store, model, engine.look_up(prompt.chunks, prefix=prompt.prefix)):
            print_warning(otherwise)
        keys = engine.precompute(prompt.chunks, prefix=prompt.prefix, progress=advance)
        engine.flush()
        stats = store.stats
    computed = sorted(set(range(len(chunks))) - set(keys.unstored))
    with open_store(parsed) as store:  # opened anew, it holds what has been written, and nothing in memory
        stored = {number: key for number, key in zip(computed, keys, strict=True) if key in store}
    failed = len(stored) < len(chunks)
    print(
        f"{'only ' if failed else ''}{len(stored)} of {len(chunks)} chunks are in {parsed.store}, "
        f"{stats.written} entries written now ({stats.disk.bytes / 1e6:.1f} MB)"
        + (f"; {stats.write_errors} errors of writing: see above" if stats.write_errors else "")
    )
    return {
        "chunks": [
            {"source": chunk.source, "index": chunk.index, "key": stored.get(number)}
            for number, chunk in enumerate(chunks)
        ],
        "written": stats.written,
        "store_bytes": stats.disk.bytes,
        "exit_code": 1 if failed or stats.write_errors else 0,
    }
