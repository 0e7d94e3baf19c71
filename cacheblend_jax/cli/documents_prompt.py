"""From text files to a prompt: what several commands share, so that one finds what another has stored."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cacheblend_jax.choices import FITTED_SUFFIX, NEUTRAL, PLAIN
from cacheblend_jax.cli.defaults import Extend
from cacheblend_jax.cli.options import (
    BUNDLED,
    STANDARD_STREAM,
    add_model_option,
    at_least_one,
    json_object,
    print_status,
)
from cacheblend_jax.cli.progress import Advance, progress
from cacheblend_jax.documents import BM25Retriever, Chunk, Document, chunk_documents, sample_documents
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.progress import Progress
from cacheblend_jax.model.encoding import encode
from cacheblend_jax.store import Store

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.engine.fitted_context import FittedContext
    from cacheblend_jax.engine.prompt import Prompt
    from cacheblend_jax.model import Model
    from cacheblend_jax.model.loading import LoadingModel

SEPARATOR = "\n\n"  # after each chunk
DOCUMENTS = "documents"  # the context that is a sample of them
TOP_K = 5


def add_question(parser: argparse.ArgumentParser) -> None:
    """Adds the question, which `question_and_paths` finds also where argparse takes it for a path."""
    parser.add_argument("question", nargs="?", help="what to ask; write it last, or - to read it from stdin")


def add_source_options(parser: argparse.ArgumentParser, *, docs_required: bool = True) -> None:
    """Adds the options that say what prompts are made of."""
    add_model_option(parser)
    parser.add_argument(
        "--docs",
        nargs="+",
        action=Extend,
        required=docs_required,
        metavar="PATH",
        help="text, Markdown, HTML, PDF or .docx files, or directories",
    )
    parser.add_argument(
        "--chunk-tokens", type=at_least_one, default=512, metavar="N", help="longest chunk (default: 512)"
    )
    parser.add_argument(
        "--system", help="system text before the chunks (default: the tokenizer's own, or a general one)"
    )
    parser.add_argument(
        "--context",
        metavar="NAME",
        help=f"what chunks are precomputed after: {NEUTRAL} (a packaged text), {DOCUMENTS} (a sample of these, which "
        f"the store then remembers), a text file, a fitted context (*{FITTED_SUFFIX}), or {PLAIN} (nothing); default: "
        f"what the store remembers, or else {NEUTRAL}",
    )
    parser.add_argument(
        "--template-arguments",
        type=json_object,
        metavar="JSON",
        help="arguments of the model's chat template, for example '{\"enable_thinking\": false}'",
    )


def add_choice_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which chunks a prompt has; `asked` serves them."""
    parser.add_argument(
        "--top-k",
        type=at_least_one,
        metavar="K",
        help=f"how many chunks to use, picked by BM25 (default: {TOP_K}, or as many as the model takes)",
    )
    parser.add_argument("--all", action="store_true", help="use all chunks")


def question_and_paths(question: str | None, paths: list[str]) -> tuple[str, list[str]]:
    """In `--docs PATH… "question"` argparse takes the question for the last value of `--docs`: this takes it back.

    Raises:
        CacheBlendError: there is no question, or the one on stdin cannot be read.
    """
    if question is None:
        # `os.path.exists` is false for a text too long to be a path, where `Path.exists` would raise.
        if len(paths) < 2 or os.path.exists(paths[-1]):
            raise CacheBlendError('a question is missing; write it last: --docs PATH… "question"')
        *paths, question = paths
    if question == str(STANDARD_STREAM):
        question = _read_stdin()
    if not question.strip():
        raise CacheBlendError("the question is empty; write it last")
    return question, paths


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CacheBlendError(
            f"the question on stdin is not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {error.start}"
        ) from error


