"""Compares ways to select the tokens to recompute, on a real model, by blends that are simulated densely.

Each setting is scored on its distance from full recompute over full recompute's own greedy answer, and on the share of
the loss of full KV reuse (of chunks precomputed without a text before them) that it recovers; both for the two halves
of the prompts, too. What wins on one half only has not won. For instance:

    python scripts/selection_lab.py --model smollm2 --data musique_s.json --words 60 --limit 40 \
        --contexts plain neutral --selectors hkvd query --ratios 0.15 0.3 --first 0 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cacheblend_jax as cb
from cacheblend_jax.blend.schedule import TAPER
from cacheblend_jax.choices import CONTINUATION_TOKENS, PLAIN
from cacheblend_jax.engine.contexts import chunk_context, named_context
from cacheblend_jax.engine.layout import ChunkContext
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.engine.prompt import TokenizedPrompt, check_length, tokenize_prompt
from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.evaluation.datasets import BUNDLED
from cacheblend_jax.evaluation.evaluator import rows_for
from cacheblend_jax.evaluation.simulated_blend import (
    Choice,
    DensePrompt,
    Distance,
    Simulated,
    chunk_kv,
    dense_prompts,
    distance,
    full_logits,
    greedy_answers,
    kept_by_layer,
    padded_size,
    simulated_blend,
)
from cacheblend_jax.model import Model, ModelConfig
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.params import Params, stacked
from cacheblend_jax.model.rope import Angles, rope_tables

SELECTORS = ("hkvd", "query", "random")
CHUNK_TOKENS = 512  # of LongBench's texts
Table = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A simulated blend: the candidates of highest mass ** `mass` x deviation ** `deviation` go on at each border.

    Attributes:
        selector: `"hkvd"`: the deviation alone; `"query"`: the mass is the question's attention; `"random"`.
        ratio, check_layer, stages: as in `BlendConfig`; at ratio 0 nothing is recomputed.
        first: so many tokens at the start of each chunk are chosen before all others; they count. The
            package's own `query` has 1.
        taper: see `stage_ratios`.
    """

    selector: str = "hkvd"
    ratio: float = 0.15
    first: int = 0
    taper: float = TAPER
    check_layer: int = 1
    stages: int = 4
    mass: float = 1.0
    deviation: float = 1.0

    @property
    def label(self) -> str:
        """Names the setting: short, and different for different settings of one check layer."""
        if self.ratio == 0:
            return "reuse"
        usual = asdict(Setting(self.selector, self.ratio))
        unusual = [
            f"{name.replace('_', ' ')} {value:g}" for name, value in asdict(self).items() if value != usual[name]
        ]
        return " ".join([self.selector, f"{self.ratio:g}", *unusual])

    def check(self, config: ModelConfig) -> None:
        """Checks that the model can have the setting.

        Raises:
            CacheBlendError: a value is out of its range; the message names it.
        """
        Planner(config, cb.BlendConfig(self.ratio, self.selector, self.check_layer, num_stages=self.stages))
        if not is_whole_number(self.first, least=0):
            raise CacheBlendError(f"first must be a whole number of at least 0, got {self.first!r}")
        for name, value, most in (("taper", self.taper, 1), ("mass", self.mass, 8), ("deviation", self.deviation, 8)):
            if not 0 <= value <= most:
                raise CacheBlendError(f"{name} must be in [0, {most}], got {value!r}")

    def keep(self, num_layers: int, candidates: int) -> np.ndarray:
        """Returns how many candidates go on from each layer to the next: int32 `[layers]`, as an engine plans it."""
        return kept_by_layer(num_layers, candidates, self.ratio, self.check_layer, self.stages, self.taper)


REUSE = Setting(ratio=0.0)


