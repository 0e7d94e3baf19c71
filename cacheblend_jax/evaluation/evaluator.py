"""The evaluator: answers the rows of a data set in many settings and measures how far each is from full recompute."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.choices import CONTINUATION_TOKENS, CONTINUATIONS
from cacheblend_jax.engine.contexts import named_context
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt, tokenize_prompt
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.errors import CacheBlendError, PromptError
from cacheblend_jax.evaluation.attention import attention_deviation_by_layer
from cacheblend_jax.evaluation.datasets import Row, load_rows
from cacheblend_jax.evaluation.insights import standalone_deviation
from cacheblend_jax.evaluation.metrics import (
    continuation_distance,
    exact_match,
    kv_deviation_by_layer,
    rouge_l,
    token_f1,
)
from cacheblend_jax.evaluation.progress import Progress, no_progress
from cacheblend_jax.evaluation.settings import Setting
from cacheblend_jax.model import Model
from cacheblend_jax.model.encoding import encode
from cacheblend_jax.runtime.exit_hook import several_at_a_time
from cacheblend_jax.store import ChunkStore

STORE_BYTES = 4 * 2**30
NUM_BUCKETS = 3


def rows_for(model: Model, data_set: str, *, limit: int | None, chunk_tokens: int) -> list[Row]:
    """Returns a data set's rows (see `load_rows`), split by the model's tokenizer.

    Raises:
        CacheBlendError: the model has no tokenizer, or the data set cannot be read.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise CacheBlendError(f"model {model.name!r} has no tokenizer; evaluate needs one")

    def count_tokens(text: str) -> int:
        return len(encode(tokenizer, text))

    return load_rows(data_set, limit=limit, chunk_tokens=chunk_tokens, count_tokens=count_tokens)


