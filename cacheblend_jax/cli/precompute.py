"""The command `precompute`: computes the KV of text files and keeps it in a directory."""

from __future__ import annotations

import argparse
from typing import Any

from cacheblend_jax.cli.bundled_model import check_reads
from cacheblend_jax.cli.documents_prompt import add_source_options, load_with_tokenizer, prompt_of, split
from cacheblend_jax.cli.options import add_shared_options, add_store_options, open_store, print_warning
from cacheblend_jax.cli.progress import progress_bar
from cacheblend_jax.cli.store_report import stored_otherwise
from cacheblend_jax.documents import read_documents
from cacheblend_jax.engine.engine import Engine


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
    documents = read_documents(parsed.docs)
    model = load_with_tokenizer(parsed.model, parsed.dtype)
    check_reads(model, [document.text for document in documents], parsed.model)
    chunks = split(documents, model, parsed.chunk_tokens)
    # Chunks are computed after the prefix of the prompt that `ask` will make of them, whatever its question.
    prompt = prompt_of(chunks, "?", model, parsed.system, parsed.template_arguments)
    with (
        open_store(parsed) as store,
        Engine(model, store) as engine,
        progress_bar("precompute") as advance,
    ):
        store.check_writable()
        if otherwise := stored_otherwise(store, model, engine.look_up(prompt.chunks, prefix=prompt.prefix)):
            print_warning(otherwise)
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