@dataclass(frozen=True, eq=False)
class Lab:
    """A model with prompts, answered by full recompute.

    Attributes:
        params: the model's, stacked.
        tokenized: the prompts in parts.
        prompts: the same, with their answers.
        references: full recompute's logits of each answer.
        angles: of all positions.
    """

    model: Model
    params: Params
    tokenized: Sequence[TokenizedPrompt]
    prompts: Sequence[DensePrompt]
    references: Sequence[jax.Array]
    angles: Angles

    @classmethod
    def of(cls, model: Model, tokenized: Sequence[TokenizedPrompt], *, seed: int = 0) -> Lab:
        """Answers the prompts greedily, by full recompute."""
        model = model.with_kernels("xla")  # what is compared is the choice of tokens: no kernel need prove itself
        params = stacked(model.params)
        size = padded_size(max(parts.token_ids.size for parts in tokenized) + CONTINUATION_TOKENS)
        answers = greedy_answers(model, tokenized, size)
        prompts = dense_prompts(tokenized, answers, size, seed)
        angles = rope_tables(model.config, size)
        references = [model.runner(full_logits, params, each, angles, config=model.config) for each in prompts]
        return cls(model, params, tokenized, prompts, references, angles)

    def chunk_kv(self, context: ChunkContext) -> list[KVCache]:
        """Returns each prompt's chunk KV after a context, as an engine stores it.

        Raises:
            PromptTooLongError: a chunk after the text is longer than the model takes.
        """
        config, cached = self.model.config, []
        for parts, prompt in zip(self.tokenized, self.prompts, strict=True):
            before = context.after(parts.prefix)
            size = before.size + prompt.chunks.shape[1]
            check_length(size, config.max_positions, "the context with a chunk")
            angles = rope_tables(config, size)
            arrays = self.params, prompt, before, angles, context.embeddings_after(parts.prefix)
            cached.append(self.model.runner(chunk_kv, *arrays, config=config))
        return cached

    def blend(
        self, number: int, cached: KVCache, setting: Setting, mass: jax.Array | None = None, *, with_mass: bool = False
    ) -> Simulated:
        """Simulates a blend of prompt `number`, whose chunk KV is `cached`; `mass` is what selector `query` reads."""
        prompt, config = self.prompts[number], self.model.config
        choice = make_choice(prompt, setting, config.num_layers, mass)
        arrays = self.params, prompt, cached, choice, self.angles
        return self.model.runner(simulated_blend, *arrays, config=config, with_mass=with_mass)

    def distances(self, blends: Iterable[Simulated]) -> Distance:
        """Returns how far a blend of each prompt is from full recompute: numpy arrays `[prompts]`."""
        each = [
            self.model.runner(distance, blend.logits, reference, prompt.num_scored)
            for blend, reference, prompt in zip(blends, self.references, self.prompts, strict=True)
        ]
        return jax.tree.map(lambda *values: np.stack(values), *jax.device_get(each))


def make_choice(prompt: DensePrompt, setting: Setting, num_layers: int, mass: jax.Array | None) -> Choice:
    """Returns a setting's traced half; `mass`: what the question pays to each key, for selector `query`."""
    evidence = {"query": mass, "random": prompt.drawn}.get(setting.selector)
    return Choice(
        mass=np.ones_like(prompt.drawn) if evidence is None else evidence,
        mass_exponent=np.float32(setting.mass),
        deviation_exponent=np.float32(0 if setting.selector == "random" else setting.deviation),
        first=np.int32(setting.first),
        keep=setting.keep(num_layers, int(prompt.candidate.sum())),
    )


def read_prompts(model: Model, source: str, *, limit: int | None, words: int | None) -> list[TokenizedPrompt]:
    """Returns a data set's prompts (see `load_rows`), the first `words` words of each passage.

    Raises:
        CacheBlendError: there are fewer than two, or one is longer than the model takes.
    """
    prompts = []
    for row in rows_for(model, source, limit=limit, chunk_tokens=CHUNK_TOKENS):
        texts = [first_words(text, words) for text in row.chunks]
        prompt = cb.Prompt.to_answer(model.tokenizer, texts, row.question)
        room = model.config.max_positions - CONTINUATION_TOKENS
        sizes = {"vocab_size": model.config.vocab_size, "max_tokens": room}
        prompts.append(tokenize_prompt(prompt, model.tokenizer, **sizes))
    if len(prompts) < 2:
        raise CacheBlendError(
            f"data must hold at least 2 prompts, one for each half, got {len(prompts)}; raise --limit"
        )
    return prompts