def through_stop(token_ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    """Returns an answer up to and with its first stop token: that it ends there is part of it."""
    ends = (number for number, token in enumerate(token_ids) if token in stop_token_ids)
    return token_ids[: next(ends, len(token_ids)) + 1]


class Evaluator:
    """Answers rows in many settings over one store, with one engine for each setting.

    Args:
        rows: all that will be asked, except those that the model cannot be asked: prompts are padded to a few lengths
            that fit these rows.
        max_new_tokens: longest answer.
        continuation: what settings are scored on, token by token: `"full"`, the greedy answer of full recompute, or
            `"gold"`, a row's first answer.
        continuation_tokens: at most so many of its tokens.
        system: text before the chunks; `None`: the tokenizer's own, or a general one.
        with_rouge: also measures Rouge-L, which needs the package rouge-score.
        layer_deviations: also measures the KV deviation and the attention deviation of every layer.

    Attributes:
        rows: those that the model can be asked.
        skipped: of the others, by name, why not: longer than the model takes, say.

    Raises:
        PromptError: the model can be asked none of the rows.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        continuation: str = "full",
        continuation_tokens: int = CONTINUATION_TOKENS,
        system: str | None = None,
        with_rouge: bool = True,
        layer_deviations: bool = False,
    ) -> None:
        if continuation not in CONTINUATIONS:
            raise CacheBlendError(f"unknown continuation {continuation!r}; known: {', '.join(CONTINUATIONS)}")
        self.model = model
        self.with_rouge, self.layer_deviations = with_rouge, layer_deviations
        self.max_new_tokens = max_new_tokens
        self.continuation, self.continuation_tokens = continuation, continuation_tokens
        self.system = system
        self._room = max(max_new_tokens, continuation_tokens)
        self.rows, self.skipped, lengths = list[Row](), dict[str, str](), list[int]()
        for row in rows:
            try:
                lengths.append(self._length(row))
                self.rows.append(row)
            except PromptError as error:
                self.skipped[row.name] = str(error).partition("; ")[0]
        if not self.rows:
            name, reason = next(iter(self.skipped.items()))
            raise PromptError(f"row {name}: {reason}; none of the {len(rows)} rows can be asked")
        # Every setting compiles programs of its own for every bucket: few buckets save most of that time.
        self._lengths = dict(zip(self.rows, lengths, strict=True))
        quantiles = np.quantile(lengths, np.linspace(0, 1, NUM_BUCKETS + 1)[1:])
        self._length_buckets = sorted({Buckets().length(int(np.ceil(size)) + self._room) for size in quantiles})
        self._open = ExitStack()
        self._stores: dict[str | None, ChunkStore] = {}  # by what KV is quantised to
        self._engines: dict[tuple[BlendConfig, str, str | None], Engine] = {}

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the engines and their store; once or more."""
        self._open.close()

    def engine(self, setting: Setting) -> Engine:
        """Returns the setting's engine, over the shared store."""
        config, context, kv_dtype = name = setting.blend_config(), setting.context, setting.kv_dtype
        if kv_dtype not in self._stores:
            store = ChunkStore(host_bytes=STORE_BYTES, kv_dtype=kv_dtype)
            self._stores[kv_dtype] = self._open.enter_context(store)
        if name not in self._engines:
            engine = Engine(
                self.model,
                self._stores[kv_dtype],
                config,
                context=named_context(context),
                length_buckets=self._length_buckets,
            )
            self._engines[name] = self._open.enter_context(engine)
        return self._engines[name]

    def prompt(self, row: Row) -> Prompt:
        """Returns the row's prompt, the one that `ask` would build, in token ids."""
        prompt = Prompt.to_answer(self.model.tokenizer, row.chunks, row.question, system=self.system)
        config = self.model.config
        parts = tokenize_prompt(
            prompt, self.model.tokenizer, vocab_size=config.vocab_size, max_tokens=config.max_positions
        )
        return Prompt(parts.prefix, parts.chunks, parts.suffix)

    def _length(self, row: Row) -> int:
        prompt = self.prompt(row)
        return sum(len(part) for part in (prompt.prefix, *prompt.chunks, prompt.suffix))

    def by_size(self, rows: Sequence[Row]) -> list[Row]:
        """Sorts rows by their bucket, so that the programs of only one bucket are needed at a time."""
        sizes = self._length_buckets
        return sorted(rows, key=lambda row: bisect_left(sizes, self._lengths[row] + self._room))

    def chunk_lengths(self, row: Row) -> tuple[int, ...]:
        """Returns the tokens of each of the row's chunks."""
        return tuple(len(chunk) for chunk in self.prompt(row).chunks)

    def standalone_deviation(self, row: Row) -> np.ndarray:
        """Returns how far the KV of the row's chunks, computed apart, is from full recompute: `[layers, candidates]`.

        See `insights.standalone_deviation`.
        """
        return standalone_deviation(self.engine(Setting("full")), self.prompt(row))

    def evaluate_row(self, row: Row, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Answers a row in every setting.

        Returns:
            A record for each setting: `row` (its name), `kind`, `setting` (its label) and `answer`; of the answer
            `exact_match`, `f1` and `rouge_l`, in [0, 1]; of the distance from full recompute over the continuation
            `kl` (nats a token), `nll_difference` and `agreement` (see `ContinuationDistance`) and `first_kl` (of the
            first token alone); where they were asked for, `kv_deviation` and `attention_deviation`, each also
            `…_by_layer`; and of the work `ttft_s`, `flops` (of the prefill), `tokens` and `recomputed` (tokens, mean
            over the layers after the check layer).
        """
        prompt = self.prompt(row)
        full = self.engine(Setting("full")).prefill(prompt, "full")
        reference = self._reference(row, full)
        return [self._record(row, prompt, setting, reference) for setting in settings]

    def _reference(self, row: Row, full: PrefillResult) -> _Reference:
        engine = self.engine(Setting("full"))
        room = min(self.continuation_tokens, self.model.config.max_positions - full.token_ids.size + 1)
        if self.continuation == "gold":
            ids = encode(self.model.tokenizer, row.answers[0])[:room]
        else:
            ids = engine.complete(full, max_new_tokens=room, stop_token_ids=()).token_ids
            ids = through_stop(ids, self.model.stop_token_ids)
        if not ids:
            raise CacheBlendError(f"row {row.name}: there is no answer to score; use --answers full")
        padded = np.full(room, ids[-1], np.int32)  # one program for continuations of all lengths
        padded[: len(ids)] = ids
        return _Reference(full, padded, engine.continuation_logits(full, padded)[: len(ids)])

    def warmup(self, row: Row, settings: Sequence[Setting], progress: Progress = no_progress) -> None:
        """Compiles what the settings need for rows of this one's size, several programs at a time."""
        by_engine: dict[Engine, list[Setting]] = defaultdict(list)
        for setting in settings:
            by_engine[self.engine(setting)].append(setting)
        with several_at_a_time() as threads:
            compiling = [threads.submit(self.evaluate_row, row, group) for group in by_engine.values()]
            for each in progress(compiling, "compile"):
                each.result()

    def _record(self, row: Row, prompt: Prompt, setting: Setting, reference: _Reference) -> dict[str, Any]:
        engine, full = self.engine(setting), reference.full
        engine.precompute(prompt)
        out = full if setting.mode == "full" else engine.prefill(prompt, setting.mode)
        answer = engine.complete(out, max_new_tokens=self.max_new_tokens).text.strip()
        wanted = reference.logits
        logits = wanted if out is full else engine.continuation_logits(out, reference.padded_ids)[: len(wanted)]
        distance = continuation_distance(logits, wanted, reference.padded_ids[: len(wanted)])
        stats = out.stats
        deviations = self._layer_deviations(prompt, out, full) if self.layer_deviations else {}
        return {
            "row": row.name,
            "kind": row.kind,
            "setting": setting.label,
            "answer": answer,
            "exact_match": exact_match(answer, row.answers),
            "f1": token_f1(answer, row.answers),
            "rouge_l": rouge_l(answer, row.answers) if self.with_rouge else None,
            "kl": float(distance.kl.mean()),
            "first_kl": float(distance.kl[0]),
            "nll_difference": distance.nll_difference,
            "agreement": distance.agreement,
            "ttft_s": stats.ttft_s,
            "flops": stats.flops,
            "tokens": stats.tokens,
            "recomputed": stats.forced + stats.recompute_ratio * stats.candidates,
        } | deviations

    def _layer_deviations(self, prompt: Prompt, out: PrefillResult, full: PrefillResult) -> dict[str, Any]:
        length, caches = full.token_ids.size, (out.padded_cache, full.padded_cache)
        kv = np.asarray(kv_deviation_by_layer(*caches, length))[:, :length].mean(axis=1)
        attention = attention_deviation_by_layer(self.model, full.token_ids, length - len(prompt.suffix), *caches)
        return {
            "kv_deviation": float(kv.mean()),
            "kv_deviation_by_layer": [round(float(x), 6) for x in kv],
            "attention_deviation": float(attention.mean()),
            "attention_deviation_by_layer": [round(float(x), 6) for x in attention],
        }


@dataclass(frozen=True, eq=False)
class _Reference:
    """What settings are compared with on a row.

    Attributes:
        full: the full prefill.
        padded_ids: int32, the continuation, then padding.
        logits: float32 `[tokens, vocab]`, full recompute's over the continuation without the padding.
    """

    full: PrefillResult
    padded_ids: np.ndarray
    logits: np.ndarray
