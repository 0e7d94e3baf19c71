"""`evaluate`: quality of the modes, selectors and ratios on a data set, each beside full recompute; resumable."""

from __future__ import annotations

import argparse
import json
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt, encode, tokenize_prompt
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.errors import CacheBlendError, PromptError
from cacheblend_jax.evaluation.datasets import Row, digest_of, load_rows
from cacheblend_jax.evaluation.insights import (
    check_layer_scores,
    concentration,
    find_check_layer,
    neighbour_correlation,
    standalone_deviation,
)
from cacheblend_jax.evaluation.metrics import (
    attention_deviation_by_layer,
    bootstrap_interval,
    exact_match,
    kl_divergence,
    kv_deviation_by_layer,
    rouge_l,
    token_f1,
)
from cacheblend_jax.model import Model, save_check_layer
from cacheblend_jax.store import ChunkStore

MEANS = ("exact_match", "f1", "rouge_l", "kl", "top1", "kv_deviation", "attention_deviation", "ttft_s", "recomputed")
STORE_BYTES = 4 * 2**30
NUM_BUCKETS = 3
Progress = Callable[[Iterable, str], Iterable]


@dataclass(frozen=True)
class Setting:
    """One way to answer: a mode, and for `blend` how it chooses tokens."""

    mode: str
    selector: str = ""
    ratio: float = 0.0
    deviation: str = "kv"
    num_stages: int = 4
    check_layer: int | None = None

    @property
    def label(self) -> str:
        """The setting in a few characters, unique; what tables, plots and result files call it."""
        return self.mode if self.mode != "blend" else " ".join([self.selector, f"{self.ratio:g}", *self._extras])

    @property
    def name(self) -> str:
        """The setting but its ratio."""
        return self.mode if self.mode != "blend" else " ".join([self.selector, *self._extras])

    @property
    def _extras(self) -> list[str]:
        plain = Setting("blend")
        extras = [f"{self.deviation} only"] if self.deviation != plain.deviation else []
        extras += [f"{self.num_stages} stages"] if self.num_stages != plain.num_stages else []
        return extras + ([f"check {self.check_layer}"] if self.check_layer is not None else [])

    def blend_config(self) -> BlendConfig:
        """The engine's configuration for it."""
        if self.mode != "blend":
            return BlendConfig()
        return BlendConfig(self.ratio, self.selector, self.check_layer, self.deviation, self.num_stages)


