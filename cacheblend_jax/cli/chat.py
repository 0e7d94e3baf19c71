"""The command `chat`: a conversation about text files, whose KV goes on from turn to turn."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

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
    print_dim,
    ratio_or_auto,
    read_shown,
    recomputed_tokens,
    store_missing,
    summary,
)
from cacheblend_jax.cli.bundled_model import loading_reader, warn_of_unknown
from cacheblend_jax.cli.compiling import compiled_meanwhile
from cacheblend_jax.cli.documents_prompt import (
    add_choice_options,
    add_source_options,
    asked,
    chosen_context,
    context_for,
    split,
)
from cacheblend_jax.cli.options import add_shared_options, add_store_options, open_store, print_error, print_status
from cacheblend_jax.cli.progress import progress_of_parts
from cacheblend_jax.cli.store_report import StoreReport
from cacheblend_jax.documents import Chunk
from cacheblend_jax.errors import CacheBlendError, PromptTooLongError
from cacheblend_jax.model import ModelConfig

# What needs JAX is imported where it is used, so that the help of a command comes at once.
if TYPE_CHECKING:
    from cacheblend_jax.blend import BlendConfig
    from cacheblend_jax.engine.chunk_lookup import ChunkLookup
    from cacheblend_jax.engine.engine import Engine
    from cacheblend_jax.engine.generation import TokenStream
    from cacheblend_jax.engine.prompt import Prompt
    from cacheblend_jax.engine.results import Generation, PrefillResult
    from cacheblend_jax.model.sampling import Sampling

ASK = "> "
SHOWN_CHARACTERS = 60  # of a source's text
COMMANDS = {
    "/sources": "the chunks that the conversation is about",
    "/why": "what the last answer reused and computed",
    "/ratio": "R, or auto: another recompute ratio, for a new conversation",
    "/mode": f"{', '.join(MODES)}: prefill in another way, for a new conversation",
    "/new": "forget the conversation; the next question chooses its chunks",
    "/help": "this list; Ctrl-C stops an answer, Ctrl-D ends the program",
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds `chat` to the command line's commands."""
    parser = commands.add_parser("chat", help="talk about text files")
    add_source_options(parser)
    add_choice_options(parser)
    add_answer_options(parser)
    add_store_options(parser)
    add_shared_options(parser)
    parser.set_defaults(shorten=": --top-k K, --chunk-tokens N")
    return parser


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Answers questions until there are no more; returns what `--json` writes."""
    from cacheblend_jax.engine.engine import Engine

    blend, sampling = chosen_blend(parsed), chosen_sampling(parsed)
    context = chosen_context(parsed.context)
    with ExitStack() as opened:
        with progress_of_parts() as shown:
            documents = read_shown(parsed.docs, shown)
            texts = [document.text for document in documents]
            advance = shown.part("loading weights", unit="B", unit_scale=True)
            loading = opened.enter_context(loading_reader(parsed.model, parsed.dtype, texts, advance))
            chunks = split(documents, loading.outline, parsed.chunk_tokens, shown.items)
            store = opened.enter_context(open_store(parsed))
            context = context_for(parsed.context, context, store, documents, loading.outline)
            model = loading.model()
        new_engine = partial(Engine, model, store, context=context, store_missing=False, **engine_options(parsed))
        with Chat(parsed, chunks, new_engine, blend, sampling) as chat:
            chat.talk(_lines())
    return {"model": model.name, "turns": chat.turns}


def _lines() -> Iterator[str]:
    """Yields what the user writes, until it ends. An interrupt drops the line that is being written."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can then be edited, and come back)
    while True:
        try:
            # What is not UTF-8 is refused as a question, not here.
            line = input(ASK) if on_terminal else sys.stdin.buffer.readline().decode("utf-8", "surrogateescape")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if not line and not on_terminal:
            return
        yield line.strip()