@contextmanager
def loading_with_tokenizer(name: str | None, dtype: str | None, progress: Advance | None) -> Iterator[LoadingModel]:
    """Loads a model that can read text, the bundled one for `None`; the body runs meanwhile (`loading_model`).

    Raises:
        CacheBlendError: it has no tokenizer, or cannot be loaded.
    """
    from cacheblend_jax.model.loading import loading_model

    with loading_model(BUNDLED if name is None else name, dtype=dtype, progress=progress) as loading:
        if loading.outline.tokenizer is None:
            raise CacheBlendError(f"model {loading.outline.name!r} has no tokenizer; text needs one")
        yield loading


def chosen_context(name: str | None) -> str | FittedContext | None:
    """Returns what `--context` names; `None` for the default, and for a sample of the documents.

    Raises:
        CacheBlendError: a file cannot be read.
    """
    from cacheblend_jax.engine.contexts import named_context

    return None if name in (None, DOCUMENTS) else named_context(name)


def context_for(
    name: str | None, chosen: str | FittedContext | None, store: Store, documents: Sequence[Document], model: Model
) -> str | FittedContext | None:
    """Returns the context of a command: what `chosen_context` gave for its name, or the remembered sample.

    Raises:
        CacheBlendError: see `remembered_sample`.
    """
    return remembered_sample(store, documents, model) if name == DOCUMENTS else chosen


def remembered_sample(store: Store, documents: Sequence[Document], model: Model) -> str:
    """Has a store remember a sample of the documents, unless it remembers a text; returns the one that it remembers.

    Raises:
        CacheBlendError: the documents are too short, or the store cannot be written.
    """
    sample = sample_documents(documents, lambda text: len(encode(model.tokenizer, text)))
    remembered = store.remember_context(sample)
    if remembered != sample:
        print_status("chunks are precomputed after the text that the store remembers, not a sample of these documents")
    return remembered


def split(documents: Sequence[Document], model: Model, chunk_tokens: int, progress: Progress = progress) -> list[Chunk]:
    """Splits documents into chunks of at most `chunk_tokens` tokens, the separator after each included."""
    return chunk_documents(
        documents, model.tokenizer, chunk_tokens, separator=SEPARATOR, progress=lambda items: progress(items, "split")
    )


def prompt_of(
    chunks: Sequence[Chunk],
    question: str,
    model: Model,
    system: str | None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Prompt:
    """Returns the prompt that asks a question of chunks."""
    from cacheblend_jax.engine.prompt import Prompt

    return Prompt.to_answer(
        model.tokenizer,
        [chunk.text for chunk in chunks],
        question,
        system=system,
        separator=SEPARATOR,
        template_arguments=template_arguments,
    )


def asked(chunks: list[Chunk], question: str, model: Model, parsed: argparse.Namespace) -> tuple[list[Chunk], Prompt]:
    """Returns the chunks to use, in order, and their prompt.

    Where the user has not said how many, they are those that leave room to answer.
    """
    from cacheblend_jax.engine.prompt import tokenize_parts

    def prompt_with(chosen: list[Chunk]) -> Prompt:
        return prompt_of(chosen, question, model, parsed.system, parsed.template_arguments)

    if parsed.all or parsed.top_k is not None:
        chosen = chunks if parsed.all else BM25Retriever(chunks, parsed.top_k).retrieve(question)
        return chosen, prompt_with(chosen)
    room = model.config.max_positions - parsed.max_new_tokens + 1
    retriever = BM25Retriever(chunks, TOP_K)
    ranked = retriever.ranked(question)
    for count in range(len(ranked), 0, -1):
        chosen = retriever.in_order(ranked[:count])
        prompt = prompt_with(chosen)
        if count == 1 or tokenize_parts(prompt, model.tokenizer, model.config.vocab_size).token_ids.size <= room:
            break
    if count < len(ranked):
        print_status(
            f"the model takes {model.config.max_positions} tokens: {count} instead of {len(ranked)} chunks are used "
            "(--chunk-tokens N makes them shorter)"
        )
    return chosen, prompt