class Evaluator:
    """Answers questions in many settings over one store; keeps each setting's engine, with its compiled programs."""

    def __init__(
        self,
        model: Model,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        system: str | None = None,
        with_rouge: bool = True,
    ):
        self.model = model
        self.with_rouge = with_rouge  # which needs rouge-score
        self.max_new_tokens = max_new_tokens
        self.system = system
        self._store = ChunkStore(host_bytes=STORE_BYTES)
        self._engines: dict[BlendConfig, Engine] = {}
        # Every setting has programs of its own for every bucket: a few sizes fitted to these rows save most of them.
        lengths = [self._length(row) for row in rows]
        self._lengths = dict(zip(rows, lengths, strict=True))
        quantiles = np.quantile(lengths, np.linspace(0, 1, NUM_BUCKETS + 1)[1:])
        self._length_buckets = sorted({Buckets().length(int(np.ceil(size)) + max_new_tokens) for size in quantiles})

    def engine(self, setting: Setting) -> Engine:
        """The setting's engine, over the shared store."""
        config = setting.blend_config()
        if config not in self._engines:
            self._engines[config] = Engine(self.model, self._store, config, length_buckets=self._length_buckets)
        return self._engines[config]

    def prompt(self, row: Row) -> Prompt:
        """The row's prompt as `ask` would build it, in token ids."""
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
        """Rows of one size after another: only one size's programs are needed at a time."""
        sizes = self._length_buckets
        return sorted(rows, key=lambda row: bisect_left(sizes, self._lengths[row] + self.max_new_tokens))

    def evaluate_row(self, row: Row, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """Answers a row in every setting; one record each, with its distance from full recompute."""
        prompt = self.prompt(row)
        plain = self.engine(Setting("full"))
        plain.precompute(prompt)
        full = plain.prefill(prompt, "full")
        return [self._record(row, prompt, setting, full) for setting in settings]

    def warmup(self, row: Row, settings: Sequence[Setting]) -> None:
        """Compiles what the settings need for rows like this one, several at a time."""
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


def run_evaluate(parsed: argparse.Namespace, model: Model, progress: Progress) -> dict[str, Any]:
    """Evaluates as the command line says; prints tables, draws plots, and returns what `--json` writes."""
    if model.tokenizer is None:
        raise CacheBlendError(f"model {model.name!r} has no tokenizer; evaluate needs one")

    def count_tokens(text: str) -> int:
        return len(encode(model.tokenizer, text, plain=True))

    rows = load_rows(parsed.data, limit=parsed.limit, chunk_tokens=parsed.chunk_tokens, count_tokens=count_tokens)
    evaluator = Evaluator(model, rows, max_new_tokens=parsed.max_new_tokens, system=parsed.system)
    if parsed.check_layers:
        return _measure_check_layer(evaluator, rows, model, progress)
    settings = settings_of(parsed)
    source = {
        "model": model.fingerprint,
        "check layer": model.config.check_layer,
        "data": parsed.data,
        "data's content": digest_of(parsed.data, parsed.chunk_tokens),
        "max_new_tokens": parsed.max_new_tokens,
        "system": parsed.system,
    }
    results = _Results(parsed.out, source)
    missing = {row.name: [s for s in settings if (row.name, s.label) not in results.done] for row in rows}
    for row in progress(evaluator.by_size([row for row in rows if missing[row.name]]), "evaluate"):
        results.add(evaluator.evaluate_row(row, missing[row.name]))
    wanted = {row.name for row in rows}
    labels = [setting.label for setting in settings]
    summary = summarize([r for r in results.records if r["row"] in wanted and r["setting"] in set(labels)], labels)
    print_summary(summary)
    if parsed.plot is not None:
        from cacheblend_jax.evaluation import plots

        plots.save_all(parsed.plot, settings, summary, evaluator, rows[0])
    return {"model": parsed.model, "data": parsed.data, "rows": len(rows), "summary": summary}


def settings_of(parsed: argparse.Namespace) -> list[Setting]:
    """The settings that the command line asks for: every mode, and for `blend` every selector at every ratio."""
    settings = [Setting(mode) for mode in parsed.modes if mode != "blend"]
    if "blend" in parsed.modes:
        settings += [
            Setting("blend", selector, ratio, deviation, stages, parsed.check_layer)
            for selector in parsed.selectors
            for ratio in parsed.ratios
            for deviation in parsed.deviations
            for stages in parsed.stages
        ]
    for setting in settings:
        setting.blend_config()  # checks the values before any work
    return settings


class _Results:
    """Records, kept in a JSONL file if there is one: a header line, then a line a record, appended row by row."""

    def __init__(self, path: Path | None, source: dict[str, Any]) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        if path is not None and path.exists() and path.stat().st_size:
            self._read(path, source)
        elif path is not None:
            self._append(path, [source])

    @property
    def done(self) -> set[tuple[str, str]]:
        return {(record["row"], record["setting"]) for record in self.records}

    def add(self, records: list[dict[str, Any]]) -> None:
        self.records += records
        if self._path is not None:
            self._append(self._path, records)

    def _read(self, path: Path, source: dict[str, Any]) -> None:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        except ValueError as error:
            raise CacheBlendError(f"{path} is not a results file: {error}; choose another --out") from error
        header = lines[0] if lines and isinstance(lines[0], dict) else {}
        if other := [name for name in source if name not in header or header[name] != source[name]]:
            raise CacheBlendError(f"{path} holds results of another {' and '.join(other)}; choose another --out")
        if torn:  # a run was killed while writing its last line
            path.write_bytes(whole + b"\n")
        self.records = lines[1:]

    @staticmethod
    def _append(path: Path, lines: list[dict[str, Any]]) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise CacheBlendError(f"cannot write --out {path}: {error.strerror}") from error


def summarize(records: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Means of every setting and kind of question (and of all), with a 95 % interval of exact match and F1."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["setting"], "all"].append(record)
        if record["kind"]:
            groups[record["setting"], record["kind"]].append(record)
    kinds = list(dict.fromkeys(kind for _, kind in groups))
    summary = []
    for label in labels:
        for kind in kinds:
            if group := groups.get((label, kind)):
                means = {name: _mean([record[name] for record in group]) for name in MEANS}
                intervals = {
                    f"{name}_interval": bootstrap_interval([record[name] for record in group])
                    for name in ("exact_match", "f1")
                }
                layers = {
                    name: np.mean([record[name] for record in group], axis=0).tolist()
                    for name in ("kv_deviation_by_layer", "attention_deviation_by_layer")
                }
                times = {"ttft_s": float(np.median([record["ttft_s"] for record in group]))}
                summary.append(
                    {"setting": label, "kind": kind, "rows": len(group), **means, **intervals, **layers, **times}
                )
    return summary


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else float(np.mean(np.asarray(values, np.float64)))


def print_summary(summary: Sequence[dict[str, Any]]) -> None:
    """Prints the table, a block a kind of question."""
    for kind in dict.fromkeys(line["kind"] for line in summary):
        lines = [line for line in summary if line["kind"] == kind]
        print(f"{kind}: {lines[0]['rows']} questions")
        print(
            f"  {'setting':22}{'exact match':>20}{'F1':>7}{'Rouge-L':>9}{'KL':>8}{'top-1':>7}"
            f"{'KV dev.':>9}{'attn dev.':>10}{'TTFT ms':>9}{'recomputed':>12}"
        )
        for line in lines:
            low, high = line["exact_match_interval"]
            print(
                f"  {line['setting']:22}{line['exact_match']:8.3f} [{low:.2f}, {high:.2f}]{line['f1']:7.3f}"
                f"{line['rouge_l']:9.3f}{line['kl']:8.3f}{line['top1']:7.3f}{line['kv_deviation']:9.4f}"
                f"{line['attention_deviation']:10.4f}{line['ttft_s'] * 1e3:9.1f}{line['recomputed']:12.1f}"
            )


def _measure_check_layer(evaluator: Evaluator, rows: Sequence[Row], model: Model, progress: Progress) -> dict[str, Any]:
    engine = evaluator.engine(Setting("full"))
    deviations = [standalone_deviation(engine, evaluator.prompt(row)) for row in progress(rows, "check layers")]
    scores = check_layer_scores(deviations)
    correlations = np.nanmean([neighbour_correlation(deviation[1:]) for deviation in deviations], axis=0)
    shares = np.nanmean([concentration(deviation)[1:] for deviation in deviations], axis=0)
    layer = find_check_layer(scores)
    print(f"{'layer':>5}{'finds what deviates above':>27}{'top 15 % hold':>15}{'rank correlation with the next':>32}")
    for index in range(1, model.config.num_layers):
        correlation = f"{correlations[index - 1]:32.2f}" if index - 1 < len(correlations) else ""
        score = "" if np.isnan(scores[index]) else f"{scores[index]:.2f}"
        print(f"{index:5}{score:>27}{shares[index - 1]:15.2f}{correlation}")
    saved = save_check_layer(model, layer)
    print(f"check layer: {layer}" + (f", saved in {saved}" if saved else " (not saved: the model has no directory)"))
    return {
        "check_layer": layer,
        "scores": [None if np.isnan(score) else float(score) for score in scores],
        "concentration": shares.tolist(),
        "neighbour_correlation": correlations.tolist(),
    }