def first_words(text: str, words: int | None) -> str:
    """Returns the text up to the end of its word number `words`, or all of it."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return text if words is None or words >= len(ends) else text[: ends[words - 1]]


def compare(lab: Lab, contexts: Sequence[str], settings: Sequence[Setting]) -> Table:
    """Simulates every setting after every context; returns `summary` of each, full KV reuse first.

    Raises:
        CacheBlendError: a context cannot be read, or is too long.
    """
    table: Table = []
    lost: np.ndarray
    for context in dict.fromkeys([PLAIN, *contexts]):  # first, for what is lost
        cached = lab.chunk_kv(chunk_context(named_context(context), 4, lab.model))
        of_reuse, masses = reuse(lab, cached)
        if context == PLAIN:
            lost = np.asarray(of_reuse.kl)
        if context not in contexts:
            continue
        table.append({"context": context, "setting": REUSE.label} | summary(of_reuse, lost))
        for setting in settings:
            blends = (lab.blend(number, kv, setting, masses[number]) for number, kv in enumerate(cached))
            table.append({"context": context, "setting": setting.label} | asdict(setting))
            table[-1] |= summary(lab.distances(blends), lost)
    return table


def reuse(lab: Lab, cached: Sequence[KVCache]) -> tuple[Distance, list[jax.Array | None]]:
    """Returns how far full KV reuse is from full recompute, and what its question pays to each key of each prompt."""
    blends = [lab.blend(number, kv, REUSE, with_mass=True) for number, kv in enumerate(cached)]
    return lab.distances(blends), [blend.mass for blend in blends]


def summary(distances: Distance, lost: np.ndarray) -> dict[str, Any]:
    """Returns the means over all prompts and over each half; `lost` is the `kl` of full KV reuse, `[prompts]`."""
    half = lost.size // 2
    parts = {"all": slice(None), "first_half": slice(half), "second_half": slice(half, None)}
    means: dict[str, Any] = {}
    for part, rows in parts.items():
        kl, loss = float(distances.kl[rows].mean()), float(lost[rows].mean())
        means[part] = {
            "kl": kl,
            "first_kl": float(distances.first_kl[rows].mean()),
            "agreement": float(distances.agreement[rows].mean()),
            "recovered": 1 - kl / loss if loss else None,
        }
    return means | {"kl_by_prompt": distances.kl.tolist()}


def table_text(table: Table) -> str:
    """Returns the results as text: a line for each context and setting."""
    width = max(len(line["setting"]) for line in table) + 2
    text = [
        f"{'context':12}{'setting':{width}}{'KL a token':>11}{'recovered':>11}{'of halves':>20}{'first KL':>10}"
        f"{'agreement':>11}"
    ]
    for line in table:
        recovered = [_share(line[part]["recovered"]) for part in ("all", "first_half", "second_half")]
        whole = line["all"]
        text.append(
            f"{Path(line['context']).stem:12.11}{line['setting']:{width}}{whole['kl']:11.4f}{recovered[0]:>11}"
            f"{' / '.join(recovered[1:]):>20}{whole['first_kl']:10.4f}{whole['agreement']:11.3f}"
        )
    return "\n".join(text)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def settings_of(options: argparse.Namespace, config: ModelConfig) -> list[Setting]:
    """Returns every combination of the options' values; those that differ in what a selector ignores are one."""
    check_layers = options.check_layers or [config.check_layer]
    values = (options.selectors, options.ratios, options.first, options.taper, check_layers, options.stages)
    settings = []
    for each in itertools.product(*values, options.mass, options.deviation):
        setting = Setting(*each)
        setting.check(config)
        if setting.selector != "query":
            setting = replace(setting, mass=1.0)
        if setting.selector == "random":
            setting = replace(setting, deviation=1.0)
        settings.append(setting)
    return list(dict.fromkeys(settings))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a checkpoint's directory or hub id, a GGUF file, or smollm2")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--data", default=BUNDLED, help="a file, as `evaluate --data` takes it")
    parser.add_argument("--limit", type=int, default=40, help="of prompts; of the bundled data, of each kind")
    parser.add_argument("--words", type=int, help="cut each passage after so many words")
    parser.add_argument("--contexts", nargs="+", default=[PLAIN], help="plain, neutral, or a text file")
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=["hkvd"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.15])
    parser.add_argument("--first", nargs="+", type=int, default=[0], help="tokens of each chunk that always come first")
    parser.add_argument("--taper", nargs="+", type=float, default=[TAPER])
    parser.add_argument("--check-layers", nargs="+", type=int, help="by default the model's own")
    parser.add_argument("--stages", nargs="+", type=int, default=[4])
    parser.add_argument("--mass", nargs="+", type=float, default=[1.0], help="exponents of the question's attention")
    parser.add_argument("--deviation", nargs="+", type=float, default=[1.0], help="exponents of the KV deviation")
    parser.add_argument("--seed", type=int, default=0, help="of selector random")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    model = cb.load_model(options.model, dtype=options.dtype)
    settings = settings_of(options, model.config)
    prompts = read_prompts(model, options.data, limit=options.limit, words=options.words)
    lab = Lab.of(model, prompts, seed=options.seed)
    report: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(options).items()}}
    report |= {"device": str(jax.devices()[0]), "prompts": len(prompts), "keys": lab.angles.num_tokens}
    report["results"] = compare(lab, options.contexts, settings)
    print(f"{len(prompts)} prompts of up to {lab.angles.num_tokens} tokens, {model.name} on {report['device']}")
    print(table_text(report["results"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    try:
        main()
    except CacheBlendError as error:
        sys.exit(f"selection_lab: {error}")