class Chat:
    """A conversation: its chunks, its KV, and how it is prefilled.

    Args:
        new_engine: makes an engine that blends as it is told.

    Attributes:
        turns: what `--json` writes of each.
    """

    def __init__(
        self,
        parsed: argparse.Namespace,
        chunks: list[Chunk],
        new_engine: Callable[..., Engine],
        blend: BlendConfig,
        sampling: Sampling,
    ) -> None:
        self._parsed, self._chunks, self._new_engine, self._sampling = parsed, chunks, new_engine, sampling
        self._mode, self._engine = parsed.mode, new_engine(blend=blend)
        self._sources: list[Chunk] = []
        self._stream: TokenStream | None = None
        self._last: tuple[Generation, StoreReport | None] | None = None
        self._to_store: tuple[Prompt, Sequence[ChunkLookup]] | None = None
        self.turns: list[dict[str, Any]] = []

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def talk(self, lines: Iterable[str]) -> None:
        """Answers questions and serves commands. What goes wrong, or is interrupted, ends a turn alone."""
        for line in lines:
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._answer(line)
            except CacheBlendError as error:
                hint = self._parsed.shorten if isinstance(error, PromptTooLongError) else ""
                print_error(f"{error}{hint}")
            except KeyboardInterrupt:
                print_status("stopped; Ctrl-D ends the program")

    def _answer(self, question: str) -> None:
        warn_of_unknown(self._engine.model, [question])
        out, report = self._prefilled(question)
        # As far as an answer is read, it is part of the conversation.
        self._stream = self._engine.stream(out, max_new_tokens=self._parsed.max_new_tokens, sampling=self._sampling)
        try:
            print_as_it_comes(self._stream)
        finally:
            answer = self._stream.generation
            self._last = answer, report
            self.turns.append({"question": question, "answer": answer_report(answer)})
            print_dim(cost_line(out, report, self._engine.model.config))
        self._last = answer, self._store_missing() or report

    def _prefilled(self, question: str) -> tuple[PrefillResult, StoreReport | None]:
        """Prefills a question after what was said, if the model has room for it; else its chunks, too."""
        if self._stream is not None:
            if (out := self._extended(self._stream, question)) is not None:
                return out, None
            self._forget()
        with progress_of_parts() as shown:
            engine = self._engine
            self._sources, prompt = asked(self._chunks, question, engine.model, self._parsed)
            looked_up, report = engine.look_up(prompt), None
            to_answer = (self._mode,), self._parsed.max_new_tokens
            if precomputes_first(self._mode):
                report = precompute_first(engine, prompt, looked_up, *to_answer, shown)
            else:
                compiling = shown.part("compiling")
                with compiled_meanwhile(engine, prompt, *to_answer, compiling, precomputed=False) as compiled:
                    compiled()
                self._to_store = prompt, looked_up
            return prefill_shown(engine, prompt, self._mode, shown), report or StoreReport(looked_up)

    def _store_missing(self) -> StoreReport | None:
        """Stores what an answer's prompt lacked, for the next conversation."""
        to_store, self._to_store = self._to_store, None
        if to_store is None:
            return None
        with progress_of_parts() as shown:
            return store_missing(self._engine, *to_store, shown)

    def _extended(self, said: TokenStream, question: str) -> PrefillResult | None:
        from cacheblend_jax.engine.prompt import Prompt

        model, arguments = self._engine.model, self._parsed.template_arguments
        ids = Prompt.follow_up(model.tokenizer, question, template_arguments=arguments)
        length, most = said.context.token_ids.size, model.config.max_positions
        if length + len(ids) + self._parsed.max_new_tokens - 1 > most:
            print_status(f"the model takes {most} tokens, and the conversation has {length}: a new one begins")
            return None
        with progress_of_parts() as shown:
            shown.part("prefilling the question")
            return self._engine.extend(said, ids)

    # --- commands ----------------------------------------------------------------------------------------------------

    def _command(self, name: str, argument: str = "") -> None:
        if name not in COMMANDS:
            raise CacheBlendError(f"there is no {name!r}; /help lists what there is")
        getattr(self, f"_command_{name[1:]}")(argument)

    def _command_help(self, _: str) -> None:
        print("\n".join(f"{name:9} {what}" for name, what in COMMANDS.items()))

    def _command_new(self, _: str) -> None:
        self._forget()

    def _command_sources(self, _: str) -> None:
        print("\n".join(_sources_lines(self._sources)) or "no question has chosen any yet")

    def _command_why(self, _: str) -> None:
        print("no answer yet" if self._last is None else why(*self._last, self._parsed.store))

    def _command_mode(self, mode: str) -> None:
        if mode not in MODES:
            raise CacheBlendError(f"/mode must be one of {', '.join(MODES)}, got {mode!r}")
        self._mode = mode
        self._forget()

    def _command_ratio(self, ratio: str) -> None:
        from cacheblend_jax.blend import BlendConfig

        try:
            blend = BlendConfig(ratio_or_auto(ratio), selector=self._parsed.selector)
        except argparse.ArgumentTypeError as error:
            raise CacheBlendError(f"/ratio {error}") from error
        engine = self._new_engine(blend=blend)
        self._engine.close()
        self._engine = engine
        self._forget()

    def _forget(self) -> None:
        self._stream, self._sources = None, []


def cost_line(out: PrefillResult, report: StoreReport | None, config: ModelConfig) -> str:
    """Returns on one line what a turn's prefill cost, and what a full one would have.

    Args:
        report: what the store had; `None` where the conversation's own KV went on.
    """
    from cacheblend_jax.blend.flops import prefill_flops

    stats = out.stats
    in_full = prefill_flops(config, [np.arange(stats.tokens)] * config.num_layers)
    if report is None:
        kept = f"{stats.exact} tokens kept"
    else:
        computed = f", {report.computed} precomputed in {report.seconds:.1f} s" if report.computed else ""
        kept = f"{report.found} of {len(report.chunks)} chunks hit{computed}"
    return (
        f"[TTFT {stats.ttft_s * 1e3:.0f} ms; {kept}; {recomputed_tokens(stats)} of {stats.tokens} tokens recomputed; "
        f"{stats.flops / 1e9:.3g} GFLOP, full prefill {in_full / 1e9:.3g}]"
    )


def why(answer: Generation, report: StoreReport | None, directory: str | None) -> str:
    """Returns a few lines: what an answer's prefill reused and computed, what was decided, and how fast it decoded."""
    from cacheblend_jax.engine.controller import explain

    stats = answer.stats
    lines = [summary(stats.prefill)]
    if report is not None:
        lines.append(report.line(directory))
    if stats.prefill.decision is not None:
        lines.append(explain(stats.prefill.decision, stats.prefill.ttft_s))
    if stats.decoded:
        lines.append(f"[{stats.decoded} tokens decoded, {1 / stats.seconds_per_token:.1f} a second]")
    return "\n".join(lines)


def _sources_lines(chunks: Sequence[Chunk]) -> list[str]:
    return [
        f"{chunk.source}, chunk {chunk.index}: {' '.join(chunk.text.split())[:SHOWN_CHARACTERS]}" for chunk in chunks
    ]
