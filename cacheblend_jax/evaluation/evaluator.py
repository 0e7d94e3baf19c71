"""The evaluator: answers the rows of a data set in many settings and measures how far each is from full recompute."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.engine.encoding import encode
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt, tokenize_prompt
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.errors import CacheBlendError, PromptError
from cacheblend_jax.evaluation.datasets import Row, load_rows
from cacheblend_jax.evaluation.insights import standalone_deviation
from cacheblend_jax.evaluation.metrics import (
    attention_deviation_by_layer,
    exact_match,
    kl_divergence,
    kv_deviation_by_layer,
    rouge_l,
    token_f1,
)
from cacheblend_jax.evaluation.settings import Setting
from cacheblend_jax.model import Model
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


class Evaluator:
    """Answers rows in many settings over one store, with one engine for each setting.

    Args:
        rows: all that will be asked: prompts are padded to a few lengths that fit these rows.
        max_new_tokens: longest answer.
        system: text before the chunks; `None`: the tokenizer's own, or a general one.
        with_rouge: also measures Rouge-L, which needs the package rouge-score.

    Raises:
        PromptError: a row's prompt is longer than the model takes; the row is named.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        system: str | None = None,
        with_rouge: bool = True,
    ) -> None:
        self.model = model
        self.with_rouge = with_rouge
        self.max_new_tokens = max_new_tokens
        self.system = system
        # Every setting compiles programs of its own for every bucket: few buckets save most of that time.
        lengths = [self._length(row) for row in rows]
        self._lengths = dict(zip(rows, lengths, strict=True))
        quantiles = np.quantile(lengths, np.linspace(0, 1, NUM_BUCKETS + 1)[1:])
        self._length_buckets = sorted({Buckets().length(int(np.ceil(size)) + max_new_tokens) for size in quantiles})
        self._open = ExitStack()
        self._store = self._open.enter_context(ChunkStore(host_bytes=STORE_BYTES))
        self._engines: dict[BlendConfig, Engine] = {}

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the engines and their store; once or more."""
        self._open.close()

    def engine(self, setting: Setting) -> Engine:
        """Returns the setting's engine, over the shared store."""
        config = setting.blend_config()
        if config not in self._engines:
            engine = Engine(self.model, self._store, config, length_buckets=self._length_buckets)
            self._engines[config] = self._open.enter_context(engine)
        return self._engines[config]

    def prompt(self, row: Row) -> Prompt:
        """Returns the row's prompt, the one that `ask` would build, in token ids."""
        prompt = Prompt.to_answer(self.model.tokenizer, row.chunks, row.question, system=self.system)
        config = self.model.config
        try:
            parts = tokenize_prompt(
                prompt, self.model.tokenizer, vocab_size=config.vocab_size, max_tokens=config.max_positions
            )
        except PromptError as error:
            raise PromptError(f"row {row.name}: {error}") from error
        return Prompt(parts.prefix, parts.chunks, parts.suffix)

    def _length(self, row: Row) -> int:
        prompt = self.prompt(row)
        return sum(len(part) for part in (prompt.prefix, *prompt.chunks, prompt.suffix))

    def by_size(self, rows: Sequence[Row]) -> list[Row]:
        """Sorts rows by their bucket, so that the programs of only one bucket are needed at a time."""
        sizes = self._length_buckets
        return sorted(rows, key=lambda row: bisect_left(sizes, self._lengths[row] + self.max_new_tokens))

    def standalone_deviation(self, row: Row) -> np.ndarray:
        """Returns how far the KV of the row's chunks, computed apart, is from full recompute: `[layers, candidates]`.

        See `insights.standalone_deviation`.
        """
        return standalone_deviation(self.engine(Setting("full")), self.prompt(row))

    def evaluate_row(self, row: Row, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Answers a row in every setting.

        Returns:
            A record for each setting: `row` (its name), `kind`, `setting` (its label) and `answer`; of the answer
            `exact_match`, `f1` and `rouge_l`, in [0, 1]; of the distance from full recompute `kl` (nats, of the next
            token), `top1` (1 where the likeliest token is the same), `kv_deviation` and `attention_deviation`, each
            also `…_by_layer`; and of the work `ttft_s`, `tokens` and `recomputed` (tokens, mean over the layers after
            the check layer).
        """
        prompt = self.prompt(row)
        engine = self.engine(Setting("full"))
        engine.precompute(prompt)
        full = engine.prefill(prompt, "full")
        return [self._record(row, prompt, setting, full) for setting in settings]

    def warmup(self, row: Row, settings: Sequence[Setting]) -> None:
        """Compiles what the settings need for rows of this one's size, several programs at a time."""
        by_engine: dict[Engine, list[Setting]] = defaultdict(list)
        for setting in settings:
            by_engine[self.engine(setting)].append(setting)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda group: self.evaluate_row(row, group), by_engine.values()))

    def _record(self, row: Row, prompt: Prompt, setting: Setting, full: PrefillResult) -> dict[str, Any]:
        engine = self.engine(setting)
        out = full if setting.mode == "full" else engine.prefill(prompt, setting.mode)
        answer = engine.complete(out, max_new_tokens=self.max_new_tokens).text.strip()
        length = full.token_ids.size
        caches = out.padded_cache, full.padded_cache
        kv = np.asarray(kv_deviation_by_layer(*caches, length))[:, :length].mean(axis=1)
        attention = attention_deviation_by_layer(self.model, full.token_ids, length - len(prompt.suffix), *caches)
        stats = out.stats
        return {
            "row": row.name,
            "kind": row.kind,
            "setting": setting.label,
            "answer": answer,
            "exact_match": exact_match(answer, row.answers),
            "f1": token_f1(answer, row.answers),
            "rouge_l": rouge_l(answer, row.answers) if self.with_rouge else None,
            "kl": kl_divergence(out.logits, full.logits),
            "top1": float(out.next_token == full.next_token),
            "kv_deviation": float(kv.mean()),
            "kv_deviation_by_layer": [round(float(x), 6) for x in kv],
            "attention_deviation": float(attention.mean()),
            "attention_deviation_by_layer": [round(float(x), 6) for x in attention],
            "ttft_s": stats.ttft_s,
            "tokens": stats.tokens,
            "recomputed": stats.forced + stats.recompute_ratio * stats.candidates,
        }
